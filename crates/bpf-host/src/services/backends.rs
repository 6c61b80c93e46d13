//! Backends: numbers for them, and their entries.

use podway_abi::{
    Addr,
    services::{Backend, MAX_BACKENDS, NO_SERVICE, backend_flags},
};
use podway_services::table;

use super::ServiceWriter;

/// 64-bit words of an entry.
pub(super) const WORDS: usize = size_of::<Backend>() / 8;
// The entry as half words.
const SERVICE: usize = 4;
const INCARNATION: usize = 5;
const PORT_AND_FLAGS: usize = 6;
const PROTO: usize = 7;

pub(super) fn flags(backend: &table::Backend) -> u16 {
    let mut flags = 0;
    if backend.local {
        flags |= backend_flags::LOCAL;
    }
    if backend.terminating {
        flags |= backend_flags::TERMINATING;
    }
    flags
}

impl ServiceWriter {
    /// A number for a new backend and its entry; nothing when there is no room.
    pub(super) fn new_backend(
        &mut self,
        number: u32,
        addr: Addr,
        port: u16,
        proto: u8,
        flags: u16,
    ) -> Option<u32> {
        // Numbers rest as long as there are others.
        let id = if self.next_backend < MAX_BACKENDS {
            self.next_backend += 1;
            self.next_backend - 1
        } else {
            self.free_backends.pop_front()?
        };
        self.used_backends += 1;
        let at = id as usize * WORDS * 2;
        for (i, word) in addr.words.into_iter().enumerate() {
            self.backends.store_half(at + i, word);
        }
        self.backends.store_half(at + PORT_AND_FLAGS, port_and_flags(port, flags));
        self.backends.store_half(at + PROTO, proto.into());
        // Last: with the service the entry counts.
        self.backends.store_half(at + SERVICE, number);
        Some(id)
    }

    pub(super) fn set_backend_flags(&self, id: u32, port: u16, flags: u16) {
        self.backends.store_half(id as usize * WORDS * 2 + PORT_AND_FLAGS, port_and_flags(port, flags));
    }

    /// Gives a number up. Whoever remembers the backend sees by the incarnation that it has gone.
    pub(super) fn free_backend(&mut self, id: u32) {
        let at = id as usize * WORDS * 2;
        self.backends.store_half(at + SERVICE, NO_SERVICE);
        self.backends.store_half(at + INCARNATION, self.backends.load_half(at + INCARNATION).wrapping_add(1));
        self.free_backends.push_back(id);
        self.used_backends -= 1;
        self.room = true;
    }

    /// The entry of a number.
    pub(super) fn backend(&self, id: u32) -> Backend {
        let at = id as usize * WORDS * 2;
        let half = |i: usize| self.backends.load_half(at + i);
        let [p0, p1, f0, f1] = half(PORT_AND_FLAGS).to_le_bytes();
        Backend {
            addr: Addr { words: [half(0), half(1), half(2), half(3)] },
            service: half(SERVICE),
            incarnation: half(INCARNATION),
            port: u16::from_le_bytes([p0, p1]),
            flags: u16::from_le_bytes([f0, f1]),
            proto: half(PROTO),
        }
    }
}

fn port_and_flags(port: u16, flags: u16) -> u32 {
    u32::from(port) | u32::from(flags) << 16
}
