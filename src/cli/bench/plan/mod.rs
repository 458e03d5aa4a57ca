//! `apbd bench plan`: what prefills on many GPUs would take, and which cut of a pool into groups serves a mix of documents best.
//!
//! Invariant: nothing is measured here; where the rates come from is printed with what follows from them.

mod layouts;
mod predictions;

use std::path::PathBuf;

use clap::ValueEnum;

use super::shapes::ShapeName;
use crate::cli::database::Format;
use crate::cli::device::KvCacheName;
use crate::cli::execution::ExecutionArgs;
use crate::cli::{CliError, Status};
use crate::cost::{Calibration, CostModel, Link};
use crate::plan::{AttentionMode, AttentionRequest, Capabilities, Placement, PlanError, PrefillPlan, hosts_for};
use crate::simulate::Mix;

/// Nodes of the largest cluster that is looked at.
const MOST_NODES: usize = 4096;

/// Options of `apbd bench plan`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// GPUs of a node.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    gpus: u16,
    /// Nodes: numbers, or a range that is gone through by doubling, such as 1..64.
    #[arg(long, value_name = "N", default_value = "1", value_parser = nodes)]
    nodes: Nodes,
    /// Context lengths in tokens; 128k is 131072.
    #[arg(long, value_delimiter = ',', default_value = "128k", value_parser = super::tokens)]
    tokens: Vec<usize>,
    /// Model whose shapes are taken.
    #[arg(long, value_enum, default_value_t = ShapeName::Llama31)]
    shape: ShapeName,
    /// Attention strategies; by default all, and for a mix what the daemon would take.
    #[arg(long, value_enum, value_delimiter = ',')]
    attention: Vec<StrategyName>,
    /// Hosts; by default for star and APB the most of 8, of what makes blocks of 64K tokens, and of the GPUs; for ring and Ulysses as many as there are GPUs
    /// (paired: twice as many); for a mix what the daemon would take.
    #[arg(long, value_name = "N")]
    hosts: Option<usize>,
    /// Anchor length; by default the paper's for the context.
    #[arg(long, value_name = "N")]
    anchor: Option<usize>,
    /// Passing length; by default the paper's for the context; of more than its 8 hosts as much together.
    #[arg(long, value_name = "N")]
    passing: Option<usize>,
    #[command(flatten)]
    execution: ExecutionArgs,
    /// Hidden units of the retaining heads.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    head_width: usize,
    /// How keys and values are kept for decode.
    #[arg(long, value_enum, default_value_t = KvCacheName::Native)]
    kv_cache: KvCacheName,
    /// Query tokens.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    query: usize,
    /// Tokens that are generated.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = positive)]
    new_tokens: usize,
    /// Sequences that generate together.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    batch: usize,
    /// Rates of another device or another network: JSON, as `apbd bench calibrate --format json` prints it. By default those of an H100.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// A row for every rank.
    #[arg(long)]
    ranks: bool,
    /// Simulates the queue of a mix of documents, such as 4K:30,32K:50,128K:20 (length and how often), or a file with that: which cut into groups is best?
    #[arg(long, value_name = "MIX")]
    mix: Option<String>,
    #[command(flatten)]
    queue: layouts::QueueArgs,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Strategies of `--attention`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StrategyName {
    Apb,
    Star,
    Ring,
    Ulysses,
    Full,
}

impl StrategyName {
    fn mode(self) -> AttentionMode {
        match self {
            Self::Apb => AttentionMode::Apb,
            Self::Star => AttentionMode::Star,
            Self::Ring => AttentionMode::Ring,
            Self::Ulysses => AttentionMode::Ulysses,
            Self::Full => AttentionMode::Full,
        }
    }
}

/// Numbers of nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Nodes(Vec<usize>);

/// `4`, `1,2,8`, `1..64`: the last by doubling, both ends included.
fn nodes(text: &str) -> Result<Nodes, String> {
    let number = |text: &str| {
        let number = text.trim().parse::<usize>().ok().filter(|nodes| (1..=MOST_NODES).contains(nodes));
        number.ok_or_else(|| format!("'{text}' is no number of nodes between 1 and {MOST_NODES}"))
    };
    let mut all = Vec::new();
    for part in text.split(',') {
        match part.split_once("..") {
            None => all.push(number(part)?),
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last.trim_start_matches('='))?);
                if first > last {
                    return Err(format!("the range {part} is empty"));
                }
                let doubled = std::iter::successors(Some(first), |nodes| Some(2 * nodes));
                all.extend(doubled.take_while(|nodes| *nodes < last).chain([last]));
            }
        }
    }
    Ok(Nodes(all))
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| format!("'{text}' is no positive number"))
}

impl Args {
    /// Predicts and prints.
    pub(super) fn execute(&self) -> Result<Status, CliError> {
        let model = self.model()?;
        match &self.mix {
            None => predictions::print(self, &model)?,
            Some(mix) => layouts::print(self, &model, &read_mix(mix)?)?,
        }
        Ok(Status::Done)
    }

    fn model(&self) -> Result<CostModel, CliError> {
        let mut calibration = match &self.calibration {
            Some(path) => super::calibrate::read_calibration(path)?,
            None => Calibration::h100(),
        };
        calibration.network.gpus_per_node = usize::from(self.gpus);
        let is_fp8 = self.kv_cache == KvCacheName::Fp8;
        Ok(CostModel::new(self.shape.cost_shape(self.head_width, is_fp8), calibration))
    }

    /// How a context of `tokens` tokens is cut for `ranks` ranks; `None`: as the daemon cuts it where a job leaves it open.
    fn plan(&self, mode: Option<AttentionMode>, tokens: usize, ranks: usize) -> Result<PrefillPlan, PlanError> {
        let execution = self.execution.of_plan();
        let in_pairs = execution.placement == Placement::Paired && ranks > 1;
        let hosts = self.hosts.or(match mode {
            None => None,
            Some(AttentionMode::Full) => Some(1),
            Some(AttentionMode::Ring | AttentionMode::Ulysses) if in_pairs => Some(2 * ranks),
            Some(AttentionMode::Ring | AttentionMode::Ulysses) => Some(ranks),
            Some(AttentionMode::Star | AttentionMode::Apb) => Some(ranks.max(hosts_for(tokens))),
        });
        let is_apb = matches!(mode, None | Some(AttentionMode::Apb));
        let request = AttentionRequest {
            mode,
            hosts,
            anchor: self.anchor.filter(|_| !mode.is_some_and(AttentionMode::is_exact)),
            passing: self.passing.filter(|_| is_apb),
            execution,
            ..AttentionRequest::default()
        };
        let capabilities = Capabilities { has_retaining_heads: self.head_width > 0, max_hosts: usize::MAX };
        PrefillPlan::new(tokens, self.query, 0, &request, capabilities)
    }
}

/// Where the rates come from, in words.
fn provenance(calibration: &Calibration) -> String {
    let named = |link: &Link| format!("{} GB/s ({})", link.gb_s, if link.measured { "measured" } else { "assumed" });
    let (within, between) = (named(&calibration.network.within), named(&calibration.network.between));
    format!(
        "Predicted with the rates of {}; links: {within} within a node, {between} a GPU between nodes.\n",
        calibration.device
    )
}

fn read_mix(text: &str) -> Result<Mix, CliError> {
    let path = std::path::Path::new(text);
    let content = match path.is_file() {
        true => std::fs::read_to_string(path).map_err(|error| CliError::Usage(format!("{text}: {error}")))?,
        false => text.to_owned(),
    };
    content.parse().map_err(|error| CliError::Usage(format!("--mix: {error}")))
}

fn refused(error: &PlanError) -> CliError {
    CliError::Usage(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_numbers_and_ranges() {
        assert_eq!(nodes("4"), Ok(Nodes(vec![4])));
        assert_eq!(nodes("1..64"), Ok(Nodes(vec![1, 2, 4, 8, 16, 32, 64])));
        assert_eq!(nodes("3,4..12"), Ok(Nodes(vec![3, 4, 8, 12])));
        for wrong in ["0", "", "4..2", "1..", "many", "1..100000"] {
            assert!(nodes(wrong).is_err(), "{wrong}");
        }
    }
}
