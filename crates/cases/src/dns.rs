//! Cluster DNS: objects of a cluster, questions, and what comes back. Responses are read by a library that has nothing
//! to do with the one that wrote them.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context as _, Result};
use hickory_proto::op::Message;
use podway_dns::{
    name::{Lower, Name},
    wire::{self, Reply, rtype},
    zone::{Found, PodNames, Zone, ZoneConfig},
};
use podway_model::{EndpointSlice, Namespace, Pod, Service};
use serde_json::Value;

use crate::{Tally, data};

/// Files with objects and questions.
const QUERIES: [&str; 8] = [
    "apex",
    "handler",
    "namespaces",
    "not-synced",
    "pods-insecure",
    "pods-verified",
    "preserve-case",
    "zonal-disabled",
];

/// Files about something else, and what.
const OTHER: [(&str, &str); 9] = [
    ("autopath.yaml", "search completion does not exist yet"),
    ("cache", "there is no cache yet"),
    ("change-detection.yaml", "about the functions that compare objects"),
    ("corefile-kubernetes-block.yaml", "Corefiles are not read"),
    ("metadata.yaml", "about labels that other plug-ins read"),
    ("multicluster.yaml", "ServiceImports have no names yet"),
    ("namespace-exposure.yaml", "about functions; the questions of namespaces.yaml ask for the same"),
    ("nsaddrs.yaml", "the server is not an endpoint of a Service: its addresses are configured"),
    ("parse-request.yaml", "about the function that takes names apart"),
];

/// Runs everything in the folder.
///
/// # Errors
/// Data that cannot be read.
pub fn run(folder: &Path) -> Result<Tally> {
    let mut tally = Tally::default();
    let folder = folder.join("coredns");
    for file in QUERIES {
        let suite = data::yaml(&folder.join(format!("{file}.yaml")))?;
        queries(file, &suite, &mut tally).with_context(|| file.to_owned())?;
    }
    for (file, why) in OTHER {
        tally.not_applicable(file, why);
    }
    Ok(tally)
}

fn queries(file: &str, suite: &Value, tally: &mut Tally) -> Result<()> {
    for (i, case) in data::list(suite, "cases")?.iter().enumerate() {
        let zone = zone(suite, case)?;
        let (name, qtype) = (data::text(case, "qname")?, data::text(case, "qtype")?);
        let title = format!("{file} {i}: {name} {qtype} ({})", data::text_or_empty(case, "notes"));
        let (found, packet) = ask(&zone, name, number(qtype)?)?;
        let message = Message::from_vec(&packet).with_context(|| title.clone())?;
        let mut mismatches = Vec::new();
        let mut compare = |what: &str, expected: Vec<String>, actual: Vec<String>| {
            if expected != actual {
                mismatches.push(format!("{what}: expected {expected:?}, was {actual:?}"));
            }
        };
        let rcode = format!("{:?}", message.metadata.response_code).to_uppercase();
        compare("rcode", vec![data::text(case, "rcode")?.to_owned()], vec![rcode]);
        // The target of an external name is for others to look up; of these cases, the first record is ours.
        let external = found != Found::Done;
        let mut expected = records(case, "answer")?;
        if external {
            expected.retain(|record| record.contains(" CNAME "));
        }
        compare("answer", expected, written(&message.answers));
        // A SERVFAIL has nothing to be remembered by.
        if data::text(case, "rcode")? != "SERVFAIL" {
            compare("authority", records(case, "ns")?, written(&message.authorities));
        }
        compare("additional", records(case, "extra")?, written(&message.additionals));
        tally.settle(&title, &mismatches);
    }
    Ok(())
}

/// The zone that the objects of a suite make.
fn zone(suite: &Value, case: &Value) -> Result<Zone> {
    let config = &suite["config"];
    let exposed: BTreeSet<String> = data::parsed(config, "namespaces_exposed")?.into_iter().collect();
    let zones: Vec<String> = data::parsed(config, "zones")?;
    let mut zone = Zone::new(ZoneConfig {
        zones: zones.iter().map(|zone| Name::parse(zone)).collect::<Result<_, _>>()?,
        ttl: u32::try_from(data::number(config, "ttl"))?,
        pods: match data::text(case, "pods_mode")? {
            "verified" => PodNames::Verified,
            "insecure" => PodNames::Insecure,
            _ => PodNames::Disabled,
        },
        exposed: (!exposed.is_empty()).then_some(exposed),
        name_servers: vec!["127.0.0.1".parse()?],
        serial: 1,
    });
    let absent: Vec<String> = data::parsed(config, "namespaces_absent")?;
    for object in data::list(suite, "objects")? {
        match data::text(object, "kind")? {
            "Namespace" => {
                let namespace = Namespace::parse(object)?;
                if !absent.contains(&namespace.name) {
                    zone.apply_namespace(&namespace);
                }
            }
            "Service" => zone.apply_service(&Service::parse(object)?),
            "EndpointSlice" => zone.apply_slice(&EndpointSlice::parse(object)?),
            _ => zone.apply_pod(&Pod::parse(object)?),
        }
    }
    if config.get("api_synced") != Some(&Value::Bool(false)) {
        zone.synced();
    }
    Ok(zone)
}

/// Asks without EDNS, and with room for every answer.
fn ask(zone: &Zone, name: &str, qtype: u16) -> Result<(Found, Vec<u8>)> {
    let mut packet = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    // In the case of the text, unlike names that are kept.
    for label in name.trim_end_matches('.').split('.') {
        packet.push(u8::try_from(label.len())?);
        packet.extend(label.as_bytes());
    }
    packet.extend([0]);
    packet.extend(qtype.to_be_bytes());
    packet.extend([0, 1]);
    let query = wire::read(&packet).ok().context("the question cannot be read")?;
    debug_assert_eq!(Lower::from_wire(&packet[12..]), Some(query.name));
    let mut buffer = vec![0; 4096];
    let mut reply = Reply::new(&query, &mut buffer, 4096);
    let found = zone.answer(&query, &mut reply, 0);
    let length = reply.finish();
    buffer.truncate(length);
    Ok((found, buffer))
}

fn number(qtype: &str) -> Result<u16> {
    Ok(match qtype {
        "A" => rtype::A,
        "AAAA" => rtype::AAAA,
        "CNAME" => rtype::CNAME,
        "HINFO" => rtype::HINFO,
        "NS" => rtype::NS,
        "PTR" => rtype::PTR,
        "SOA" => rtype::SOA,
        "SRV" => rtype::SRV,
        "TXT" => rtype::TXT,
        other => anyhow::bail!("type {other} is not known"),
    })
}

/// Expected records, sorted. Of a SOA record upstream compares owner, TTL and the first name.
fn records(case: &Value, field: &str) -> Result<Vec<String>> {
    // Where upstream does not compare, what it really answered.
    let source = if case["observed"].is_object() { &case["observed"] } else { case };
    let mut all: Vec<String> = data::parsed(source, field)?;
    all.iter_mut().for_each(|record| *record = normal(record));
    all.sort();
    Ok(all)
}

fn written(records: &[hickory_proto::rr::Record]) -> Vec<String> {
    let mut all: Vec<String> = records.iter().map(|record| normal(&record.to_string())).collect();
    all.sort();
    all
}

fn normal(record: &str) -> String {
    let words: Vec<&str> = record.split_whitespace().collect();
    let kept = if words.get(3) == Some(&"SOA") { 5 } else { words.len() };
    words[..kept.min(words.len())].join(" ").replace('"', "")
}
