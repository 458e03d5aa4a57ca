//! Every metric of the daemon, and their text form for Prometheus.
//!
//! Invariant: label values come from fixed sets (states, codes, stages, groups of the pool), so the number of series is bounded.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Upper bounds of the buckets of durations, in seconds.
const BUCKETS_S: [f64; 11] = [0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1200.0, 3600.0];

/// Deliveries taken in, by answer of the inbox.
pub static INTAKE: Series = Series::counter("apbd_intake_total", "Messages taken in", &["answer"]);
/// Messages and objects that were no jobs.
pub static REJECTED: Series = Series::counter("apbd_rejected_total", "Messages and objects refused", &["door", "code"]);
/// Files of drop folders, by what became of them.
pub static DROPS: Series = Series::counter("apbd_drop_files_total", "Files of drop folders", &["outcome"]);
/// Connections to the broker that failed or broke.
pub static BROKER_FAILURES: Series =
    Series::counter("apbd_broker_failures_total", "Connections to the broker that failed or broke", &[]);
/// Jobs claimed.
pub static CLAIMED: Series = Series::counter("apbd_claimed_total", "Jobs claimed", &[]);
/// Attempts recorded, by what became of the job and the error's code.
pub static ATTEMPTS: Series = Series::counter("apbd_attempts_total", "Attempts recorded", &["state", "code"]);
/// Leases lost to another worker.
pub static LEASES_LOST: Series = Series::counter("apbd_leases_lost_total", "Leases lost to other workers", &[]);
/// Calls to the store that had to be repeated.
pub static STORE_FAILURES: Series =
    Series::counter("apbd_store_failures_total", "Calls to the store that had to be repeated", &["operation"]);
/// Tokens in and out.
pub static TOKENS: Series = Series::counter("apbd_tokens_total", "Tokens of finished jobs", &["direction"]);
/// Completion events.
pub static EVENTS: Series = Series::counter("apbd_events_total", "Completion events", &["outcome"]);
/// Results written as files.
pub static RESULTS_WRITTEN: Series = Series::counter("apbd_results_written_total", "Results written as files", &[]);
/// Engine processes that ended, and why.
pub static ENGINE_ENDS: Series =
    Series::counter("apbd_engine_ends_total", "Engine processes that ended", &["group", "reason"]);
/// Documents in the engine of a group of the pool.
pub static GROUP_DOCUMENTS: Series =
    Series::gauge("apbd_group_documents", "Documents in the engine of a group", &["group"]);
/// Predicted time until the documents of a group are prefilled.
pub static GROUP_BACKLOG: Series = Series::gauge(
    "apbd_group_backlog_seconds",
    "Predicted time until all documents of a group are prefilled",
    &["group"],
);
/// Prefill of the latest document.
pub static GROUP_RATE: Series =
    Series::gauge("apbd_group_tokens_per_second", "Prefill of the latest document of a group", &["group"]);
/// Documents that wait for a group.
pub static POOL_WAITING: Series =
    Series::gauge("apbd_pool_waiting_documents", "Documents that are ready and wait for a group", &[]);
/// Jobs in the inbox, each state counted up to 100,000.
pub static INBOX: Series = Series::gauge("apbd_inbox_jobs", "Jobs in the inbox", &["state"]);
/// Wait of the oldest job that could be claimed; 0: none waits.
pub static JOB_WAIT: Series =
    Series::gauge("apbd_oldest_job_wait_seconds", "Wait of the oldest job that could be claimed", &[]);
/// Wait of the oldest completion event; 0: none waits.
pub static EVENT_WAIT: Series =
    Series::gauge("apbd_oldest_event_wait_seconds", "Wait of the oldest completion event since its job ended", &[]);
/// Completion events that were given up and are kept for people, counted up to 1,000.
pub static EVENTS_GIVEN_UP: Series =
    Series::gauge("apbd_events_kept", "Completion events that were given up and are kept", &[]);
/// Jobs that nobody held any more, by what became of them.
pub static SWEPT: Series = Series::counter("apbd_swept_total", "Jobs that nobody held any more", &["outcome"]);
/// Parts of the process: 1 if it does its work.
pub static READY: Series = Series::gauge("apbd_ready", "Whether a part of the daemon does its work", &["part"]);
/// Time by stage.
pub static STAGE_SECONDS: Histogram =
    Histogram::new("apbd_stage_seconds", "Time of finished attempts by stage", "stage");

/// All series, in the order in which they are shown.
fn all() -> Vec<&'static Series> {
    vec![
        &INTAKE,
        &REJECTED,
        &DROPS,
        &BROKER_FAILURES,
        &CLAIMED,
        &ATTEMPTS,
        &LEASES_LOST,
        &STORE_FAILURES,
        &TOKENS,
        &EVENTS,
        &RESULTS_WRITTEN,
        &ENGINE_ENDS,
        &GROUP_DOCUMENTS,
        &GROUP_BACKLOG,
        &GROUP_RATE,
        &POOL_WAITING,
        &INBOX,
        &JOB_WAIT,
        &EVENT_WAIT,
        &EVENTS_GIVEN_UP,
        &SWEPT,
        &READY,
    ]
}

/// Every metric's name, kind and labels; of a histogram the name without its endings.
pub fn declared() -> Vec<(&'static str, &'static str, Vec<&'static str>)> {
    let series = all().into_iter().map(|series| (series.name, series.kind, series.labels.to_vec()));
    series.chain([(STAGE_SECONDS.name, "histogram", vec![STAGE_SECONDS.label, "le"])]).collect()
}

/// All of them, as Prometheus reads it.
pub fn text() -> String {
    let mut out = String::new();
    all().into_iter().for_each(|series| series.write(&mut out));
    STAGE_SECONDS.write(&mut out);
    out
}

/// A counter or a gauge with labels.
pub struct Series {
    name: &'static str,
    help: &'static str,
    kind: &'static str,
    labels: &'static [&'static str],
    values: Mutex<BTreeMap<Vec<String>, u64>>,
}

impl Series {
    const fn counter(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Self {
        Self { name, help, kind: "counter", labels, values: Mutex::new(BTreeMap::new()) }
    }

    const fn gauge(name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Self {
        Self { name, help, kind: "gauge", labels, values: Mutex::new(BTreeMap::new()) }
    }

    /// Raises it; `values` are those of the labels, in order.
    pub fn add(&self, values: &[&str], by: u64) {
        *self.slot(values) += by;
    }

    /// Sets it.
    pub fn set(&self, values: &[&str], to: u64) {
        *self.slot(values) = to;
    }

    fn slot(&self, values: &[&str]) -> impl std::ops::DerefMut<Target = u64> {
        let key: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
        let map = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        Slot { map, key }
    }

    fn write(&self, out: &mut String) {
        head(out, self.name, self.help, self.kind);
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        // Without labels there is one series, and it is there before anything has happened.
        if self.labels.is_empty() && values.is_empty() {
            let _ = writeln!(out, "{} 0", self.name);
        }
        for (labels, value) in values.iter() {
            let pairs: Vec<String> =
                self.labels.iter().zip(labels).map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
            let labels = if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) };
            let _ = writeln!(out, "{}{labels} {value}", self.name);
        }
    }
}

/// A value in a locked map.
struct Slot<'a> {
    map: std::sync::MutexGuard<'a, BTreeMap<Vec<String>, u64>>,
    key: Vec<String>,
}

impl std::ops::Deref for Slot<'_> {
    type Target = u64;

    fn deref(&self) -> &u64 {
        self.map.get(&self.key).unwrap_or(&0)
    }
}

impl std::ops::DerefMut for Slot<'_> {
    fn deref_mut(&mut self) -> &mut u64 {
        self.map.entry(std::mem::take(&mut self.key)).or_default()
    }
}

/// Durations of one label's value: how many were at most each bucket's bound, how many in all, and their sum.
type Observed = ([u64; BUCKETS_S.len()], u64, f64);

/// Durations by one label.
pub struct Histogram {
    name: &'static str,
    help: &'static str,
    label: &'static str,
    values: Mutex<BTreeMap<&'static str, Observed>>,
}

impl Histogram {
    const fn new(name: &'static str, help: &'static str, label: &'static str) -> Self {
        Self { name, help, label, values: Mutex::new(BTreeMap::new()) }
    }

    /// Counts a duration.
    pub fn observe(&self, value: &'static str, time: Duration) {
        let seconds = time.as_secs_f64();
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        let (buckets, count, sum) = values.entry(value).or_default();
        for (bucket, bound) in buckets.iter_mut().zip(BUCKETS_S) {
            *bucket += u64::from(seconds <= bound);
        }
        *count += 1;
        *sum += seconds;
    }

    fn write(&self, out: &mut String) {
        head(out, self.name, self.help, "histogram");
        let (name, label) = (self.name, self.label);
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        for (value, (buckets, count, sum)) in values.iter() {
            for (bucket, bound) in buckets.iter().zip(BUCKETS_S) {
                let _ = writeln!(out, "{name}_bucket{{{label}=\"{value}\",le=\"{bound}\"}} {bucket}");
            }
            let _ = writeln!(out, "{name}_bucket{{{label}=\"{value}\",le=\"+Inf\"}} {count}");
            let _ = writeln!(out, "{name}_sum{{{label}=\"{value}\"}} {sum}");
            let _ = writeln!(out, "{name}_count{{{label}=\"{value}\"}} {count}");
        }
    }
}

/// A label's value as the text form has it: the name of a place may have anything in it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn head(out: &mut String, name: &str, help: &str, kind: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_is_prometheus() {
        static JOBS: Series = Series::counter("jobs_total", "Jobs", &["state", "code"]);
        static TIME: Histogram = Histogram::new("time", "Time", "stage");
        static ODD: Series = Series::gauge("odd", "Odd", &["part"]);
        static NONE: Series = Series::counter("none_total", "None", &[]);
        JOBS.add(&["failed", "x"], 2);
        JOBS.add(&["failed", "x"], 1);
        TIME.observe("fetch", Duration::from_millis(70));
        ODD.set(&["a\"b\\"], 1);
        let mut odd = String::new();
        ODD.write(&mut odd);
        NONE.write(&mut odd);
        assert!(odd.contains("odd{part=\"a\\\"b\\\\\"} 1\n") && odd.ends_with("\nnone_total 0\n"), "{odd}");
        let mut out = String::new();
        JOBS.write(&mut out);
        TIME.write(&mut out);
        assert!(out.starts_with(
            "# HELP jobs_total Jobs\n# TYPE jobs_total counter\njobs_total{state=\"failed\",code=\"x\"} 3\n"
        ));
        assert!(
            out.contains("time_bucket{stage=\"fetch\",le=\"0.05\"} 0\ntime_bucket{stage=\"fetch\",le=\"0.1\"} 1\n")
        );
        assert!(out.ends_with("time_sum{stage=\"fetch\"} 0.07\ntime_count{stage=\"fetch\"} 1\n"));
    }
}
