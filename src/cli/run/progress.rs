//! How a run goes, on stderr: bars on a terminal, a line a document otherwise.
//!
//! Invariant: called from the pipeline's threads; does nothing that can block for long.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use crate::engine::Progress;
use crate::job::{JobId, Stage};
use crate::pipeline::events::{Event, EventSink};
use crate::store::{AttemptReport, Ending, NewJob};
use crate::telemetry::console;

/// Steps of the bar of one document.
const STEPS: u64 = 1000;
/// Documents that have a bar at the same time; a screen has no room for many more.
const SHOWN: usize = 8;
/// Between two pictures of a bar.
const TICK: Duration = Duration::from_millis(200);

struct Document {
    number: usize,
    name: String,
    bytes: u64,
    tokens: usize,
    /// Since when the engine is at it, or at generating from it.
    stage_since: Option<Instant>,
    /// The part of it that the engine has read.
    read: f64,
    bar: Option<ProgressBar>,
}

struct State {
    documents: HashMap<JobId, Document>,
    pace: Pace,
}

/// How fast documents are read, in bytes: their tokens are not known before they are read.
struct Pace {
    /// When the engine began.
    began: Option<Instant>,
    /// Bytes of the documents that the engine has read in this run; what failed without it says nothing about its pace.
    read: u64,
    /// Bytes of the documents that are neither done nor failed.
    left: u64,
}

impl Pace {
    /// The time left, with `part` of the bytes that are left already read; nothing before there is anything to go by.
    fn left(&self, part: f64) -> Option<Duration> {
        let (read, left) = (self.read as f64 + part, self.left as f64 - part);
        let elapsed = self.began?.elapsed().as_secs_f64();
        (read > 0.0 && left >= 0.0).then(|| Duration::from_secs_f64(elapsed * left / read))
    }
}

/// Bars or lines.
pub(super) struct RunProgress {
    count: usize,
    state: Mutex<State>,
    /// All documents, by their bytes: what the time left is computed from. On a terminal only. Below it is one for each that is read.
    all: Option<ProgressBar>,
}

impl RunProgress {
    /// For these jobs, of which some were done in an earlier run.
    pub fn new(jobs: &[NewJob], done: &[JobId]) -> Self {
        let document = |(i, new): (usize, &NewJob)| {
            let name = new.origin.rsplit('/').next().unwrap_or(&new.origin).to_owned();
            let bytes = new.size_bytes.unwrap_or(0).max(1);
            (new.job.id, Document { number: i + 1, name, bytes, tokens: 0, stage_since: None, read: 0.0, bar: None })
        };
        let documents: HashMap<JobId, Document> = jobs.iter().enumerate().map(document).collect();
        let total: u64 = documents.values().map(|document| document.bytes).sum();
        let done_bytes: u64 = done.iter().filter_map(|id| documents.get(id)).map(|document| document.bytes).sum();
        if !done.is_empty() {
            console::line(&format!("{} of {} documents were done in an earlier run", done.len(), jobs.len()));
        }
        let all = std::io::stderr().is_terminal().then(|| bar_of_all(total, done_bytes));
        let pace = Pace { began: None, read: 0, left: total - done_bytes };
        Self { count: jobs.len(), state: Mutex::new(State { documents, pace }), all }
    }

    /// Takes the bars away.
    pub fn finish(&self) {
        self.state().documents.values_mut().for_each(Document::leave);
        if let Some(all) = &self.all {
            all.finish_and_clear();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progressed(&self, job: JobId, progress: Progress) {
        let Some(all) = &self.all else { return };
        let mut state = self.state();
        let State { documents, pace } = &mut *state;
        let shown = documents.values().filter(|document| document.bar.is_some()).count();
        let Some(document) = documents.get_mut(&job) else { return };
        if progress == Progress::Waiting {
            return;
        }
        pace.began.get_or_insert_with(Instant::now);
        document.read = share_read(progress);
        let since = *document.stage_since.get_or_insert_with(Instant::now);
        if let Progress::Prefill { layers_done, layers } = progress
            && layers_done == layers
        {
            document.stage_since = None;
        }
        if document.bar.is_none() && shown < SHOWN {
            document.bar = Some(bar_of_one());
        }
        if let Some(bar) = &document.bar {
            let (share, message) = picture(progress, document.tokens, since.elapsed().as_secs_f64());
            bar.set_position((share * STEPS as f64) as u64);
            bar.set_message(format!("{}: {message}", document.name));
        }
        show_all(all, &state);
    }

    fn ended(&self, job: JobId, report: &AttemptReport) {
        let mut state = self.state();
        let State { documents, pace } = &mut *state;
        let Some(document) = documents.get_mut(&job) else { return };
        document.leave();
        if report.ending.state().is_final() {
            pace.left = pace.left.saturating_sub(document.bytes);
            if matches!(report.ending, Ending::Succeeded(_)) {
                pace.read += document.bytes;
            }
        }
        console::line(&format!(
            "[{}/{}] {}: {}",
            document.number,
            self.count,
            document.name,
            said(report, document.tokens)
        ));
        if let Some(all) = &self.all {
            show_all(all, &state);
        }
    }
}

impl Document {
    /// The engine is not at it any more.
    fn leave(&mut self) {
        (self.stage_since, self.read) = (None, 0.0);
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
            console::progress().remove(&bar);
        }
    }
}

/// How much of a document has been read: how long the output gets is not known, and mostly short.
fn share_read(progress: Progress) -> f64 {
    match progress {
        Progress::Prefill { layers_done, layers } => layers_done as f64 / layers.max(1) as f64,
        Progress::Generate { .. } => 1.0,
        Progress::Waiting => 0.0,
    }
}

/// How far all are: those that have ended, and the parts that were read of those in work.
fn show_all(all: &ProgressBar, state: &State) {
    let State { documents, pace } = state;
    let read: f64 = documents.values().map(|document| document.bytes as f64 * document.read).sum();
    all.set_position(all.length().unwrap_or_default().saturating_sub(pace.left) + read as u64);
    let left = pace.left(read).map(|left| format!(", {:#} left", HumanDuration(left))).unwrap_or_default();
    let begun = documents.values().filter(|document| document.stage_since.is_some()).count();
    let without = begun.saturating_sub(SHOWN);
    let more = if without > 0 { format!(", {without} more in work") } else { String::new() };
    all.set_message(format!("{left}{more}"));
}

/// How far a document of `tokens` tokens is in its stage, from 0 to 1, after so many seconds of it; and in words.
fn picture(progress: Progress, tokens: usize, elapsed: f64) -> (f64, String) {
    match progress {
        Progress::Waiting => (0.0, "waits".to_owned()),
        Progress::Prefill { layers_done, layers } => {
            let share = layers_done as f64 / layers.max(1) as f64;
            let rate = tokens as f64 * share / elapsed.max(1e-9);
            let left = elapsed / share.max(1e-9) * (1.0 - share);
            // The first layer has to be done before anything can be said about the others.
            let pace = if layers_done == 0 { String::new() } else { format!(", {rate:.0} tokens/s, {left:.0} s left") };
            (share, format!("prefill {tokens} tokens{pace}"))
        }
        Progress::Generate { tokens, at_most } => {
            let rate = if elapsed > 0.0 { tokens as f64 / elapsed } else { 0.0 };
            let share = tokens as f64 / at_most.max(1) as f64;
            (share, format!("generate {tokens} tokens, {rate:.0} tokens/s, at most {at_most}"))
        }
    }
}

/// What came of an attempt, in a line.
fn said(report: &AttemptReport, tokens: usize) -> String {
    match &report.ending {
        Ending::Succeeded(result) => {
            let seconds = |stage: Stage| report.stages.get(stage).unwrap_or_default().as_secs_f64();
            let (prefill, generate) = (seconds(Stage::Prefill), seconds(Stage::Generate));
            let rate = tokens as f64 / prefill.max(1e-9);
            format!(
                "{tokens} tokens read in {prefill:.1} s ({rate:.0} tokens/s), {} written in {generate:.1} s",
                result.tokens_out
            )
        }
        Ending::Errored { error, .. } if report.ending.state().is_final() => {
            format!("{}: {error}", report.ending.state())
        }
        Ending::Errored { error, .. } => format!("will be tried again: {error}"),
    }
}

fn bar_of_all(total: u64, done: u64) -> ProgressBar {
    let all = console::progress().add(ProgressBar::new(total));
    all.set_style(style("{bar:30} {bytes} of {total_bytes} of documents{msg}"));
    all.set_position(done);
    all.enable_steady_tick(TICK);
    all
}

fn bar_of_one() -> ProgressBar {
    let one = console::progress().add(ProgressBar::new(STEPS));
    one.set_style(style("{bar:30} {wide_msg}"));
    one.enable_steady_tick(TICK);
    one
}

/// The templates are constant; a broken one would show in every run.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl EventSink for RunProgress {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Prompted { job, tokens } => {
                if let Some(document) = self.state().documents.get_mut(&job) {
                    document.tokens = tokens;
                }
            }
            Event::Progressed { job, progress } => self.progressed(job, progress),
            Event::Ended { job, report, .. } => self.ended(job.id, report),
            Event::StoreUnavailable { operation, reason } => {
                console::line(&format!("waiting for the database ({operation}): {reason}"))
            }
            Event::Lost { job, .. } => console::line(&format!("{}: another process has taken it over", job.id)),
            Event::Claimed { .. } | Event::Entered { .. } | Event::Swept { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_what_the_engine_has_read() {
        let seconds = |pace: &Pace, part: f64| pace.left(part).map(|left| left.as_secs_f64().round());
        let began = Instant::now().checked_sub(Duration::from_secs(10));
        assert_eq!(seconds(&Pace { began: None, read: 0, left: 100 }, 0.0), None);
        assert_eq!(seconds(&Pace { began, read: 0, left: 100 }, 0.0), None, "failed files are no pace");
        assert_eq!(seconds(&Pace { began, read: 0, left: 100 }, 25.0), Some(30.0));
        assert_eq!(seconds(&Pace { began, read: 50, left: 100 }, 0.0), Some(20.0));
    }
}
