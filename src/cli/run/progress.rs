//! How a run goes, on stderr: bars on a terminal, a line a document otherwise.
//!
//! Invariant: called from the pipeline's threads; does nothing that can block for long.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

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
    bar: Option<ProgressBar>,
}

/// Bars or lines.
pub(super) struct RunProgress {
    count: usize,
    documents: Mutex<HashMap<JobId, Document>>,
    /// All documents, by their bytes: what the time left is computed from. On a terminal only. Below it is one for each that is read.
    all: Option<ProgressBar>,
}

impl RunProgress {
    /// For these jobs, of which some were done in an earlier run.
    pub fn new(jobs: &[NewJob], done: &[JobId]) -> Self {
        let document = |(i, new): (usize, &NewJob)| {
            let name = new.origin.rsplit('/').next().unwrap_or(&new.origin).to_owned();
            let bytes = new.size_bytes.unwrap_or(0).max(1);
            (new.job.id, Document { number: i + 1, name, bytes, tokens: 0, stage_since: None, bar: None })
        };
        let documents: HashMap<JobId, Document> = jobs.iter().enumerate().map(document).collect();
        let total = documents.values().map(|document| document.bytes).sum();
        let done_bytes = done.iter().filter_map(|id| documents.get(id)).map(|document| document.bytes).sum();
        if !done.is_empty() {
            console::line(&format!("{} of {} documents were done in an earlier run", done.len(), jobs.len()));
        }
        let all = std::io::stderr().is_terminal().then(|| bar_of_all(total, done_bytes));
        Self { count: jobs.len(), documents: Mutex::new(documents), all }
    }

    /// Takes the bars away.
    pub fn finish(&self) {
        self.documents().values_mut().for_each(Document::leave);
        if let Some(all) = &self.all {
            all.finish_and_clear();
        }
    }

    fn documents(&self) -> MutexGuard<'_, HashMap<JobId, Document>> {
        self.documents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progressed(&self, job: JobId, progress: Progress) {
        let Some(all) = &self.all else { return };
        let mut documents = self.documents();
        let shown = documents.values().filter(|document| document.bar.is_some()).count();
        let Some(document) = documents.get_mut(&job) else { return };
        let since = *document.stage_since.get_or_insert_with(Instant::now);
        if let Progress::Prefill { layers_done, layers } = progress
            && layers_done == layers
        {
            document.stage_since = None;
        }
        if document.bar.is_none() && shown < SHOWN && progress != Progress::Waiting {
            document.bar = Some(bar_of_one());
        }
        if let Some(bar) = &document.bar {
            let (share, message) = picture(progress, document.tokens, since.elapsed().as_secs_f64());
            bar.set_position((share * STEPS as f64) as u64);
            bar.set_message(format!("{}: {message}", document.name));
        }
        let begun = documents.values().filter(|document| document.stage_since.is_some()).count();
        let without = begun.saturating_sub(SHOWN);
        all.set_message(if without > 0 { format!(", {without} more in work") } else { String::new() });
    }

    fn ended(&self, job: JobId, report: &AttemptReport) {
        let mut documents = self.documents();
        let Some(document) = documents.get_mut(&job) else { return };
        document.leave();
        if let Some(all) = &self.all
            && report.ending.state().is_final()
        {
            all.inc(document.bytes);
        }
        console::line(&format!(
            "[{}/{}] {}: {}",
            document.number,
            self.count,
            document.name,
            said(report, document.tokens)
        ));
    }
}

impl Document {
    /// The engine is not at it any more.
    fn leave(&mut self) {
        self.stage_since = None;
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
            console::progress().remove(&bar);
        }
    }
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
    all.set_style(style("{bar:30} {bytes} of {total_bytes} of documents, {eta} left{msg}"));
    all.set_position(done);
    all.reset_eta();
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
                if let Some(document) = self.documents().get_mut(&job) {
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
