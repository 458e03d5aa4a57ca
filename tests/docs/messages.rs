//! The job message and the properties beside it.

use std::collections::{BTreeMap, BTreeSet};

use apbd::job::task::Overflow;
use apbd::job::wire::{AttentionMessage, DocumentMessage, ModeMessage, VERSION};
use apbd::job::{Job, JobId, JobMessage, MessageError, MessageLimits, Task};
use serde_json::{Value, json};

use crate::text::{Table, read, shipped, sources, words_after};

pub const PAGE: &str = "deploy/PRODUCERS.md";

/// A message with every key there is: a new one does not compile before it is here, and then fails before it is in the table.
pub fn full() -> JobMessage {
    JobMessage {
        version: VERSION,
        job_id: Some(JobId::derive(&[b"full"])),
        task: Task::Extract,
        documents: vec![DocumentMessage {
            uri: "file:///any".to_owned(),
            version_id: Some("1".to_owned()),
            etag: Some("e".to_owned()),
            media_type: Some("text/plain".to_owned()),
        }],
        instruction: Some("Dates as written.".to_owned()),
        template: Some("extract@1".to_owned()),
        schema: Some(json!({})),
        model: Some("m".to_owned()),
        attention: Some(AttentionMessage {
            mode: Some(ModeMessage::Apb),
            hosts: Some(8),
            anchor: Some(100),
            passing: Some(50),
            kv_budget: Some(400),
        }),
        max_new_tokens: Some(10),
        temperature: Some(0.5),
        seed: Some(1),
        priority: Some(5),
        deadline: Some("2030-01-01T00:00:00Z".parse().expect("a time")),
        overflow: Some(Overflow::TruncateMiddle),
        labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
    }
}

/// Keys of a value in depth, `a.b` and `a[].b`; what is below the keys of `closed` is not looked at.
pub fn keys(value: &Value, closed: &[&str]) -> BTreeSet<String> {
    fn add(value: &Value, at: &str, closed: &[&str], found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(name, field)| {
                let path = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
                if !closed.contains(&path.as_str()) {
                    add(field, &path, closed, found);
                }
                found.insert(path);
            }),
            Value::Array(items) => items.iter().for_each(|item| add(item, &format!("{at}[]"), closed, found)),
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    add(value, "", closed, &mut found);
    found
}

/// A small message with `path` set to `value`; `null` takes it away.
pub fn with(path: &str, value: Value) -> Value {
    let mut message = json!({ "version": 1, "task": "summarise", "documents": [{ "uri": "file:///any" }] });
    if path == "schema" {
        message["task"] = json!("extract");
    }
    let mut slot = &mut message;
    let (way, last) = path.rsplit_once('.').map_or((Vec::new(), path), |(way, last)| (way.split('.').collect(), last));
    for step in way {
        slot = match step.strip_suffix("[]") {
            Some(list) => &mut slot[list][0],
            None => &mut slot[step],
        };
    }
    match value {
        Value::Null => drop(slot.as_object_mut().and_then(|fields| fields.remove(last))),
        value => slot[last] = value,
    }
    message
}

fn check(message: &Value) -> Result<Job, MessageError> {
    let limits = MessageLimits::default();
    JobMessage::parse(message.to_string().as_bytes(), &limits)?.check(Some(JobId::derive(&[b"any"])), &limits)
}

#[test]
fn the_table_has_every_key_and_no_other() {
    let message = serde_json::to_value(full()).expect("JSON");
    assert_eq!(Table::of(PAGE, "key").names(), keys(&message, &["schema", "labels"]));
    assert!(check(&message).is_ok());
}

#[test]
fn every_limit_is_where_the_table_says() {
    let labels = |count: usize| json!((0..count).map(|i| (format!("k{i}"), json!("v"))).collect::<BTreeMap<_, _>>());
    let long = |count: usize| json!("x".repeat(count));
    let documents = |count: usize| json!(vec![json!({ "uri": "file:///any" }); count]);
    // Key, its bounds as the table has them, what is just within them, what is just outside.
    let cases = [
        ("version", "1", json!(1), json!(2)),
        ("job_id", "UUID", json!("6f9619ff-8b86-4d01-b42d-00c04fc964ff"), json!("1540")),
        ("task", "summarise", json!("summarise"), json!("read")),
        ("documents", "1 to 64", documents(64), documents(65)),
        ("documents", "1 to 64", documents(1), documents(0)),
        ("documents[].uri", "s3://STORE/BUCKET/KEY", json!("s3://main/b/k"), json!("https://b/k")),
        ("documents[].version_id", "1 to 1024 bytes", long(1024), long(1025)),
        ("documents[].etag", "1 to 1024 bytes", long(1024), long(1025)),
        ("documents[].media_type", "1 to 256 bytes", long(256), long(257)),
        ("instruction", "at most 16384 characters", json!("é".repeat(16384)), json!("é".repeat(16385))),
        ("template", "NAME@VERSION", json!("own@2"), json!("own")),
        ("schema", "a JSON Schema", json!({}), json!([])),
        ("model", "1 to 256 bytes", long(256), long(257)),
        ("model", "1 to 256 bytes", long(1), long(0)),
        ("attention", "the five keys below", json!({}), json!({ "selector": "random" })),
        ("attention.mode", "auto", json!("auto"), json!("fast")),
        ("attention.hosts", "1 to 4096", json!(4096), json!(4097)),
        ("attention.hosts", "1 to 4096", json!(1), json!(0)),
        ("attention.anchor", "0 to 16777216", json!(16_777_216), json!(16_777_217)),
        ("attention.kv_budget", "1 to 16777216", json!(16_777_216), json!(16_777_217)),
        ("attention.kv_budget", "1 to 16777216", json!(1), json!(0)),
        ("attention.passing", "0 to 16777216", json!(16_777_216), json!(16_777_217)),
        ("max_new_tokens", "1 to 65536", json!(65536), json!(65537)),
        ("max_new_tokens", "1 to 65536", json!(1), json!(0)),
        ("temperature", "0 to 10", json!(10), json!(10.1)),
        ("temperature", "0 to 10", json!(0), json!(-0.1)),
        ("seed", "0 to 18446744073709551615", json!(u64::MAX), json!(-1)),
        ("priority", "0 to 9", json!(9), json!(10)),
        ("deadline", "9999", json!("9999-12-31T23:59:59Z"), json!("1969-12-31T23:59:59Z")),
        ("deadline", "RFC 3339", json!("2030-01-01T00:00:00+02:00"), json!("2030-01-01")),
        ("overflow", "truncate_middle", json!("truncate_middle"), json!("truncate")),
        ("labels", "at most 32", labels(32), labels(33)),
        ("labels", "keys of 1 to 64 bytes", json!({ "k".repeat(64): "v" }), json!({ "k".repeat(65): "v" })),
        ("labels", "at most 1024 characters", json!({ "k": "é".repeat(1024) }), json!({ "k": "é".repeat(1025) })),
    ];
    let table = Table::of(PAGE, "key");
    for (key, bounds, within, outside) in &cases {
        let cell = table.cell(key, "limits");
        assert!(cell.contains(bounds), "{key}: '{bounds}' is not in '{cell}'");
        let checked = check(&with(key, within.clone()));
        assert!(checked.is_ok(), "{key}: {within} is refused: {checked:?}");
        assert!(check(&with(key, outside.clone())).is_err(), "{key}: {outside} is taken");
    }
    let tried: BTreeSet<String> = cases.iter().map(|(key, ..)| (*key).to_owned()).collect();
    assert_eq!(tried, table.names(), "every key is tried");
}

#[test]
fn names_of_the_table_are_those_of_the_program() {
    let table = Table::of(PAGE, "key");
    for (key, names) in [
        ("task", vec!["summarise", "extract", "ask"]),
        ("attention.mode", vec!["auto", "full", "ring", "ulysses", "star", "apb"]),
        ("overflow", vec!["fail", "truncate_middle", "map_reduce"]),
    ] {
        for name in &names {
            assert!(table.cell(key, "limits").contains(&format!("`{name}`")), "{key}: {name}");
        }
        // The error of an unknown name tells all that there are.
        let error = check(&with(key, json!("?"))).expect_err("refused").to_string();
        let told: Vec<String> = crate::text::quoted(&error).into_iter().skip(1).collect();
        assert_eq!(told, names, "{key}: {error}");
    }
}

#[test]
fn what_is_absent_is_as_the_table_says() {
    let table = Table::of(PAGE, "key");
    for key in table.names() {
        let without = with(&key, Value::Null);
        let is_refused = check(&without).is_err();
        let says = table.cell(&key, "without it");
        assert_eq!(is_refused, says == "refused" || says == "refused for `extract`", "{key}: {says}");
    }
    let job = check(&with("seed", Value::Null)).expect("a job");
    let overflow = serde_json::to_value(job.overflow).expect("JSON");
    let defaults = [
        ("max_new_tokens", job.max_new_tokens.to_string()),
        ("temperature", job.temperature.to_string()),
        ("seed", job.seed.to_string()),
        ("priority", job.priority.get().to_string()),
        ("overflow", format!("`{}`", overflow.as_str().expect("a name"))),
    ];
    for (key, default) in defaults {
        assert_eq!(table.cell(key, "without it"), default, "{key}");
    }
    assert_eq!((table.cell("template", "without it"), job.template.to_string().as_str()), ("`TASK@1`", "summarise@1"));
    assert_eq!((table.cell("attention.mode", "without it"), job.attention.mode), ("`auto`", None));
    let limits = MessageLimits::default();
    let nobody = JobMessage::parse(with("seed", Value::Null).to_string().as_bytes(), &limits).expect("read");
    assert!(nobody.check(None, &limits).is_err(), "a job has an id");
}

#[test]
fn limits_of_a_whole_message_are_as_the_table_says() {
    let (table, limits) = (Table::of(PAGE, "limit of a message"), MessageLimits::default());
    assert!(table.cell("bytes", "value").starts_with(&format!("{} bytes", limits.bytes)));
    assert!(table.cell("depth", "value").starts_with(&format!("{} nested", limits.depth)));
}

#[test]
fn the_example_is_a_job() {
    let page = read(PAGE);
    let example = page.split("```json").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let message: Value = serde_json::from_str(example).expect("JSON");
    assert!(check(&message).is_ok(), "{:?}", check(&message));
    let mut again = message.clone();
    again["seed"] = Value::Null;
    assert_eq!(check(&message).expect("a job").payload_digest, check(&again).expect("a job").payload_digest);
    assert!(check(&with("labels", json!(1))).is_err());
}

#[test]
fn properties_and_headers_are_those_that_are_read_and_written() {
    let name = |c: char| c.is_ascii_lowercase() || c == '_';
    let written = words_after(&shipped("src/intake/amqp/publisher.rs"), ".with_", name);
    let read = words_after(&shipped("src/intake/amqp/delivery.rs"), "(properties.", name);
    let mut used: BTreeSet<String> = written.union(&read).cloned().collect();
    assert!(used.remove("headers"), "dead letters have headers");
    assert_eq!(Table::of(PAGE, "property").names(), used);
    let code: String = sources("src").iter().map(|path| shipped(path)).collect();
    let headers = words_after(&code, "\"x-apbd-", |c| name(c) || c == '-');
    let headers: BTreeSet<String> = headers.into_iter().map(|rest| format!("x-apbd-{rest}")).collect();
    assert_eq!(Table::of(PAGE, "header").names(), headers);
}
