use std::net::IpAddr;
use std::sync::Arc;

use podway_abi::events::{Event, EventKind, event_flags};
use podway_abi::{Addr, Hook, Reason};
use podway_model::{Labels, Pod, Service};
use serde_json::json;

use super::*;
use crate::flow::{Ended, Flow};
use crate::names::Names;
use crate::record::Clock;

fn names() -> Names {
    let mut names = Names::new();
    for (namespace, name, address, app) in [
        ("default", "web-1", "10.0.0.1", "web"),
        ("shop", "api-7", "10.0.0.2", "api"),
        ("shop", "db", "fd00::3", "db"),
    ] {
        names.set_pod(
            Pod {
                namespace: namespace.into(),
                name: name.into(),
                labels: [("app".to_owned(), app.to_owned())].into_iter().collect::<Labels>(),
                addresses: vec![address.parse().unwrap()],
                node: "n1".into(),
                ..Pod::default()
            },
            0,
        );
    }
    let service = Service::parse(&json!({"metadata": {"name": "api", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.0.7", "ports": [{"name": "http", "port": 80}]}}));
    names.set_service(&service.unwrap());
    names
}

fn addr(text: &str) -> Addr {
    Addr::from(text.parse::<IpAddr>().unwrap())
}

/// web-1 to api-7 by its service.
fn start() -> Event {
    Event {
        time_ns: 5_000_000_000,
        created_ns: 1_000_000_000,
        packets: [1, 0],
        bytes: [60, 0],
        src: addr("10.0.0.1"),
        dst: addr("10.0.0.2"),
        asked: addr("10.96.0.7"),
        src_port: 40_000,
        dst_port: 8080,
        asked_port: 80,
        ifindex: 3,
        proto: 6,
        kind: EventKind::Start as u8,
        hook: Hook::FromPod as u8,
        reason: Reason::Delivered as u8,
        tcp_flags: 2,
        flags: event_flags::PARSED | event_flags::SERVICE,
        ..Event::default()
    }
}

/// Something from beyond the cluster to db, refused.
fn drop() -> Event {
    Event {
        src: addr("2001:db8::1"),
        dst: addr("fd00::3"),
        src_port: 5,
        dst_port: 53,
        proto: 17,
        kind: EventKind::Drop as u8,
        hook: Hook::FromUplink as u8,
        reason: Reason::OwnSource as u8,
        flags: event_flags::PARSED,
        ..Event::default()
    }
}

/// A packet of web-1 that could not be read.
fn unread() -> Event {
    Event { kind: EventKind::Drop as u8, reason: Reason::Malformed as u8, ifindex: 3, ..Event::default() }
}

fn records() -> [Record; 4] {
    let names = names();
    let clock = Clock { offset: 1_000_000_000_000_000_000 };
    let web = names.at(&addr("10.0.0.1"), 1).cloned();
    let end = Event {
        kind: EventKind::End as u8,
        reason: 0,
        packets: [3, 2],
        bytes: [300, 200],
        flags: event_flags::PARSED | event_flags::RESET,
        ..start()
    };
    [
        Record::join(&start(), clock, &names, web.as_ref()),
        Record::join(&end, clock, &names, None),
        Record::join(&drop(), clock, &names, None),
        Record::join(&unread(), clock, &names, web.as_ref()),
    ]
}

/// Which of the four records a filter finds.
fn found(spec: serde_json::Value) -> String {
    let spec: FilterSpec = serde_json::from_value(spec).unwrap();
    let filter = Filter::parse(&spec).unwrap();
    records().iter().zip(["s", "e", "d", "u"]).filter(|(r, _)| filter.matches(r)).map(|(_, l)| l).collect()
}

#[test]
fn filters_find_what_they_say() {
    for (spec, want) in [
        (json!({}), "sedu"),
        (json!({"verdict": ["dropped"]}), "du"),
        (json!({"verdict": ["FORWARDED"]}), "se"),
        (json!({"verdict": ["dropped", "forwarded"]}), "sedu"),
        (json!({"event": ["end"]}), "e"),
        (json!({"pod": ["web"]}), "seu"),
        (json!({"pod": ["default/web-1"]}), "seu"),
        (json!({"pod": ["shop/"]}), "sed"),
        (json!({"pod": ["api"]}), ""),
        (json!({"fromPod": ["default/web"]}), "seu"),
        (json!({"toPod": ["default/web"]}), ""),
        (json!({"toPod": ["shop/api"]}), "se"),
        (json!({"fromPod": ["default/web"], "toPod": ["shop/db"]}), ""),
        (json!({"namespace": ["default"]}), "seu"),
        (json!({"namespace": ["shop", "other"]}), "sed"),
        (json!({"label": ["app=web"]}), "seu"),
        (json!({"label": ["app in (db, cache)"]}), "d"),
        (json!({"label": ["app=web,app!=web"]}), ""),
        (json!({"label": ["app notin (web,api,db)"]}), ""),
        (json!({"label": ["app==api", "app=db"]}), "sed"),
        (json!({"label": ["!app"]}), ""),
        (json!({"label": ["app"]}), "sedu"),
        (json!({"service": ["shop/api"]}), "s"),
        (json!({"port": ["80"]}), "s"),
        (json!({"port": ["8080"]}), "se"),
        (json!({"port": ["53", "40000"]}), "sed"),
        (json!({"protocol": ["tcp"]}), "se"),
        (json!({"protocol": ["UDP"]}), "d"),
        (json!({"protocol": ["17"]}), "d"),
        (json!({"protocol": ["icmp"]}), ""),
        (json!({"ip": ["10.0.0.2"]}), "se"),
        (json!({"ip": ["10.96.0.0/16"]}), "s"),
        (json!({"ip": ["2001:db8::/32"]}), "d"),
        (json!({"ip": ["0.0.0.0/0"]}), "se"),
        (json!({"reason": ["own_source"]}), "d"),
        (json!({"reason": ["delivered", "malformed"]}), "su"),
        (json!({"reason": ["delivered"], "verdict": ["dropped"]}), ""),
    ] {
        assert_eq!(found(spec.clone()), want, "{spec}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_its_option() {
    for (spec, part) in [
        (json!({"verdict": ["allowed"]}), "--verdict \"allowed\": is no verdict"),
        (json!({"event": ["x"]}), "--event"),
        (json!({"pod": ["a/b/c"]}), "--pod \"a/b/c\": has more than one /"),
        (json!({"fromPod": [""]}), "--from-pod \"\": names nothing"),
        (json!({"toPod": ["/a"]}), "--to-pod"),
        (json!({"namespace": ["A b"]}), "--namespace"),
        (json!({"label": ["a in b"]}), "is no list"),
        (json!({"label": ["a in (b"]}), "without its )"),
        (json!({"label": [""]}), "is no label"),
        (json!({"label": ["a=b,,"]}), "is no label"),
        (json!({"port": ["70000"]}), "--port \"70000\": is no port"),
        (json!({"protocol": ["quic"]}), "--protocol"),
        (json!({"ip": ["10.0.0.0/33"]}), "--ip"),
        (json!({"reason": ["x"]}), "spoofed_address"),
    ] {
        let parsed: FilterSpec = serde_json::from_value(spec.clone()).unwrap();
        let error = Filter::parse(&parsed).unwrap_err().to_string();
        assert!(error.contains(part), "{spec}: {error}");
    }
    assert!(serde_json::from_value::<FilterSpec>(json!({"pods": []})).is_err(), "a typo is no filter");
}

#[test]
fn records_become_flows() {
    let flows: Vec<Flow> = records().iter().map(|r| Flow::of(r, "n1")).collect();
    let [start, end, dropped, unread] = &flows[..] else { panic!("four") };
    assert_eq!(start.time, "2001-09-09T01:46:45.000000000Z");
    assert_eq!((start.tcp_flags.as_deref(), start.reason.as_deref()), (Some("SYN"), Some("delivered")));
    let service = start.service.as_ref().unwrap();
    assert_eq!((service.name.as_deref(), service.port), (Some("api"), 80));
    assert_eq!(start.destination.as_ref().unwrap().pod.as_ref().unwrap().labels["app"], "api");
    assert_eq!((end.ended, end.duration_ms, end.reply_bytes), (Some(Ended::Reset), Some(4_000), Some(200)));
    assert!(end.reason.is_none() && dropped.duration_ms.is_none());
    assert_eq!(dropped.source.as_ref().unwrap().pod, None);
    assert_eq!(dropped.direction, crate::flow::Direction::Ingress);
    // The link says who it was, whatever the packet says.
    let source = unread.source.as_ref().unwrap();
    assert_eq!((source.ip, source.pod.as_ref().unwrap().name.as_str()), (None, "web-1"));
    assert!(unread.destination.is_none() && unread.protocol.is_none());
    for flow in &flows {
        let text = serde_json::to_string(flow).unwrap();
        assert_eq!(serde_json::from_str::<Flow>(&text).unwrap(), *flow, "{text}");
    }
}

#[test]
fn a_record_keeps_the_names_of_its_time() {
    let mut names = names();
    let clock = Clock { offset: 0 };
    let before = Record::join(&start(), clock, &names, None);
    names.remove_pod("default", "web-1", 2_000_000_000);
    names.set_pod(
        Pod {
            namespace: "x".into(),
            name: "new".into(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            ..Pod::default()
        },
        3_000_000_000,
    );
    assert_eq!(before.source.as_ref().map(|i| i.name.as_str()), Some("web-1"));
    // The flow began at 1 s and ends at 5 s.
    let end = Event { kind: EventKind::End as u8, ..start() };
    let end = Record::join(&end, clock, &names, None);
    assert_eq!(end.source.as_ref().map(|i| i.name.as_str()), Some("web-1"));
    let after = Record::join(&start(), clock, &names, None);
    assert_eq!(after.source.as_ref().map(|i| i.name.as_str()), Some("new"));
    assert!(Arc::ptr_eq(before.source.as_ref().unwrap(), end.source.as_ref().unwrap()));
}
