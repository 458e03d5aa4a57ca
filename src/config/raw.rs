//! The configuration as people write it: sections with unknown keys denied, the environment laid over the file.
//!
//! Invariant: a fault in one section hides none in another.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Sections whose keys the environment can set.
const SECTIONS: [&str; 7] = ["database", "amqp", "files", "results", "engine", "work", "http"];
/// Variables of other parts of the program that begin alike.
const OTHERS: [&str; 11] = [
    "APBD_LOG",
    "APBD_LOG_FORMAT",
    "APBD_MODEL",
    "APBD_FAILPOINT",
    "APBD_BACKEND",
    "APBD_REQUIRE_GPU",
    "APBD_NCCL_LIBRARY",
    "APBD_PEER_MEMORY",
    "APBD_NODE",
    "APBD_HUB_TOKEN",
    HUB_ADDRESS,
];
/// Where the nodes of a group meet, where its section does not say it: what a scheduler knows that starts the nodes.
const HUB_ADDRESS: &str = "APBD_HUB_ADDRESS";

macro_rules! section {
    ($(#[doc = $doc:literal])+ $name:ident { $($key:ident: $type:ty,)+ }) => {
        $(#[doc = $doc])+
        #[derive(Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name { $(pub $key: Option<$type>,)+ }
    };
}

section! {
    /// Where jobs and results are.
    Database { url: String, url_file: PathBuf, }
}
section! {
    /// The queue.
    Amqp {
        url: String, url_file: PathBuf, ca_file: PathBuf, queue: String, dead_letter_exchange: String,
        dead_letter_queue: String, delivery_limit: u32, declare: bool, reply_targets: Vec<String>, window: u64,
        prefetch: u16, max_message_bytes: usize,
    }
}
section! {
    /// Folders that `file://` may name.
    Files { folders: Vec<PathBuf>, }
}
section! {
    /// The model and its process.
    Engine {
        model: PathBuf, heads: PathBuf, backend: String, kv_cache: String, ranks: usize, threads: usize, names: Vec<String>, command: Vec<String>,
        start_within_s: u64, silence_floor_s: u64, silence_factor: f64,
    }
}
section! {
    /// Devices that work on documents together.
    Group {
        name: String, gpus: Vec<usize>, cpu_threads: usize, ranks: usize, model: PathBuf, command: Vec<String>,
        nodes: usize, address: String, listen: String, nodes_within_s: u64,
    }
}
section! {
    /// How jobs are worked on.
    Work {
        lease_s: u64, ahead: usize, poll_ms: u64, grace_s: u64, max_document_bytes: u64, max_attempts: u32,
        max_infra_failures: u32,
    }
}
section! {
    /// Health and metrics.
    Http { listen: String, }
}
section! {
    /// A named object store.
    Store {
        alias: String, endpoint: String, region: String, access_key_id: String, access_key_id_file: PathBuf,
        secret_access_key: String, secret_access_key_file: PathBuf, anonymous: bool, allow_http: bool,
        allowed: Vec<String>, silence_s: u64,
    }
}
section! {
    /// Where results are also written.
    Results { at: String, }
}
section! {
    /// A prefix or folder whose files become jobs.
    Drop {
        at: String, task: String, instruction: String, template: String, model: String, priority: u8,
        schema: toml::Table, schema_file: PathBuf, profile: BTreeMap<String, Profile>, settle_s: u64, poll_s: u64,
        sidecar: String, events_queue: String, after: String, tag: String, move_to: String, failed_to: String,
    }
}
section! {
    /// What to do with files below one folder of the place.
    Profile {
        task: String, instruction: String, template: String, model: String, priority: u8, schema: toml::Table,
        schema_file: PathBuf,
    }
}

/// All of it.
#[derive(Default)]
pub struct Raw {
    pub database: Database,
    pub amqp: Option<Amqp>,
    pub files: Files,
    pub results: Results,
    pub engine: Engine,
    /// With their places in the list.
    pub groups: Vec<(usize, Group)>,
    /// Of groups on several nodes that do not say it themselves.
    pub hub_address: Option<String>,
    pub work: Work,
    pub http: Http,
    pub stores: Vec<Store>,
    pub drops: Vec<Drop>,
}

impl Raw {
    /// Reads what is readable, and says what is not.
    pub fn read(text: &str, environment: &BTreeMap<String, String>, faults: &mut Vec<String>) -> Self {
        let mut table = text.parse::<Table>().unwrap_or_else(|error| {
            faults.push(format!("not TOML: {}", error.message()));
            Table::new()
        });
        overlay(&mut table, environment, faults);
        let raw = Self {
            database: take(&mut table, "database", faults).unwrap_or_default(),
            amqp: take(&mut table, "amqp", faults),
            files: take(&mut table, "files", faults).unwrap_or_default(),
            results: take(&mut table, "results", faults).unwrap_or_default(),
            engine: take(&mut table, "engine", faults).unwrap_or_default(),
            groups: take_groups(&mut table, faults),
            hub_address: environment.get(HUB_ADDRESS).cloned(),
            work: take(&mut table, "work", faults).unwrap_or_default(),
            http: take(&mut table, "http", faults).unwrap_or_default(),
            stores: take_list(&mut table, "store", faults),
            drops: take_list(&mut table, "drop", faults),
        };
        faults.extend(table.keys().map(|key| format!("[{key}]: unknown section")));
        raw
    }
}

fn take<T: DeserializeOwned>(table: &mut Table, name: &str, faults: &mut Vec<String>) -> Option<T> {
    let value = table.remove(name)?;
    value.try_into().map_err(|error: toml::de::Error| faults.push(format!("[{name}]: {}", error.message()))).ok()
}

/// `[[pool.group]]`, which is all that `[pool]` has.
fn take_groups(table: &mut Table, faults: &mut Vec<String>) -> Vec<(usize, Group)> {
    let Some(pool) = table.remove("pool") else { return Vec::new() };
    let Value::Table(mut pool) = pool else {
        faults.push("[pool]: write [[pool.group]], there may be several".to_owned());
        return Vec::new();
    };
    let groups = take_numbered(&mut pool, "group", "pool.group", faults);
    faults.extend(pool.keys().map(|key| format!("[pool] {key}: unknown; a pool has [[pool.group]] alone")));
    groups
}

fn take_list<T: DeserializeOwned>(table: &mut Table, name: &str, faults: &mut Vec<String>) -> Vec<T> {
    take_numbered(table, name, name, faults).into_iter().map(|(_, item)| item).collect()
}

/// The list under `key`, which is called `name` in words; every item with its place, from 1.
fn take_numbered<T: DeserializeOwned>(
    table: &mut Table,
    key: &str,
    name: &str,
    faults: &mut Vec<String>,
) -> Vec<(usize, T)> {
    let Some(value) = table.remove(key) else { return Vec::new() };
    let Value::Array(items) = value else {
        faults.push(format!("[{name}]: write [[{name}]], there may be several"));
        return Vec::new();
    };
    let mut list = Vec::with_capacity(items.len());
    for (index, item) in items.into_iter().enumerate() {
        match item.try_into() {
            Ok(item) => list.push((index + 1, item)),
            Err(error) => faults.push(format!("[[{name}]] {}: {}", index + 1, error.message())),
        }
    }
    list
}

/// `APBD_SECTION_KEY=value` is `key = value` in `[section]`.
fn overlay(table: &mut Table, environment: &BTreeMap<String, String>, faults: &mut Vec<String>) {
    for (name, text) in environment {
        let Some(rest) = name.strip_prefix("APBD_").filter(|_| !OTHERS.contains(&name.as_str())) else { continue };
        let known = SECTIONS.iter().find_map(|section| {
            let key = rest.to_ascii_lowercase().strip_prefix(section)?.strip_prefix('_')?.to_owned();
            Some((*section, key))
        });
        let Some((section, key)) = known else {
            faults.push(format!("{name}: names no section; expected APBD_SECTION_KEY"));
            continue;
        };
        let slot = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(slot) = slot {
            slot.insert(key, value_of(text));
        }
    }
}

/// A number, a truth value or a list as TOML has them; anything else is the text itself.
fn value_of(text: &str) -> Value {
    let read = format!("value = {text}").parse::<Table>().ok().and_then(|mut table| table.remove("value"));
    read.filter(|value| !value.is_datetime()).unwrap_or_else(|| Value::String(text.to_owned()))
}
