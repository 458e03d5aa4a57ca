//! `apbd bench calibrate`: the rates of a device, from what `apbd bench prefill` and `apbd bench decode` printed as JSON.
//!
//! Invariant: figures of several devices are not mixed; what is not understood in a file is said, with the file's name.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::report::{self, Row, rounded};
use super::shapes::ShapeName;
use crate::cli::database::{Format, print_json};
use crate::cli::{CliError, Status};
use crate::cost::{Calibration, DecodeFigure, Figures, PrefillFigure, Stages};
use crate::plan::{AttentionMode, AttentionRequest, Capabilities, PrefillPlan};

/// Options of `apbd bench calibrate`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// What `apbd bench prefill` or `apbd bench decode` printed with `--format json`.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// The calibration that is refined, by default that of an H100: what the files say nothing of (memory, links) is taken from it.
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// A table of the rates before and after, or the calibration for `apbd bench plan --calibration`.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Args {
    /// Refines and prints.
    pub(super) fn execute(&self) -> Result<Status, CliError> {
        let base = match &self.base {
            Some(path) => read_calibration(path)?,
            None => Calibration::h100(),
        };
        let mut figures = Figures::default();
        for path in &self.files {
            add(&mut figures, path)?;
        }
        let refined = base.refined(&figures);
        refined.check().map_err(|error| CliError::Usage(format!("these figures make no calibration: {error}")))?;
        match self.format {
            Format::Json => print_json(&refined)?,
            Format::Table => report::print(&compared(&base, &refined), Format::Table)?,
        }
        Ok(Status::Done)
    }
}

/// Reads and checks a calibration.
pub(super) fn read_calibration(path: &Path) -> Result<Calibration, CliError> {
    let wrong = |reason: String| CliError::Usage(format!("{}: {reason}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let calibration: Calibration = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    calibration.check().map_err(|error| wrong(error.to_string()))?;
    Ok(calibration)
}

/// Each rate before and after.
fn compared(base: &Calibration, refined: &Calibration) -> Vec<Row> {
    let (before, after) = (json!(base.rates), json!(refined.rates));
    let row = |(name, after): (&String, &Value)| {
        let mut row = Row::new();
        row.insert("rate".to_owned(), json!(name));
        row.insert(base.device.clone(), rounded(before[name].as_f64().unwrap_or(f64::NAN), 1));
        row.insert("refined".to_owned(), rounded(after.as_f64().unwrap_or(f64::NAN), 1));
        row
    };
    after.as_object().into_iter().flatten().map(row).collect()
}

/// A row of a benchmark's output, as far as it is of use here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Printed {
    what: String,
    device: Option<String>,
    copy_gb_s: Option<f64>,
    weights_gb_s: Option<f64>,
    head_width: Option<usize>,
    query: Option<usize>,
    shape: Option<String>,
    attention: Option<AttentionMode>,
    kv_cache: Option<String>,
    tokens: usize,
    hosts: Option<usize>,
    anchor: Option<usize>,
    passing: Option<usize>,
    batch: Option<usize>,
    seconds: Option<f64>,
    qkv_ms: f64,
    retaining_head_ms: f64,
    attention_ms: f64,
    o_ms: f64,
    ffn_ms: f64,
    other_ms: f64,
    ms_a_token: Option<f64>,
    /// A number, or why there is none.
    ms_a_step: Option<Value>,
}

/// Adds what a file has.
fn add(figures: &mut Figures, path: &Path) -> Result<(), CliError> {
    let wrong = |reason: String| CliError::Usage(format!("{}: {reason}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let rows: Vec<Printed> = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let before = figures.prefill.len() + figures.decode.len();
    let (mut head_width, mut query) = (1024, 64);
    for row in &rows {
        match row.what.as_str() {
            "ceilings" => {
                if let (Some(known), Some(device)) = (&figures.device, &row.device)
                    && known != device
                {
                    return Err(wrong(format!("this is of {device}, another file of {known}: calibrate them apart")));
                }
                figures.device = row.device.clone().or(figures.device.take());
                figures.copy_gb_s = row.copy_gb_s.or(figures.copy_gb_s);
                figures.weights_gb_s = row.weights_gb_s.or(figures.weights_gb_s);
                (head_width, query) = (row.head_width.unwrap_or(head_width), row.query.unwrap_or(query));
            }
            "prefill" => figures.prefill.push(prefill(row, head_width, query).map_err(&wrong)?),
            // Keys and values in FP8 are bound by something else.
            "decode" if row.kv_cache.as_deref() != Some("fp8") => figures.decode.extend(decode(row).map_err(&wrong)?),
            _ => {}
        }
    }
    match figures.prefill.len() + figures.decode.len() > before {
        true => Ok(()),
        false => Err(wrong("there is no prefill and no decode in it".to_owned())),
    }
}

fn shape(row: &Printed) -> Result<ShapeName, String> {
    let name = row.shape.as_deref().ok_or("a row has no shape")?;
    <ShapeName as clap::ValueEnum>::from_str(name, false).map_err(|_| format!("'{name}' is no known shape"))
}

fn prefill(row: &Printed, head_width: usize, query: usize) -> Result<PrefillFigure, String> {
    let mode = row.attention.ok_or("a prefill has no attention")?;
    let hosts = row.hosts.unwrap_or(1);
    let lengths = |length: Option<usize>| length.filter(|_| hosts > 1);
    let request = AttentionRequest {
        mode: Some(mode),
        hosts: Some(hosts),
        anchor: lengths(row.anchor),
        passing: lengths(row.passing).filter(|_| mode == AttentionMode::Apb),
        ..AttentionRequest::default()
    };
    let capabilities = Capabilities { has_retaining_heads: head_width > 0, max_hosts: usize::MAX };
    let plan = PrefillPlan::new(row.tokens, query, 0, &request, capabilities).map_err(|error| error.to_string())?;
    let seconds = row.seconds.filter(|seconds| *seconds > 0.0).ok_or("a prefill has no seconds")?;
    let stages = Stages {
        qkv_s: row.qkv_ms / 1e3,
        retaining_head_s: row.retaining_head_ms / 1e3,
        attention_s: row.attention_ms / 1e3,
        o_s: row.o_ms / 1e3,
        ffn_s: row.ffn_ms / 1e3,
        other_s: row.other_ms / 1e3,
        ..Stages::default()
    };
    Ok(PrefillFigure { shape: shape(row)?.cost_shape(head_width, false), plan, seconds, stages })
}

fn decode(row: &Printed) -> Result<Option<DecodeFigure>, String> {
    let ms = row.ms_a_token.or(row.ms_a_step.as_ref().and_then(Value::as_f64));
    let Some(ms) = ms.filter(|ms| *ms > 0.0) else { return Ok(None) };
    let contexts = vec![row.tokens; row.batch.unwrap_or(1)];
    Ok(Some(DecodeFigure { shape: shape(row)?.cost_shape(0, false), contexts, seconds: ms / 1e3 }))
}
