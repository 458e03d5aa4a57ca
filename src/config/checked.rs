//! From what people wrote to what the program uses.
//!
//! Invariant: the one place where defaults are, and where one section is held against another.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::groups::{self, GroupConfig};
use super::places;
use super::raw::{self, Raw};
use crate::document::fetch::{AllowedPrefix, Locations};
use crate::intake::amqp::{Admission, Broker, Topology};
use crate::intake::dropfolder::DropPlace;
use crate::job::retry::RetryPolicy;
use crate::job::{DocumentUri, MessageLimits};
use crate::objects::{Credentials, StoreOptions};
use crate::store::StoreUrl;

/// The whole configuration of `apbd serve`.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where jobs and results are.
    pub database: StoreUrl,
    /// The queue, if there is one.
    pub amqp: Option<AmqpConfig>,
    /// Object stores by alias.
    pub stores: Vec<StoreOptions>,
    /// What may be read.
    pub locations: Locations,
    /// The engine.
    pub engine: EngineConfig,
    /// How jobs are worked on.
    pub work: WorkConfig,
    /// Where health and metrics are served.
    pub listen: SocketAddr,
    /// Prefixes and folders whose files become jobs.
    pub drops: Vec<DropPlace>,
    /// Prefix or folder where results are also written.
    pub results: Option<DocumentUri>,
}

/// The queue.
#[derive(Debug, Clone)]
pub struct AmqpConfig {
    /// Broker.
    pub broker: Broker,
    /// Queues and exchanges.
    pub topology: Topology,
    /// When to stop taking in.
    pub admission: Admission,
    /// Sizes of messages.
    pub limits: MessageLimits,
    /// Where completion events may go.
    pub reply_targets: Vec<String>,
}

/// The model and its process.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Model directory; absent: the one that comes with the program.
    pub model: Option<PathBuf>,
    /// Retaining heads; absent: the model's own.
    pub heads: Option<PathBuf>,
    /// How keys and values are kept: `native` or `fp8`.
    pub kv_cache: String,
    /// Names by which jobs may ask for it; empty: any.
    pub names: Vec<String>,
    /// Time to load the model.
    pub start_within: Duration,
    /// Silence that is borne at least.
    pub silence_floor: Duration,
    /// Silence that is borne, in multiples of the predicted time.
    pub silence_factor: f64,
    /// The engines, one at least.
    pub groups: Vec<GroupConfig>,
}

/// How jobs are worked on.
#[derive(Debug, Clone)]
pub struct WorkConfig {
    /// How long a job stays a worker's without a heartbeat.
    pub lease: Duration,
    /// Jobs prepared ahead; absent: an eighth of what the engines take at a time.
    pub ahead: Option<usize>,
    /// How often an empty inbox is asked.
    pub poll: Duration,
    /// How long a job may go on after SIGTERM.
    pub grace: Duration,
    /// Bytes of a job's documents at most.
    pub max_document_bytes: u64,
    /// What errors mean.
    pub retry: RetryPolicy,
}

/// Checks everything; `None` where too much is wrong to go on.
pub(super) fn check(raw: Raw, faults: &mut Vec<String>) -> Option<Config> {
    let Raw { database, amqp, files, results, engine, mut groups, hub_address, work, http, stores, drops } = raw;
    let url = secret("database", "url", database.url, database.url_file.as_deref(), faults);
    let database = match url {
        Some(url) => parsed::<StoreUrl>("[database] url", &url, faults),
        None => fault(faults, "[database] url: missing; expected postgres://USER@HOST/DATABASE or sqlite:PATH"),
    };
    let amqp = amqp.map(|amqp| check_amqp(amqp, faults));
    let mut locations = Locations { objects: Vec::new(), folders: files.folders.unwrap_or_default() };
    for folder in locations.folders.iter().filter(|folder| !folder.is_absolute()) {
        faults.push(format!("[files] folders: {} is not absolute", folder.display()));
    }
    let stores: Vec<_> = stores
        .into_iter()
        .enumerate()
        .filter_map(|(index, store)| check_store(index + 1, store, &mut locations, faults))
        .collect();
    let drops: Vec<_> = drops
        .into_iter()
        .enumerate()
        .filter_map(|(index, drop)| places::check_drop(index + 1, drop, &locations, faults))
        .collect();
    let results =
        places::check_results(results, |alias| stores.iter().any(|store: &StoreOptions| store.alias == alias), faults);
    places::check_apart(&drops, results.as_ref(), faults);
    let hears = drops.iter().any(|drop| drop.events_queue.is_some());
    refuse(faults, hears && amqp.is_none(), "[[drop]] events_queue: needs [amqp]");
    if amqp.is_none() && drops.is_empty() {
        faults.push("neither [amqp] nor [[drop]]: there is no way for jobs to come in".to_owned());
    }
    let listen = http.listen.unwrap_or_else(|| "127.0.0.1:9464".to_owned());
    let listen = parsed::<SocketAddr>("[http] listen", &listen, faults);
    for (_, group) in &mut groups {
        group.address = group
            .address
            .take()
            .or_else(|| hub_address.clone().filter(|_| group.nodes.is_some_and(|nodes| nodes != 1)));
    }
    let engine = check_engine(engine, groups, faults);
    let work = check_work(work, faults);
    Some(Config {
        database: database?,
        amqp: amqp.flatten_option()?,
        stores,
        locations,
        engine,
        work,
        listen: listen?,
        drops,
        results,
    })
}

/// `Some(None)` is a section that is there and wrong.
trait FlattenOption<T> {
    fn flatten_option(self) -> Option<Option<T>>;
}

impl<T> FlattenOption<T> for Option<Option<T>> {
    fn flatten_option(self) -> Option<Option<T>> {
        match self {
            Some(None) => None,
            other => Some(other.flatten()),
        }
    }
}

fn check_amqp(raw: raw::Amqp, faults: &mut Vec<String>) -> Option<AmqpConfig> {
    let url = secret("amqp", "url", raw.url, raw.url_file.as_deref(), faults);
    let certificates = raw.ca_file.and_then(|path| read("[amqp] ca_file", &path, faults));
    let broker = match url {
        Some(url) => {
            Broker::new(&url, certificates, "apbd").map_err(|error| faults.push(format!("[amqp] url: {error}"))).ok()
        }
        None => fault(faults, "[amqp] url: missing; expected amqp://USER:PASSWORD@HOST/VHOST"),
    };
    let named = Topology::named(raw.queue.as_deref().unwrap_or("apbd.jobs"));
    let topology = Topology {
        dead_letter_exchange: raw.dead_letter_exchange.unwrap_or(named.dead_letter_exchange),
        dead_letter_queue: raw.dead_letter_queue.unwrap_or(named.dead_letter_queue),
        delivery_limit: raw.delivery_limit.unwrap_or(named.delivery_limit),
        declare: raw.declare.unwrap_or(named.declare),
        queue: named.queue,
    };
    let usual = Admission::default();
    let admission = Admission {
        window: raw.window.unwrap_or(usual.window),
        prefetch: raw.prefetch.unwrap_or(usual.prefetch),
        ..usual
    };
    refuse(faults, admission.window == 0 || admission.prefetch == 0, "[amqp] window and prefetch: at least 1");
    let mut limits = MessageLimits::default();
    limits.bytes = raw.max_message_bytes.unwrap_or(limits.bytes);
    Some(AmqpConfig {
        broker: broker?,
        topology,
        admission,
        limits,
        reply_targets: raw.reply_targets.unwrap_or_default(),
    })
}

fn check_store(
    number: usize,
    raw: raw::Store,
    locations: &mut Locations,
    faults: &mut Vec<String>,
) -> Option<StoreOptions> {
    let at = format!("[[store]] {number}");
    let Some(alias) = raw.alias else { return fault(faults, &format!("{at}: alias is missing")) };
    let id = secret(&at, "access_key_id", raw.access_key_id, raw.access_key_id_file.as_deref(), faults);
    let secret_key =
        secret(&at, "secret_access_key", raw.secret_access_key, raw.secret_access_key_file.as_deref(), faults);
    let credentials = match (id, secret_key, raw.anonymous.unwrap_or(false)) {
        (Some(id), Some(secret), false) => Credentials::Key { id, secret },
        (None, None, false) => Credentials::Ambient,
        (None, None, true) => Credentials::Anonymous,
        _ => {
            return fault(
                faults,
                &format!("{at}: either access_key_id and secret_access_key, or neither, or anonymous"),
            );
        }
    };
    let allowed = raw.allowed.unwrap_or_default();
    refuse(
        faults,
        allowed.is_empty(),
        &format!("{at}: allowed is empty; list buckets as \"bucket\" or \"bucket/prefix\""),
    );
    for entry in allowed {
        let (bucket, prefix) = entry.split_once('/').unwrap_or((&entry, ""));
        let (store, bucket, prefix) = (alias.clone(), bucket.to_owned(), prefix.to_owned());
        locations.objects.push(AllowedPrefix { store, bucket, prefix });
    }
    let allow_http = raw.allow_http.unwrap_or(false);
    let plain = raw.endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://"));
    refuse(
        faults,
        plain && !allow_http,
        &format!("{at}: endpoint is not https; set allow_http = true if that is meant"),
    );
    Some(StoreOptions {
        alias,
        endpoint: raw.endpoint,
        region: raw.region.unwrap_or_else(|| "us-east-1".to_owned()),
        credentials,
        allow_http,
        silence_at_most: Duration::from_secs(raw.silence_s.unwrap_or(20)),
    })
}

fn check_engine(raw: raw::Engine, pool: Vec<(usize, raw::Group)>, faults: &mut Vec<String>) -> EngineConfig {
    groups::check_model("[engine]", raw.model.as_deref(), faults);
    let groups = match pool.is_empty() {
        true => groups::only_one(&raw, faults),
        false => groups::check(&raw, pool, faults),
    };
    let kv_cache = raw.kv_cache.unwrap_or_else(|| "native".to_owned());
    refuse(faults, !["native", "fp8"].contains(&kv_cache.as_str()), "[engine] kv_cache: native or fp8");
    let is_cuda = groups.iter().all(|group| group.backend == "cuda");
    refuse(faults, kv_cache == "fp8" && !is_cuda, "[engine] kv_cache: fp8 needs backend = \"cuda\"");
    let factor = raw.silence_factor.unwrap_or(5.0);
    refuse(faults, !(1.0..=1000.0).contains(&factor), "[engine] silence_factor: not in 1..1000");
    EngineConfig {
        model: raw.model,
        heads: raw.heads,
        kv_cache,
        names: raw.names.unwrap_or_default(),
        start_within: Duration::from_secs(raw.start_within_s.unwrap_or(600)),
        silence_floor: Duration::from_secs(raw.silence_floor_s.unwrap_or(30)),
        silence_factor: factor,
        groups,
    }
}

fn check_work(raw: raw::Work, faults: &mut Vec<String>) -> WorkConfig {
    let usual = RetryPolicy::default();
    let lease = raw.lease_s.unwrap_or(60);
    refuse(faults, lease < 3, "[work] lease_s: at least 3, since three heartbeats fit into it");
    refuse(faults, raw.ahead == Some(0), "[work] ahead: at least 1");
    refuse(faults, raw.max_attempts == Some(0), "[work] max_attempts: at least 1");
    WorkConfig {
        lease: Duration::from_secs(lease),
        ahead: raw.ahead,
        poll: Duration::from_millis(raw.poll_ms.unwrap_or(500).max(10)),
        grace: Duration::from_secs(raw.grace_s.unwrap_or(25)),
        max_document_bytes: raw.max_document_bytes.unwrap_or(256 << 20),
        retry: RetryPolicy {
            max_attempts: raw.max_attempts.unwrap_or(usual.max_attempts),
            max_infra_failures: raw.max_infra_failures.unwrap_or(usual.max_infra_failures),
            ..usual
        },
    }
}

/// A value that may be written down, or be in a file of its own.
fn secret(at: &str, key: &str, value: Option<String>, file: Option<&Path>, faults: &mut Vec<String>) -> Option<String> {
    match (value, file) {
        (Some(_), Some(_)) => fault(faults, &format!("[{at}] {key} and {key}_file: only one of them")),
        (Some(value), None) => Some(value),
        (None, Some(file)) => read(&format!("[{at}] {key}_file"), file, faults).map(|text| text.trim().to_owned()),
        (None, None) => None,
    }
}

fn read(key: &str, path: &Path, faults: &mut Vec<String>) -> Option<String> {
    fs::read_to_string(path).map_err(|error| faults.push(format!("{key}: {}: {error}", path.display()))).ok()
}

pub(super) fn parsed<T: FromStr<Err: ToString>>(key: &str, text: &str, faults: &mut Vec<String>) -> Option<T> {
    text.parse().map_err(|error: T::Err| faults.push(format!("{key}: {}", error.to_string()))).ok()
}

pub(super) fn fault<T>(faults: &mut Vec<String>, text: &str) -> Option<T> {
    faults.push(text.to_owned());
    None
}

pub(super) fn refuse(faults: &mut Vec<String>, wrong: bool, text: &str) {
    if wrong {
        faults.push(text.to_owned());
    }
}
