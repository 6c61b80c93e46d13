//! Token bucket filters (tc-tbf(8)): the queue on a link that limits what leaves it.

use std::mem::size_of;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use nix::libc;

use super::Netlink;
use crate::socket::{Attributes, number, string};
use crate::{Error, Result};

const KIND: &str = "tbf";
/// `struct tcmsg`.
const TCMSG: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// `struct tc_tbf_qopt`: two `tc_ratespec`, then limit, buffer and MTU.
const QOPT: usize = 36;
const RATESPEC_RATE: usize = 8;
const QOPT_LIMIT: usize = 24;
/// TC_LINKLAYER_ETHERNET: frames count with what they have on the wire, and no rate table is needed.
const LINKLAYER_ETHERNET: u8 = 1;

/// What a token bucket lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tbf {
    /// Bytes a second, Ethernet headers included.
    pub rate: u64,
    /// Bytes that may pass at once after a rest. A packet larger than that is dropped, once it is segmented.
    pub burst: u32,
    /// Bytes that may wait; what comes on top is dropped.
    pub limit: u32,
}

/// A token bucket that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundTbf {
    /// Index of the link that it is on.
    pub index: u32,
    /// As in [`Tbf::rate`].
    pub rate: u64,
    /// As in [`Tbf::limit`].
    pub limit: u32,
}

impl Netlink {
    /// Limits what leaves a link: makes a token bucket its root queue, or changes the one that is there.
    ///
    /// # Errors
    /// When rate, burst or limit is 0, there is no such link, the kernel has no `tbf`, or the process may not.
    pub fn set_tbf(&mut self, index: u32, tbf: &Tbf) -> Result<()> {
        const OPERATION: &str = "limit the rate of";
        let object = format!("link {index}");
        if index == 0 {
            return Err(Error::invalid(OPERATION, object, "interface indexes begin at 1"));
        }
        if tbf.rate == 0 || tbf.burst == 0 || tbf.limit == 0 {
            return Err(Error::invalid(OPERATION, object, "rate, burst and limit must be above 0"));
        }
        let mut parameters = vec![0; QOPT];
        parameters[1] = LINKLAYER_ETHERNET;
        // Saturated when the 64-bit attribute tells the true one.
        let low = u32::try_from(tbf.rate).unwrap_or(u32::MAX);
        parameters[RATESPEC_RATE..][..size_of::<u32>()].copy_from_slice(&low.to_ne_bytes());
        parameters[QOPT_LIMIT..][..size_of::<u32>()].copy_from_slice(&tbf.limit.to_ne_bytes());
        let option = |kind, value| TcOption::Other(DefaultNla::new(kind, value));
        let mut options =
            vec![option(TCA_TBF_PARMS, parameters), option(TCA_TBF_BURST, tbf.burst.to_ne_bytes().to_vec())];
        if tbf.rate > u64::from(u32::MAX) {
            options.push(option(TCA_TBF_RATE64, tbf.rate.to_ne_bytes().to_vec()));
        }
        let mut message = TcMessage::default();
        message.header.index = i32::try_from(index)
            .map_err(|_| Error::invalid(OPERATION, object.as_str(), "no such interface index"))?;
        message.header.parent = TcHandle::ROOT;
        message.attributes = vec![TcAttribute::Kind(KIND.into()), TcAttribute::Options(options)];
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        self.socket.request(OPERATION, &object, message, NLM_F_CREATE | NLM_F_REPLACE).map(drop)
    }

    /// The token buckets that are root queues.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn tbfs(&mut self) -> Result<Vec<FoundTbf>> {
        let message = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        self.socket.dump("list", "queues", &message, |kind, payload| {
            if kind == libc::RTM_NEWQDISC { decode(payload) } else { None }
        })
    }
}

/// Decodes `struct tcmsg` and the attributes of a token bucket; other queues give nothing.
fn decode(payload: &[u8]) -> Option<FoundTbf> {
    let index = number(payload.get(4..)?)?;
    let parent = number(payload.get(12..)?)?;
    if parent != u32::from(TcHandle::ROOT) {
        return None;
    }
    let attributes = Attributes(payload.get(TCMSG..)?);
    let value = |kind| attributes.clone().find(|(k, _)| *k == kind).map(|(_, value)| value);
    if string(value(TCA_KIND)?) != KIND {
        return None;
    }
    let (mut rate, mut limit, mut rate64) = (None, None, None);
    for (kind, value) in Attributes(value(TCA_OPTIONS)?) {
        match kind {
            TCA_TBF_PARMS => {
                rate = number(value.get(RATESPEC_RATE..)?).map(u64::from);
                limit = number(value.get(QOPT_LIMIT..)?);
            }
            TCA_TBF_RATE64 => rate64 = value.first_chunk().map(|v| u64::from_ne_bytes(*v)),
            _ => {}
        }
    }
    Some(FoundTbf { index, rate: rate64.or(rate)?, limit: limit? })
}
