//! Which cut of a pool into groups serves a mix of documents best: every cut is simulated, and the reasons are printed with the answer.
//!
//! Invariant: all cuts get the same documents at the same times.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Args, provenance, refused};
use crate::cli::bench::report::{self, Row, rounded};
use crate::cli::database::{Format, print_json};
use crate::cli::{CliError, print as print_text};
use crate::cost::CostModel;
use crate::engine::schedule::Limits;
use crate::simulate::{Arrivals, Latency, Layout, Mix, Outcome, Profiles, Simulation, SimulationOptions, layouts};

/// GPUs up to which a pool is simulated as a whole; of a larger one, a part of whole nodes stands for the others.
const MOST_GPUS: usize = 16;
/// Documents of a simulation for each GPU, at least.
const DOCUMENTS_PER_GPU: usize = 125;
/// Cuts whose documents an hour differ by no more are equally good; then latency decides.
const AS_GOOD: f64 = 0.01;

/// Options of the queue.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct QueueArgs {
    /// Documents an hour that come, for the latencies; by default 70 % of what the best cut can do.
    #[arg(long, value_name = "N", requires = "mix")]
    per_hour: Option<f64>,
    /// Documents that are simulated; by default 125 for each GPU, 500 at least.
    #[arg(long, value_name = "N", requires = "mix", value_parser = super::positive)]
    documents: Option<usize>,
    /// Sequences that a group works on at a time.
    #[arg(long, value_name = "N", default_value_t = 48, value_parser = super::positive)]
    at_once: usize,
    /// Milliseconds that prefills may take between two tokens of what generates.
    #[arg(long, value_name = "MS", default_value_t = 200)]
    stall: u64,
    /// Seed of all that is random.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// A pool, or the part of it that is simulated.
struct Pool {
    nodes: usize,
    /// How often the part is there.
    times: f64,
}

/// A cut and what came of it.
struct Tried {
    layout: Layout,
    /// With all documents there from the start.
    drained: Outcome,
    latency: Latency,
}

/// Prints the answer for every number of nodes.
pub(super) fn print(args: &Args, model: &CostModel, mix: &Mix) -> Result<(), CliError> {
    if args.attention.len() > 1 {
        return Err(CliError::Usage(
            "--mix takes one strategy; without one, what the daemon takes for each length".to_owned(),
        ));
    }
    let mut answers = Vec::new();
    for &nodes in &args.nodes.0 {
        answers.push(answer(args, model, mix, nodes)?);
    }
    match args.format {
        Format::Json => print_json(&json!({ "calibration": model.calibration, "pools": answers })),
        Format::Table => print_text(&provenance(&model.calibration)),
    }
}

/// Simulates all cuts of one pool; as a table it is printed at once.
fn answer(args: &Args, model: &CostModel, mix: &Mix, nodes: usize) -> Result<Value, CliError> {
    let per_node = usize::from(args.gpus);
    let simulated = nodes.min((MOST_GPUS / per_node).max(1));
    let pool = Pool { nodes: simulated, times: nodes as f64 / simulated as f64 };
    let cuts = layouts(per_node, pool.nodes);
    let mut sizes: Vec<usize> = cuts.iter().flat_map(Layout::sizes).map(|(size, _)| size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let mode = args.attention.first().map(|strategy| strategy.mode());
    let plan = |tokens, ranks| args.plan(mode, tokens, ranks);
    let profiles = Profiles::new(model, mix, &sizes, args.queue.at_once, args.new_tokens, plan);
    let profiles = profiles.map_err(|error| refused(&error))?;
    let (tried, per_hour) = simulate(args, mix, &profiles, cuts, per_node * pool.nodes);
    let costs = cost_rows(mix, &profiles, &sizes);
    let rows: Vec<Row> = tried.iter().map(|tried| layout_row(tried, &pool)).collect();
    let verdict = verdict(mix, &profiles, &tried, &pool);
    if args.format == Format::Table {
        print_text(&format!(
            "{nodes} x {per_node} GPUs: seconds of a prefill, and GPU seconds, by the size of the group\n"
        ))?;
        report::print(&costs, Format::Table)?;
        let load = format!("latency with {:.0} documents an hour that come at random", per_hour * pool.times);
        let part = match pool.times > 1.0 {
            true => format!(" of every {} nodes, which were simulated for all", pool.nodes),
            false => String::new(),
        };
        print_text(&format!("\nGroups (count x GPUs){part}, the best first; {load}\n"))?;
        report::print(&rows, Format::Table)?;
        print_text(&format!("\n{verdict}"))?;
    }
    Ok(
        json!({ "nodes": nodes, "gpus_per_node": per_node, "arrivals_per_hour": per_hour * pool.times, "costs": costs, "layouts": rows, "verdict": verdict }),
    )
}

/// All cuts, the best first, and the documents an hour with which the latencies were taken.
fn simulate(args: &Args, mix: &Mix, profiles: &Profiles<'_>, cuts: Vec<Layout>, gpus: usize) -> (Vec<Tried>, f64) {
    let limits = Limits { at_once: args.queue.at_once, stall: Duration::from_millis(args.queue.stall) };
    let documents = args.queue.documents.unwrap_or((DOCUMENTS_PER_GPU * gpus).max(500));
    let options = |arrivals| SimulationOptions {
        documents,
        arrivals,
        new_tokens: args.new_tokens,
        limits,
        seed: args.queue.seed,
    };
    let run = |layout: &Layout, arrivals| Simulation::run(layout, mix, profiles, options(arrivals));
    let drained: Vec<Outcome> = cuts.iter().map(|layout| run(layout, Arrivals::AtOnce)).collect();
    let best =
        drained.iter().filter(|outcome| outcome.refused == 0).map(|outcome| outcome.per_hour).fold(0.0, f64::max);
    let best = if best > 0.0 { best } else { drained.iter().map(|outcome| outcome.per_hour).fold(0.0, f64::max) };
    let per_hour = args.queue.per_hour.filter(|per_hour| *per_hour > 0.0).unwrap_or(0.7 * best);
    let latency = |layout: &Layout| run(layout, Arrivals::Random { per_s: per_hour / 3600.0 }).latency(None);
    let mut tried: Vec<Tried> = cuts
        .into_iter()
        .zip(drained)
        .map(|(layout, drained)| Tried { latency: latency(&layout), drained, layout })
        .collect();
    tried.sort_by(|one, other| {
        let key = |tried: &Tried| (tried.drained.refused, -tried.drained.per_hour);
        let ((refused, speed), (other_refused, other_speed)) = (key(one), key(other));
        refused.cmp(&other_refused).then(speed.total_cmp(&other_speed))
    });
    // Of those that are as good as the best, the one with the shortest latency.
    let (refused, speed) = tried.first().map_or((0, 0.0), |best| (best.drained.refused, best.drained.per_hour));
    let as_good =
        |tried: &&Tried| tried.drained.refused == refused && tried.drained.per_hour >= (1.0 - AS_GOOD) * speed;
    let equals = tried.iter().take_while(as_good).count();
    tried[..equals].sort_by(|one, other| one.latency.p95_s.total_cmp(&other.latency.p95_s));
    (tried, per_hour)
}

/// Seconds of each length on groups of each size.
fn cost_rows(mix: &Mix, profiles: &Profiles<'_>, sizes: &[usize]) -> Vec<Row> {
    let row = |(part, share): (usize, f64)| {
        let mut row = Row::new();
        row.insert("tokens".to_owned(), json!(mix.parts[part].tokens));
        row.insert("percent".to_owned(), rounded(100.0 * share, 1));
        for &ranks in sizes {
            let cost = match profiles.get(ranks, part) {
                Some(profile) => {
                    let seconds = profile.prefill_s();
                    json!(format!("{seconds:.2} ({:.2})", seconds * ranks as f64))
                }
                None => json!("does not fit"),
            };
            row.insert(format!("{ranks} GPU"), cost);
        }
        row
    };
    mix.shares().into_iter().enumerate().map(row).collect()
}

fn layout_row(tried: &Tried, pool: &Pool) -> Row {
    let mut row = Row::new();
    row.insert("groups".to_owned(), json!(tried.layout.to_string()));
    row.insert("documents_h".to_owned(), rounded(tried.drained.per_hour * pool.times, 0));
    row.insert("busy_percent".to_owned(), rounded(100.0 * tried.drained.busy_share, 1));
    row.insert("p50_s".to_owned(), rounded(tried.latency.p50_s, 1));
    row.insert("p95_s".to_owned(), rounded(tried.latency.p95_s, 1));
    let all = tried.drained.refused + tried.drained.done.len();
    row.insert("too_long_percent".to_owned(), rounded(100.0 * tried.drained.refused as f64 / all.max(1) as f64, 1));
    row
}

/// Which cut is best, and why, in words.
fn verdict(mix: &Mix, profiles: &Profiles<'_>, tried: &[Tried], pool: &Pool) -> String {
    let Some(best) = tried.first() else { return String::new() };
    let speed = |tried: &Tried| tried.drained.per_hour * pool.times;
    let mut text =
        format!("Best: {}, {:.0} documents an hour, p95 {:.1} s.\n", best.layout, speed(best), best.latency.p95_s);
    let (part, share) = heaviest(mix, profiles);
    let length = mix.parts[part].tokens;
    let per_gpu: Vec<String> = sizes_of(tried)
        .into_iter()
        .filter_map(|ranks| {
            let seconds = profiles.get(ranks, part)?.prefill_s() * ranks as f64;
            Some(format!("{seconds:.2} on {ranks}"))
        })
        .collect();
    let _ = writeln!(
        text,
        "Why: documents of {length} tokens are {:.0} % of the work of prefills; one takes GPU seconds: {}.",
        100.0 * share,
        per_gpu.join(", ")
    );
    let refusing = tried.iter().filter(|tried| tried.drained.refused > best.drained.refused).count();
    if refusing > 0 {
        let _ = writeln!(text, "{refusing} cuts have no group that the longest documents fit into.");
    }
    if best.drained.refused > 0 {
        let _ = writeln!(text, "No cut has a group that the longest documents fit into: they are left out.");
    }
    let others = tried[1..].iter().filter(|tried| tried.drained.refused == best.drained.refused);
    let quickest = others.min_by(|one, other| one.latency.p95_s.total_cmp(&other.latency.p95_s));
    if let Some(quickest) = quickest.filter(|quickest| quickest.latency.p95_s < 0.9 * best.latency.p95_s) {
        let _ = writeln!(
            text,
            "For latency: {}, p95 {:.1} s, {:.0} documents an hour ({:+.0} %).",
            quickest.layout,
            quickest.latency.p95_s,
            speed(quickest),
            100.0 * (speed(quickest) / speed(best) - 1.0)
        );
    }
    text
}

/// The part of a mix whose documents take most of the prefills' time on the smallest groups they fit, and its share of it.
fn heaviest(mix: &Mix, profiles: &Profiles<'_>) -> (usize, f64) {
    let work = |(part, share): (usize, f64)| {
        let smallest = profiles.sizes().find_map(|ranks| Some(profiles.get(ranks, part)?.prefill_s() * ranks as f64));
        share * smallest.unwrap_or(0.0)
    };
    let work: Vec<f64> = mix.shares().into_iter().enumerate().map(work).collect();
    let all: f64 = work.iter().sum();
    let heaviest = work.iter().enumerate().max_by(|one, other| one.1.total_cmp(other.1));
    heaviest.map_or((0, 0.0), |(part, work)| (part, if all > 0.0 { work / all } else { 0.0 }))
}

/// Sizes of groups that occur, ascending.
fn sizes_of(tried: &[Tried]) -> Vec<usize> {
    let mut sizes: Vec<usize> = tried.iter().flat_map(|tried| tried.layout.sizes()).map(|(size, _)| size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}
