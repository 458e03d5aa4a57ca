//! What the questions gave: added up for each attention, shown side by side.
//!
//! Invariant: every figure is over the questions that were answered; those that failed are counted apart.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::cli::CliError;
use crate::cli::database::print_table;
use crate::engine::InferOutcome;

/// One question under one attention.
#[derive(Debug, Serialize)]
pub(super) struct Answer<'a> {
    pub document: &'a str,
    pub kind: &'a str,
    /// What was asked, as the model was.
    pub asked: &'a str,
    pub expected: &'a Value,
    pub attention: &'a str,
    /// The model's output; absent if it failed.
    pub given: Option<&'a str>,
    pub right: bool,
    pub error: Option<String>,
    pub hosts: Option<usize>,
    pub exact: Option<bool>,
    pub tokens_in: usize,
    pub tokens_out: usize,
    pub prefill_ms: f64,
    pub generate_ms: f64,
}

/// Right answers and answers.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(super) struct Count {
    right: usize,
    answered: usize,
}

impl Count {
    fn add(&mut self, right: bool) {
        self.right += usize::from(right);
        self.answered += 1;
    }

    fn shown(self) -> String {
        match self.answered {
            0 => "0/0".to_owned(),
            answered => format!("{}/{answered} = {:.1} %", self.right, 100.0 * self.right as f64 / answered as f64),
        }
    }
}

/// All answers under one attention.
#[derive(Debug, Serialize)]
pub(super) struct Tally {
    attention: String,
    /// Hosts at most.
    hosts: usize,
    exact: bool,
    #[serde(flatten)]
    all: Count,
    pub failed: usize,
    by_kind: BTreeMap<String, Count>,
    tokens_in: usize,
    tokens_out: usize,
    prefill_s: f64,
    generate_s: f64,
}

impl Tally {
    pub fn new(attention: String) -> Self {
        Self {
            attention,
            hosts: 0,
            exact: true,
            all: Count::default(),
            failed: 0,
            by_kind: BTreeMap::new(),
            tokens_in: 0,
            tokens_out: 0,
            prefill_s: 0.0,
            generate_s: 0.0,
        }
    }

    pub fn add(&mut self, kind: &str, right: bool, outcome: &InferOutcome) {
        self.all.add(right);
        self.by_kind.entry(kind.to_owned()).or_default().add(right);
        self.hosts = self.hosts.max(outcome.plan.hosts.len());
        self.exact &= outcome.plan.exact;
        self.tokens_in += outcome.plan.context + outcome.plan.query;
        self.tokens_out += outcome.tokens.len();
        self.prefill_s += outcome.prefill.as_secs_f64();
        self.generate_s += outcome.generate.as_secs_f64();
    }

    fn row(&self) -> Vec<String> {
        let mean = |seconds: f64| format!("{:.2}", seconds / self.all.answered.max(1) as f64);
        vec![
            self.attention.clone(),
            format!("{}, {}", self.hosts, if self.exact { "exact" } else { "approx." }),
            self.all.shown(),
            self.failed.to_string(),
            mean(self.prefill_s),
            format!("{:.0}", self.tokens_in as f64 / self.prefill_s.max(1e-9)),
            mean(self.generate_s),
            self.tokens_out.to_string(),
        ]
    }
}

/// The table: one row an attention; and below, which kind of question each got right.
pub(super) fn print(tallies: &[Tally]) -> Result<(), CliError> {
    let columns = ["attention", "hosts", "right", "failed", "prefill s", "tokens/s", "generate s", "tokens out"];
    print_table(&columns, tallies.iter().map(Tally::row).collect())?;
    let kinds: BTreeMap<&String, ()> =
        tallies.iter().flat_map(|tally| tally.by_kind.keys().map(|kind| (kind, ()))).collect();
    let columns: Vec<&str> =
        std::iter::once("right by kind").chain(tallies.iter().map(|tally| tally.attention.as_str())).collect();
    let row = |kind: &String| {
        let shown = tallies.iter().map(|tally| tally.by_kind.get(kind).copied().unwrap_or_default().shown());
        std::iter::once(kind.clone()).chain(shown).collect()
    };
    crate::cli::print("\n")?;
    print_table(&columns, kinds.into_keys().map(row).collect())
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
