//! What a runtime can get wrong, and the code and the words it is told. No agent listens here: whatever would
//! get that far ends with "try again" (or 50 for STATUS).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;

use podway_cni::code;
use podway_cni::plugin::run;
use serde_json::{Value, json};

const SOCKET: &str = "/nonexistent/podway/agent.sock";

fn environment(command: &str) -> BTreeMap<&'static str, OsString> {
    BTreeMap::from([
        ("CNI_COMMAND", command.into()),
        ("CNI_CONTAINERID", "c0ffee".into()),
        ("CNI_IFNAME", "eth0".into()),
        ("CNI_NETNS", "/nonexistent/netns".into()),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b".into()),
        ("CNI_PATH", "/opt/cni/bin".into()),
    ])
}

fn config() -> Value {
    json!({ "cniVersion": "1.1.0", "name": "podway", "type": "podway-cni", "socket": SOCKET })
}

/// The configuration with one field set to a value, or removed by null.
fn with(field: &str, value: Value) -> Value {
    let mut config = config();
    if value.is_null() {
        config.as_object_mut().map(|config| config.remove(field));
    } else {
        config[field] = value;
    }
    config
}

fn fails(environment: &BTreeMap<&'static str, OsString>, input: &[u8]) -> Value {
    let (output, success) = run(|name| environment.get(name).cloned(), input);
    let error = output.unwrap_or_default();
    assert!(!success, "must fail, gave {error}");
    assert!(error["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "no msg: {error}");
    assert!(error["cniVersion"].is_string(), "no cniVersion: {error}");
    error
}

fn text(error: &Value) -> String {
    format!(
        "{} | {}",
        error["msg"].as_str().unwrap_or_default(),
        error["details"].as_str().unwrap_or_default()
    )
}

#[track_caller]
fn expect(case: &str, error: &Value, code: u32, words: &[&str]) {
    assert_eq!(error["code"], code, "{case}: {error}");
    for word in words {
        assert!(text(error).contains(word), "{case}: {word:?} is not in {error}");
    }
}

#[test]
fn environment_variables_are_checked_and_named() {
    let long = "x".repeat(201);
    let cases: &[(&str, &str, Option<&str>, &[&str])] = &[
        ("ADD", "CNI_COMMAND", None, &["CNI_COMMAND"]),
        ("ADD", "CNI_COMMAND", Some(""), &["CNI_COMMAND"]),
        (
            "ADD",
            "CNI_COMMAND",
            Some("add"),
            &["CNI_COMMAND", "add", "ADD, DEL, CHECK, GC, STATUS or VERSION"],
        ),
        ("ADD", "CNI_COMMAND", Some("UPDATE"), &["CNI_COMMAND", "UPDATE"]),
        ("ADD", "CNI_CONTAINERID", None, &["CNI_CONTAINERID", "ADD"]),
        ("DEL", "CNI_CONTAINERID", Some(""), &["CNI_CONTAINERID", "DEL"]),
        ("CHECK", "CNI_CONTAINERID", None, &["CNI_CONTAINERID", "CHECK"]),
        ("ADD", "CNI_CONTAINERID", Some("-a"), &["CNI_CONTAINERID", "-a"]),
        ("ADD", "CNI_CONTAINERID", Some("a/../b"), &["CNI_CONTAINERID", "a/../b"]),
        ("DEL", "CNI_CONTAINERID", Some("ä"), &["CNI_CONTAINERID"]),
        ("ADD", "CNI_CONTAINERID", Some("a b"), &["CNI_CONTAINERID"]),
        ("ADD", "CNI_CONTAINERID", Some("a\nb"), &["CNI_CONTAINERID"]),
        ("ADD", "CNI_CONTAINERID", Some(&long), &["CNI_CONTAINERID", "200"]),
        ("ADD", "CNI_IFNAME", None, &["CNI_IFNAME"]),
        ("DEL", "CNI_IFNAME", None, &["CNI_IFNAME"]),
        ("ADD", "CNI_IFNAME", Some("sixteen-bytes-xx"), &["CNI_IFNAME", "1 to 15"]),
        ("ADD", "CNI_IFNAME", Some("eth/0"), &["CNI_IFNAME", "'/'"]),
        ("ADD", "CNI_IFNAME", Some("eth:0"), &["CNI_IFNAME", "':'"]),
        ("ADD", "CNI_IFNAME", Some("e 0"), &["CNI_IFNAME", "white space"]),
        ("ADD", "CNI_IFNAME", Some(".."), &["CNI_IFNAME", "'..'"]),
        ("ADD", "CNI_NETNS", None, &["CNI_NETNS"]),
        ("CHECK", "CNI_NETNS", Some(""), &["CNI_NETNS"]),
        ("ADD", "CNI_NETNS", Some("run/netns/x"), &["CNI_NETNS", "absolute"]),
        ("DEL", "CNI_NETNS", Some("x"), &["CNI_NETNS", "absolute"]),
        ("ADD", "CNI_ARGS", Some("K8S_POD_NAME"), &["CNI_ARGS", "K8S_POD_NAME", "KEY=value"]),
        ("ADD", "CNI_ARGS", Some("=x"), &["CNI_ARGS", "KEY=value"]),
        ("ADD", "CNI_ARGS", Some("A=1;A=2"), &["CNI_ARGS", "A is there twice"]),
    ];
    for (command, name, value, words) in cases {
        let mut environment = environment(command);
        match value {
            Some(value) => environment.insert(name, value.into()),
            None => environment.remove(name),
        };
        let error = fails(&environment, config().to_string().as_bytes());
        expect(&format!("{command} {name}={value:?}"), &error, code::INVALID_ENVIRONMENT, words);
    }
    // All that is missing is named at once.
    let only = BTreeMap::from([("CNI_COMMAND", OsString::from("ADD"))]);
    let error = fails(&only, b"");
    expect("all", &error, code::INVALID_ENVIRONMENT, &["CNI_CONTAINERID, CNI_IFNAME, CNI_NETNS"]);
    // Not UTF-8.
    for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS"] {
        let mut environment = environment("ADD");
        environment.insert(name, OsString::from_vec(vec![b'a', 0xff]));
        expect(name, &fails(&environment, b"{}"), code::INVALID_ENVIRONMENT, &[name, "UTF-8"]);
    }
    // The longest CNI_ARGS.
    let mut environment = environment("ADD");
    environment.insert("CNI_ARGS", format!("A={}", "x".repeat(64 << 10)).into());
    expect("long", &fails(&environment, b"{}"), code::INVALID_ENVIRONMENT, &["CNI_ARGS", "65536"]);
}

#[test]
fn what_is_no_json_object_cannot_be_decoded() {
    let cases: &[(&str, Vec<u8>, &str)] = &[
        ("empty", vec![], "empty"),
        ("blank", b" \n\t ".to_vec(), "empty"),
        ("text", b"hello".to_vec(), "no JSON"),
        ("torn", b"{\"cniVersion\":\"1.1.0\"".to_vec(), "no JSON"),
        ("two documents", b"{}{}".to_vec(), "no JSON"),
        ("a list", b"[]".to_vec(), "no JSON object"),
        ("a number", b"7".to_vec(), "no JSON object"),
        ("null", b"null".to_vec(), "no JSON object"),
        ("not UTF-8", b"{\"name\":\"\xff\"}".to_vec(), "no JSON"),
        ("deep", [b"[".repeat(100_000), b"]".repeat(100_000)].concat(), "no JSON"),
        (
            "large",
            [b"{\"a\":\"".to_vec(), b"x".repeat(600 << 10), b"\"}".to_vec()].concat(),
            "larger than 524288",
        ),
    ];
    for (case, input, word) in cases {
        for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
            let error = fails(&environment(command), input);
            expect(&format!("{command} {case}"), &error, code::DECODE, &[word]);
            assert_eq!(error["cniVersion"], "1.1.0");
        }
    }
}

#[test]
fn standard_input_that_breaks_is_an_input_output_error() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the pipe burst"))
        }
    }
    let environment = environment("ADD");
    let (output, success) = run(|name| environment.get(name).cloned(), Broken);
    assert!(!success);
    expect("broken", &output.unwrap_or_default(), code::IO, &["the pipe burst"]);
}

#[test]
fn versions_and_what_they_do_not_have_are_refused() {
    for version in ["0.1.0", "0.2.0", "0.3.0", "1.2.0", "2.0.0", "", "1.1", "v1.1.0", " 1.1.0"] {
        for command in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
            let error =
                fails(&environment(command), with("cniVersion", json!(version)).to_string().as_bytes());
            let words = [&format!("{version:?}"), "0.3.1, 0.4.0, 1.0.0, 1.1.0"];
            expect(&format!("{command} {version}"), &error, code::INCOMPATIBLE_VERSION, &words);
        }
    }
    let error = fails(&environment("ADD"), with("cniVersion", Value::Null).to_string().as_bytes());
    expect("missing", &error, code::INCOMPATIBLE_VERSION, &["cniVersion is missing", "1.1.0"]);
    let error = fails(&environment("ADD"), with("cniVersion", json!(1.1)).to_string().as_bytes());
    expect("number", &error, code::INVALID_CONFIG, &["cniVersion", "1.1", "a string"]);

    let lacking = [
        ("0.3.1", "CHECK"),
        ("0.3.1", "GC"),
        ("0.4.0", "GC"),
        ("1.0.0", "GC"),
        ("0.3.1", "STATUS"),
        ("1.0.0", "STATUS"),
    ];
    for (version, command) in lacking {
        let error = fails(&environment(command), with("cniVersion", json!(version)).to_string().as_bytes());
        let words = [&format!("{version} has no {command}"), "came with"];
        expect(&format!("{version} {command}"), &error, code::INCOMPATIBLE_VERSION, &words);
        assert_eq!(error["cniVersion"], version, "the answer is in the version of the question");
    }
}

#[test]
fn fields_are_checked_and_named() {
    let cases: &[(&str, &str, Value, u32, &[&str])] = &[
        ("ADD", "name", Value::Null, code::INVALID_CONFIG, &["name is missing"]),
        ("DEL", "name", Value::Null, code::INVALID_CONFIG, &["name is missing", "DEL"]),
        ("ADD", "name", json!(7), code::INVALID_CONFIG, &["name", "7", "a string"]),
        ("ADD", "name", json!(""), code::INVALID_CONFIG, &["name \"\""]),
        ("ADD", "name", json!("../etc"), code::INVALID_CONFIG, &["name", "../etc"]),
        ("ADD", "socket", json!("agent.sock"), code::INVALID_CONFIG, &["socket", "absolute"]),
        ("DEL", "socket", json!(["/a"]), code::INVALID_CONFIG, &["socket", "absolute"]),
        ("STATUS", "socket", json!(""), code::INVALID_CONFIG, &["socket"]),
        ("ADD", "dns", json!("1.1.1.1"), code::INVALID_CONFIG, &["dns", "nameservers"]),
        ("ADD", "dns", json!({ "nameservers": 1 }), code::INVALID_CONFIG, &["dns", "nameservers"]),
        ("ADD", "prevResult", json!("x"), code::INVALID_CONFIG, &["prevResult"]),
        ("ADD", "prevResult", json!({ "ips": {} }), code::INVALID_CONFIG, &["prevResult.ips", "list"]),
        ("ADD", "prevResult", json!({ "interfaces": 1 }), code::INVALID_CONFIG, &["prevResult.interfaces"]),
        ("ADD", "prevResult", json!({ "routes": "x" }), code::INVALID_CONFIG, &["prevResult.routes"]),
        ("CHECK", "prevResult", Value::Null, code::INVALID_CONFIG, &["prevResult is missing", "CHECK"]),
        ("CHECK", "prevResult", json!({ "ips": [{}] }), code::INVALID_CONFIG, &["prevResult.ips[0].address"]),
        (
            "CHECK",
            "prevResult",
            json!({ "ips": [{ "address": "10.0.0.1" }] }),
            code::INVALID_CONFIG,
            &["ips[0]", "10.0.0.1"],
        ),
        (
            "GC",
            "cni.dev/valid-attachments",
            Value::Null,
            code::INVALID_CONFIG,
            &["cni.dev/valid-attachments is missing"],
        ),
        (
            "GC",
            "cni.dev/valid-attachments",
            json!({}),
            code::INVALID_CONFIG,
            &["cni.dev/valid-attachments", "list"],
        ),
        (
            "GC",
            "cni.dev/valid-attachments",
            json!([{ "containerID": "a" }]),
            code::INVALID_CONFIG,
            &["valid-attachments[0]"],
        ),
        (
            "GC",
            "cni.dev/valid-attachments",
            json!([{ "containerID": "a", "ifname": "b" }, { "containerID": "/", "ifname": "b" }]),
            code::INVALID_CONFIG,
            &["valid-attachments[1]"],
        ),
        ("ADD", "sockett", json!("/a"), code::UNSUPPORTED_FIELD, &["sockett", "/a", "known fields"]),
        ("CHECK", "mtu", json!(1500), code::UNSUPPORTED_FIELD, &["mtu", "1500"]),
        ("STATUS", "bridge", json!("cni0"), code::UNSUPPORTED_FIELD, &["bridge", "cni0"]),
        (
            "ADD",
            "ipam",
            json!({ "type": "host-local" }),
            code::UNSUPPORTED_FIELD,
            &["ipam", "host-local", "leases"],
        ),
        ("ADD", "ipMasq", json!(true), code::UNSUPPORTED_FIELD, &["ipMasq", "true", "agent"]),
        (
            "ADD",
            "capabilities",
            json!({ "portMappings": true, "mac": true }),
            code::UNSUPPORTED_FIELD,
            &["capabilities.mac", "portMappings and bandwidth", "chain"],
        ),
        (
            "ADD",
            "runtimeConfig",
            json!({ "mac": "00:11:22:33:44:55" }),
            code::UNSUPPORTED_FIELD,
            &["00:11:22:33:44:55"],
        ),
        (
            "ADD",
            "runtimeConfig",
            json!({ "portMappings": [{ "hostPort": 0, "containerPort": 80 }] }),
            code::INVALID_CONFIG,
            &["runtimeConfig.portMappings[0].hostPort", "1 to 65535"],
        ),
    ];
    for (command, field, value, code, words) in cases {
        let error = fails(&environment(command), with(field, value.clone()).to_string().as_bytes());
        expect(&format!("{command} {field}={value}"), &error, *code, words);
    }
    // A long value is cut, also in the middle of a letter.
    let error = fails(&environment("ADD"), with("socket", json!("ä".repeat(5000))).to_string().as_bytes());
    assert!(text(&error).len() < 400, "{}", text(&error).len());
}

#[test]
fn what_asks_for_nothing_is_let_through() {
    let fields = [
        ("ipam", json!({})),
        ("ipMasq", json!(false)),
        ("capabilities", json!({ "portMappings": true, "bandwidth": true, "ips": false })),
        ("runtimeConfig", json!({ "portMappings": [] })),
        ("example.org/note", json!("anything")),
        ("args", json!({ "labels": [] })),
        ("dns", json!({ "nameservers": ["10.96.0.10"], "search": ["a.b"] })),
        ("prevResult", json!({ "cniVersion": "1.1.0" })),
    ];
    for (field, value) in fields {
        let error = fails(&environment("STATUS"), with(field, value.clone()).to_string().as_bytes());
        expect(&format!("{field}={value}"), &error, code::NOT_AVAILABLE, &[SOCKET]);
    }
    // Whatever else a configuration has become: what is there must be removable.
    let error = fails(&environment("DEL"), with("bridge", json!("cni0")).to_string().as_bytes());
    expect("DEL", &error, code::TRY_AGAIN, &[SOCKET]);
}

#[test]
fn the_namespace_must_be_that_of_a_container() {
    let directory = tempfile::tempdir().map(tempfile::TempDir::keep).unwrap_or_default();
    let file = directory.join("file");
    let fifo = directory.join("fifo");
    let made = std::fs::write(&file, "").is_ok()
        && rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).is_ok();
    assert!(made);
    let [file, fifo] = [file, fifo].map(|path| path.to_string_lossy().into_owned());
    let check = with("prevResult", json!({ "ips": [] })).to_string();
    let add = config().to_string();
    let cases = [
        ("ADD", "/nonexistent/netns", code::INVALID_ENVIRONMENT, "cannot be opened"),
        ("CHECK", "/nonexistent/netns", code::UNKNOWN_CONTAINER, "cannot be opened"),
        ("ADD", file.as_str(), code::INVALID_ENVIRONMENT, "no network namespace"),
        ("CHECK", file.as_str(), code::UNKNOWN_CONTAINER, "no network namespace"),
        ("ADD", fifo.as_str(), code::INVALID_ENVIRONMENT, "no network namespace"),
        ("ADD", "/proc/self/ns/net", code::INVALID_ENVIRONMENT, "node's own"),
        ("CHECK", "/proc/thread-self/ns/net", code::INVALID_ENVIRONMENT, "node's own"),
    ];
    for (command, netns, code, word) in cases {
        let mut environment = environment(command);
        environment.insert("CNI_NETNS", netns.into());
        let input = if command == "ADD" { &add } else { &check };
        expect(
            &format!("{command} {netns}"),
            &fails(&environment, input.as_bytes()),
            code,
            &["CNI_NETNS", word],
        );
    }
    assert!(std::fs::remove_dir_all(&directory).is_ok());
}

#[test]
fn version_answers_whoever_asks() {
    let environment = BTreeMap::from([("CNI_COMMAND", OsString::from("VERSION"))]);
    let all = json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    for (input, version) in [
        ("", "1.1.0"),
        ("{}", "1.1.0"),
        (r#"{"cniVersion":"0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion":"9.9.9"}"#, "9.9.9"),
        (r#"{"cniVersion":"1.0.0","name":7}"#, "1.0.0"),
    ] {
        let (output, success) = run(|name| environment.get(name).cloned(), input.as_bytes());
        assert!(success, "{input}: {output:?}");
        assert_eq!(output, Some(json!({ "cniVersion": version, "supportedVersions": all })), "{input}");
    }
    expect("garbage", &fails(&environment, b"garbage"), code::DECODE, &["no JSON"]);
    expect("number", &fails(&environment, br#"{"cniVersion":1}"#), code::INVALID_CONFIG, &["cniVersion"]);
}
