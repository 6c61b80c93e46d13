//! Consistent hashing after Maglev (Eisenbud et al., NSDI 2016, section 3.4): every node that knows the same backends
//! picks the same one for a flow, and a change of one backend moves few flows of the others.

use crate::table::Backend;

/// Sizes of tables: primes just below powers of two.
pub const SIZES: [u32; 10] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071];

/// The size of a table for a number of backends: the smallest of [`SIZES`] that gives each at least a hundred entries
/// (then their shares differ by about one percent), or the largest.
pub fn size_for(backends: usize) -> u32 {
    let wanted = backends.saturating_mul(100);
    let largest = SIZES[SIZES.len() - 1];
    SIZES.into_iter().find(|size| *size as usize >= wanted).unwrap_or(largest)
}

/// A table of `size` indexes into `backends`; empty when there are none. `size` must be prime, as [`size_for`] is, or
/// some entries could not be reached; a table smaller than the number of backends leaves some of them out.
///
/// Depends on the backends' addresses and ports alone, not on their order, and not on the machine.
pub fn table(backends: &[Backend], size: u32) -> Vec<u32> {
    if backends.is_empty() || size == 0 {
        return Vec::new();
    }
    const FREE: u32 = u32::MAX;
    let size64 = u64::from(size);
    // In the order of their addresses, since who chooses first matters.
    let mut order: Vec<u32> = (0..backends.len() as u32).collect();
    order.sort_by_key(|i| (backends[*i as usize].addr, backends[*i as usize].port));
    let mut walks: Vec<(u64, u64)> = order
        .iter()
        .map(|i| {
            let backend = &backends[*i as usize];
            let skip = if size > 2 { hash(backend, SKIP_SEED) % (size64 - 1) + 1 } else { 1 };
            (hash(backend, OFFSET_SEED) % size64, skip)
        })
        .collect();
    let mut entries = vec![FREE; size as usize];
    let mut filled = 0;
    loop {
        for (walk, backend) in walks.iter_mut().zip(&order) {
            // With a prime size every walk visits every entry, so that a free one is found.
            let mut steps = 0;
            while entries[walk.0 as usize] != FREE {
                walk.0 = (walk.0 + walk.1) % size64;
                steps += 1;
                if steps > size {
                    return entries;
                }
            }
            entries[walk.0 as usize] = *backend;
            filled += 1;
            if filled == size {
                return entries;
            }
        }
    }
}

const OFFSET_SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const SKIP_SEED: u64 = 0xc2b2_ae3d_27d4_eb4f;

/// FNV-1a over address and port, finished by a mixer so that neighbours in address do not become neighbours here.
fn hash(backend: &Backend, seed: u64) -> u64 {
    let addr = match backend.addr {
        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        std::net::IpAddr::V6(v6) => v6,
    };
    let mut hash = 0xcbf2_9ce4_8422_2325 ^ seed;
    for byte in addr.octets().into_iter().chain(backend.port.to_be_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn backends(n: u32) -> Vec<Backend> {
        (0..n)
            .map(|i| Backend {
                addr: Ipv4Addr::from(0x0af4_0000 + i).into(),
                port: 8080,
                local: false,
                terminating: false,
            })
            .collect()
    }

    #[test]
    fn sizes_are_primes_of_a_hundred_entries_each() {
        for size in SIZES {
            assert!((2..size).take_while(|d| d * d <= size).all(|d| !size.is_multiple_of(d)), "{size}");
        }
        assert_eq!(size_for(0), 251);
        assert_eq!(size_for(2), 251);
        assert_eq!(size_for(3), 509);
        assert_eq!(size_for(163), 16_381);
        assert_eq!(size_for(1_000_000), 131_071);
    }

    #[test]
    fn shares_are_even_and_changes_are_local() {
        for n in [1, 2, 3, 10, 100] {
            let all = backends(n);
            let size = size_for(all.len());
            let full = table(&all, size);
            let mut share = vec![0_u32; all.len()];
            full.iter().for_each(|i| share[*i as usize] += 1);
            let (least, most) = (*share.iter().min().unwrap(), *share.iter().max().unwrap());
            assert!(most - least <= 1 + size / n / 20, "{n}: {least} to {most}");

            // Not of the order.
            let reversed: Vec<Backend> = all.iter().rev().cloned().collect();
            let other = table(&reversed, size);
            let same = full.iter().zip(&other).all(|(a, b)| all[*a as usize] == reversed[*b as usize]);
            assert!(same, "{n}");

            if n < 2 {
                continue;
            }
            let without: Vec<Backend> = all[1..].to_vec();
            let fewer = table(&without, size);
            let moved = full
                .iter()
                .zip(&fewer)
                .filter(|(a, b)| **a != 0 && all[**a as usize] != without[**b as usize])
                .count();
            assert!(moved as u32 <= size / 5, "{n}: {moved} of {size} moved without need");
        }
        assert!(table(&[], 251).is_empty());
    }

    #[test]
    fn too_small_or_composite_tables_end() {
        assert_eq!(table(&backends(10), 7).len(), 7);
        assert_eq!(table(&backends(3), 4).len(), 4);
        assert_eq!(table(&backends(3), 1), vec![0]);
    }
}
