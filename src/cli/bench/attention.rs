//! The attention kernels alone: causal over a whole context, the last host of an APB plan, all hosts of one, and one query over a cache.
//!
//! Invariant: FLOPs are those of the visible pairs: 4 * head_dim * heads a pair of query and key.

use serde_json::json;

use super::ceilings::{self, milliseconds};
use super::cuda::{device, failed};
use super::report::{Row, rounded};
use super::{Options, Strategy};
use crate::backend::cuda::Cuda;
use crate::backend::{AttentionTask, Backend, BackendError, HeadShape, KvRef, Mask, Segment};
use crate::cli::CliError;

/// Runs before those that count, while the device's clock finds its pace.
const WARM_UP: usize = 8;

/// Appends a row for each length and case.
pub(super) fn measure(options: &Options, rows: &mut Vec<Row>) -> Result<(), CliError> {
    let cuda = device(options)?;
    rows.push(ceilings::measure(&cuda, options).map_err(failed)?);
    let shape = options.shape.spec().shape;
    for &tokens in &options.tokens {
        if options.attention.contains(&Strategy::Full) {
            rows.push(one(&cuda, options, shape, "causal", tokens, tokens, vec![causal(tokens)]).map_err(failed)?);
        }
        if options.attention.contains(&Strategy::Apb) && tokens >= options.hosts {
            let hosts = hosts(options, tokens);
            let sources = hosts.last().map_or(0, |host| host.queries.end);
            let last = hosts.last().cloned().into_iter().collect();
            rows.push(one(&cuda, options, shape, "last host", tokens, sources, last).map_err(failed)?);
            rows.push(one(&cuda, options, shape, "all hosts", tokens, sources, hosts).map_err(failed)?);
        }
        rows.push(one(&cuda, options, shape, "one query", tokens, tokens, vec![query(tokens)]).map_err(failed)?);
    }
    Ok(())
}

fn segment(rows: std::ops::Range<usize>, mask: Mask) -> Segment {
    Segment { source: 0, rows, mask }
}

fn causal(tokens: usize) -> AttentionTask {
    AttentionTask { queries: 0..tokens, segments: vec![segment(0..tokens, Mask::Causal)] }
}

fn query(tokens: usize) -> AttentionTask {
    AttentionTask { queries: 0..1, segments: vec![segment(0..tokens, Mask::Full)] }
}

/// Rows are `[passing | anchor | local of each host]`.
fn hosts(options: &Options, tokens: usize) -> Vec<AttentionTask> {
    let (count, local) = (options.hosts, tokens / options.hosts);
    let anchor = options.anchor.unwrap_or(tokens / 32);
    let passing = options.passing.unwrap_or(tokens / 64);
    let anchor_rows = passing * (count - 1)..passing * (count - 1) + anchor;
    let host = |index: usize| {
        let own = anchor_rows.end + index * local..anchor_rows.end + (index + 1) * local;
        let mut segments = vec![segment(0..passing * index, Mask::Full)];
        segments.push(segment(if index > 0 { anchor_rows.clone() } else { 0..0 }, Mask::Full));
        segments.push(segment(own.clone(), Mask::Causal));
        AttentionTask { queries: own, segments }
    };
    (0..count).map(host).collect()
}

fn visible_pairs(task: &AttentionTask) -> f64 {
    let queries = task.queries.len() as f64;
    let of = |segment: &Segment| match segment.mask {
        Mask::Full => queries * segment.rows.len() as f64,
        Mask::Causal => queries * segment.rows.len() as f64 - queries * (queries - 1.0) / 2.0,
    };
    task.segments.iter().filter(|segment| !segment.rows.is_empty()).map(of).sum()
}

fn one(
    cuda: &Cuda,
    options: &Options,
    shape: HeadShape,
    case: &str,
    tokens: usize,
    rows: usize,
    tasks: Vec<AttentionTask>,
) -> Result<Row, BackendError> {
    let q = cuda.random_matrix(1, 1.0, rows, shape.q_width())?;
    let (k, v) =
        (cuda.random_matrix(2, 1.0, rows, shape.kv_width())?, cuda.random_matrix(3, 1.0, rows, shape.kv_width())?);
    let mut out = cuda.matrix(rows, shape.q_width())?;
    let sources = [KvRef { k: &k, v: &v }];
    let times =
        cuda.time(WARM_UP, 4 * options.repeats + 1, || cuda.attention(shape, &q, &sources, &tasks, &mut out, None))?;
    let ms = milliseconds(times);
    let flops = 4.0 * shape.q_width() as f64 * tasks.iter().map(visible_pairs).sum::<f64>();
    let mut row = Row::new();
    row.insert("what".to_owned(), json!(case));
    row.insert("shape".to_owned(), json!(options.shape.as_str()));
    row.insert("tokens".to_owned(), json!(tokens));
    row.insert("ms".to_owned(), rounded(ms, 4));
    row.insert("tflops".to_owned(), rounded(flops / ms / 1e9, 1));
    if case == "one query" {
        let bytes = 2.0 * (rows * shape.kv_width() * 2) as f64;
        row.insert("gb_s".to_owned(), rounded(bytes / ms / 1e6, 0));
    }
    Ok(row)
}
