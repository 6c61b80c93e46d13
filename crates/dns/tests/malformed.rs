//! Packets that nobody should send: none panics, and every response to one can be read by another library.

use hickory_proto::op::Message as Peer;
use podway_dns::wire::{self, Message, Reply};
use podway_dns::zone::{Zone, ZoneConfig};
use podway_model::Service;
use serde_json::json;

const PACKETS: usize = 200_000;

#[test]
fn no_packet_panics_and_responses_are_well_formed() {
    let mut zone = Zone::new(ZoneConfig::default());
    let service = json!({"metadata": {"name": "redis", "namespace": "default"}, "spec": {"type": "ClusterIP",
        "clusterIP": "10.0.0.1", "ports": [{"name": "db", "port": 6379}]}});
    zone.apply_service(&Service::parse(&service).unwrap());
    zone.synced();
    let good =
        b"\0\x01\x01\0\0\x01\0\0\0\0\0\x01\x05redis\x07default\x03svc\x07cluster\x05local\0\0\x21\0\x01\
        \0\0\x29\x10\0\0\0\0\0\0\0";
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut answered = 0;
    for _ in 0..PACKETS {
        let mut packet = good.to_vec();
        for _ in 0..next(5) {
            let at = next(packet.len());
            packet[at] = [next(256) as u8, 0, 0xc0, 0xff][next(4)];
        }
        packet.truncate(packet.len() - next(packet.len()) * usize::from(next(4) == 0));
        let mut buffer = [0; 1232];
        let length = match wire::read(&packet) {
            Ok(query) => {
                let mut reply = Reply::new(&query, &mut buffer, query.udp_limit());
                zone.answer(&query, &mut reply, next(9));
                reply.finish()
            }
            Err(refused) => Reply::refuse(&refused, &mut buffer),
        };
        if length > 0 {
            answered += 1;
            Peer::from_vec(&buffer[..length]).unwrap_or_else(|error| panic!("{error}: {packet:?}"));
            // And as an upstream's, with a byte that is not right.
            let at = next(length);
            buffer[at] ^= 1 << next(8);
            if let Ok(message) = Message::read(&buffer[..length]) {
                for record in message.records().flatten() {
                    message.data(&record, &mut [0; 1024]).ok();
                }
            }
        }
    }
    assert!(answered > PACKETS / 4, "{answered}");
}
