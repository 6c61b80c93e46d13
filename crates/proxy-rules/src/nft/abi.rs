//! Numbers of the nf_tables interface of the kernel (`linux/netfilter/nf_tables.h`).

use nix::libc;

const SUBSYSTEM: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8;

pub(super) const BATCH_BEGIN: u16 = 0x10;
pub(super) const BATCH_END: u16 = 0x11;
pub(super) const BATCH_GENID: u16 = 1;
pub(super) const RESOURCE: u16 = libc::NFNL_SUBSYS_NFTABLES as u16;

pub(super) const NEW_TABLE: u16 = SUBSYSTEM;
pub(super) const GET_TABLE: u16 = SUBSYSTEM | 1;
pub(super) const DEL_TABLE: u16 = SUBSYSTEM | 2;
pub(super) const NEW_CHAIN: u16 = SUBSYSTEM | 3;
pub(super) const GET_CHAIN: u16 = SUBSYSTEM | 4;
pub(super) const DEL_CHAIN: u16 = SUBSYSTEM | 5;
pub(super) const NEW_RULE: u16 = SUBSYSTEM | 6;
pub(super) const GET_RULE: u16 = SUBSYSTEM | 7;
pub(super) const DEL_RULE: u16 = SUBSYSTEM | 8;
pub(super) const NEW_SET: u16 = SUBSYSTEM | 9;
pub(super) const GET_SET: u16 = SUBSYSTEM | 10;
pub(super) const DEL_SET: u16 = SUBSYSTEM | 11;
pub(super) const NEW_ELEMENT: u16 = SUBSYSTEM | 12;
pub(super) const GET_ELEMENT: u16 = SUBSYSTEM | 13;
pub(super) const DEL_ELEMENT: u16 = SUBSYSTEM | 14;
pub(super) const GET_GEN: u16 = SUBSYSTEM | 16;

pub(super) const TABLE_NAME: u16 = 1;
pub(super) const TABLE_USERDATA: u16 = 6;

pub(super) const CHAIN_TABLE: u16 = 1;
pub(super) const CHAIN_NAME: u16 = 3;
pub(super) const CHAIN_HOOK: u16 = 4;
pub(super) const CHAIN_POLICY: u16 = 5;
pub(super) const CHAIN_TYPE: u16 = 7;
pub(super) const HOOK_NUM: u16 = 1;
pub(super) const HOOK_PRIORITY: u16 = 2;

pub(super) const RULE_TABLE: u16 = 1;
pub(super) const RULE_CHAIN: u16 = 2;
pub(super) const RULE_EXPRESSIONS: u16 = 4;
pub(super) const RULE_USERDATA: u16 = 7;

pub(super) const SET_TABLE: u16 = 1;
pub(super) const SET_NAME: u16 = 2;
pub(super) const SET_FLAGS: u16 = 3;
pub(super) const SET_KEY_TYPE: u16 = 4;
pub(super) const SET_KEY_LEN: u16 = 5;
pub(super) const SET_DATA_TYPE: u16 = 6;
pub(super) const SET_DATA_LEN: u16 = 7;
pub(super) const SET_DESC: u16 = 9;
pub(super) const SET_ID: u16 = 10;
pub(super) const SET_DESC_SIZE: u16 = 1;
pub(super) const SET_DESC_CONCAT: u16 = 2;
pub(super) const SET_FIELD_LEN: u16 = 1;

pub(super) const ELEMENTS_TABLE: u16 = 1;
pub(super) const ELEMENTS_SET: u16 = 2;
pub(super) const ELEMENTS_LIST: u16 = 3;
pub(super) const ELEMENT_KEY: u16 = 1;
pub(super) const ELEMENT_DATA: u16 = 2;
pub(super) const ELEMENT_FLAGS: u16 = 3;
pub(super) const ELEMENT_KEY_END: u16 = 10;
pub(super) const ELEMENT_INTERVAL_END: u32 = 1;

pub(super) const LIST_ELEMENT: u16 = 1;
pub(super) const DATA_VALUE: u16 = 1;
pub(super) const DATA_VERDICT: u16 = 2;
pub(super) const VERDICT_CODE: u16 = 1;
pub(super) const VERDICT_CHAIN: u16 = 2;
pub(super) const EXPR_NAME: u16 = 1;
pub(super) const EXPR_DATA: u16 = 2;
pub(super) const GEN_ID: u16 = 1;

/// Flags of sets.
pub(super) const FLAG_INTERVAL: u32 = 0x4;
pub(super) const FLAG_MAP: u32 = 0x8;
pub(super) const FLAG_TIMEOUT: u32 = 0x10;
pub(super) const FLAG_EVAL: u32 = 0x20;
pub(super) const FLAG_CONCAT: u32 = 0x80;

/// The data type that means a verdict.
pub(super) const TYPE_VERDICT: u32 = 0xffff_ff00;
pub(super) const VERDICT_GOTO: i32 = libc::NFT_GOTO;
pub(super) const VERDICT_DROP: i32 = 0;
pub(super) const VERDICT_ACCEPT: i32 = 1;

/// Data types as the nft program numbers them, so that it can show what is in a set.
pub(super) const TYPE_IPV4: u32 = 7;
pub(super) const TYPE_IPV6: u32 = 8;
pub(super) const TYPE_PROTOCOL: u32 = 12;
pub(super) const TYPE_PORT: u32 = 13;
pub(super) const TYPE_MARK: u32 = 19;
/// Bits by which one type of a concatenation is shifted.
pub(super) const TYPE_BITS: u32 = 6;
