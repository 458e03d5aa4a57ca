//! Predicted prefills: a row for each length, number of nodes and strategy, or for each rank of one.
//!
//! Invariant: the stages of a row are those of the rank that computes most; with what it waits for they are all its time.

use serde_json::json;

use super::{Args, StrategyName, provenance, refused};
use crate::cli::bench::report::{self, Row, rounded};
use crate::cli::database::Format;
use crate::cli::{CliError, print as print_text};
use crate::cost::{CostModel, RankCost, Stages};
use crate::engine::MAX_HOSTS;
use crate::plan::PrefillPlan;

const ALL: [StrategyName; 5] =
    [StrategyName::Apb, StrategyName::Star, StrategyName::Ring, StrategyName::Ulysses, StrategyName::Full];

/// Prints the predictions.
pub(super) fn print(args: &Args, model: &CostModel) -> Result<(), CliError> {
    let strategies = if args.attention.is_empty() { &ALL[..] } else { &args.attention };
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    for &tokens in &args.tokens {
        for &strategy in strategies {
            // Full attention runs on one GPU, however many there are.
            let nodes = if strategy == StrategyName::Full { &[1][..] } else { &args.nodes.0 };
            for &nodes in nodes {
                let gpus = if strategy == StrategyName::Full { 1 } else { nodes * usize::from(args.gpus) };
                let plan = args.plan(Some(strategy.mode()), tokens, gpus).map_err(|error| refused(&error))?;
                if plan.hosts.len() > MAX_HOSTS {
                    notes.push(format!(
                        "The engine takes {MAX_HOSTS} hosts at most; plans with more are looked at all the same.\n"
                    ));
                }
                rows.extend(rows_of(args, model, &plan, (nodes, gpus)));
            }
        }
    }
    if args.format == Format::Json {
        rows.insert(0, calibration_row(model));
        return report::print(&rows, Format::Json);
    }
    report::print(&rows, Format::Table)?;
    notes.dedup();
    notes.truncate(1);
    print_text(&format!("\n{}{}", provenance(&model.calibration), notes.concat()))
}

/// What the predictions follow from.
fn calibration_row(model: &CostModel) -> Row {
    let mut row = Row::new();
    row.insert("what".to_owned(), json!("calibration"));
    row.insert("calibration".to_owned(), json!(model.calibration));
    row
}

fn rows_of(args: &Args, model: &CostModel, plan: &PrefillPlan, (nodes, gpus): (usize, usize)) -> Vec<Row> {
    let cost = model.prefill(plan, gpus);
    let memory = |rank| {
        let bytes = model.memory_of_rank(plan, rank, gpus, args.new_tokens);
        (gib(bytes + model.shape.weight_bytes()), bytes <= model.memory_budget())
    };
    let head = |what: &str| {
        let mut row = Row::new();
        if args.format == Format::Json {
            row.insert("what".to_owned(), json!(what));
        }
        row.insert("tokens".to_owned(), json!(plan.context));
        row.insert("attention".to_owned(), json!(plan.mode));
        row.insert("nodes".to_owned(), json!(nodes));
        row.insert("gpus".to_owned(), json!(gpus));
        row.insert("hosts".to_owned(), json!(plan.hosts.len()));
        row
    };
    if args.ranks {
        let of_rank = |(rank, cost): (usize, &RankCost)| {
            let mut row = head("rank");
            row.insert("rank".to_owned(), json!(rank));
            row.insert("rows".to_owned(), json!(cost.rows));
            let (gib, fits) = memory(rank);
            row.insert("gib".to_owned(), rounded(gib, 1));
            row.insert("fits".to_owned(), json!(fits));
            insert_stages(&mut row, &cost.stages);
            row
        };
        return cost.ranks.iter().enumerate().map(of_rank).collect();
    }
    let busiest = cost.ranks.iter().max_by(|one, other| one.stages.busy_s().total_cmp(&other.stages.busy_s()));
    let most = (0..cost.ranks.len()).map(memory).max_by(|one, other| one.0.total_cmp(&other.0)).unwrap_or((0.0, true));
    let passing = plan.hosts.iter().map(|host| host.compressed).max().unwrap_or(0);
    let mut row = head("prefill");
    row.insert("anchor".to_owned(), json!(plan.anchor.as_ref().map_or(0, |anchor| anchor.len)));
    row.insert("passing".to_owned(), json!(passing));
    row.insert("seconds".to_owned(), rounded(cost.seconds, 3));
    row.insert("tokens_s".to_owned(), rounded(plan.context as f64 / cost.seconds, 0));
    row.insert("pflop".to_owned(), rounded(cost.flops() / 1e15, 2));
    row.insert("gib".to_owned(), rounded(most.0, 1));
    row.insert("fits".to_owned(), json!(most.1));
    let busy: f64 = cost.ranks.iter().map(|rank| rank.stages.busy_s()).sum();
    row.insert("busy_percent".to_owned(), rounded(100.0 * busy / cost.seconds / cost.ranks.len() as f64, 1));
    insert_stages(&mut row, &busiest.map(|rank| rank.stages).unwrap_or_default());
    let context = model.kept_tokens(plan) + args.new_tokens / 2;
    let token_s = model.batch_step_s(args.batch, (args.batch * context) as f64, gpus);
    row.insert("token_ms".to_owned(), rounded(1e3 * token_s, 2));
    vec![row]
}

/// Milliseconds of each stage.
fn insert_stages(row: &mut Row, stages: &Stages) {
    let named = [
        ("qkv_ms", stages.qkv_s),
        ("head_ms", stages.retaining_head_s),
        ("attention_ms", stages.attention_s),
        ("o_ms", stages.o_s),
        ("ffn_ms", stages.ffn_s),
        ("other_ms", stages.other_s),
        ("hidden_ms", stages.communication_hidden_s),
        ("sending_ms", stages.communication_s),
        ("waiting_ms", stages.waiting_s),
    ];
    for (name, seconds) in named {
        row.insert(name.to_owned(), rounded(1e3 * seconds, 1));
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
