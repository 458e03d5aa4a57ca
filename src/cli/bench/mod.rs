//! `apbd bench`: the engine's speed on a GPU, with random weights of real models' shapes, beside the device's ceilings in the same run; and what follows
//! from it for many GPUs.
//!
//! Invariant: every figure of `prefill`, `decode` and `attention` is measured in this process, on this device; only `plan` predicts, and says so.

#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod batch;
mod calibrate;
#[cfg(feature = "cuda")]
mod ceilings;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod decode;
#[cfg(feature = "cuda")]
mod mixed;
mod plan;
#[cfg(feature = "cuda")]
mod prefill;
mod report;
mod shapes;

use clap::{Subcommand, ValueEnum};

use super::database::Format;
use super::{CliError, Status};
use shapes::ShapeName;

/// Arguments of `apbd bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to measure.
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Prefills of whole documents, with the share of each stage.
    Prefill(Options),
    /// Generated tokens, of one document after a prefill or of several at a time.
    Decode(DecodeOptions),
    /// A lot of documents of mixed lengths, all at once: documents an hour.
    Mixed(MixedOptions),
    /// The attention kernels alone.
    Attention(Options),
    /// What a cluster would do, predicted: time and memory of each stage and rank; the best cut of a pool into groups.
    Plan(plan::Args),
    /// The rates that `plan` predicts with, from measured prefills and decodes.
    Calibrate(calibrate::Args),
}

/// Options of all benchmarks.
#[derive(Debug, Clone, clap::Args)]
struct Options {
    /// Model whose shapes are taken.
    #[arg(long, value_enum, default_value_t = ShapeName::Llama31)]
    shape: ShapeName,
    /// Context lengths in tokens; 128k is 131072.
    #[arg(long, value_delimiter = ',', default_value = "32k", value_parser = tokens)]
    tokens: Vec<usize>,
    /// Attention strategies.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "full,star,apb")]
    attention: Vec<Strategy>,
    /// GPUs that work on a document together (prefill, decode).
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = ranks)]
    ranks: usize,
    /// Numbers of those GPUs; by default the first ones.
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    devices: Vec<usize>,
    /// Hosts of all strategies but full.
    #[arg(long, value_name = "N", default_value_t = 8)]
    hosts: usize,
    /// Anchor length; by default the paper's for the context.
    #[arg(long, value_name = "N")]
    anchor: Option<usize>,
    /// Passing length; by default the paper's for the context; of more than its 8 hosts as much together.
    #[arg(long, value_name = "N")]
    passing: Option<usize>,
    #[command(flatten)]
    execution: super::execution::ExecutionArgs,
    /// Hidden units of the retaining heads.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    head_width: usize,
    /// How keys and values are kept for decode.
    #[arg(long, value_enum, default_value_t = super::device::KvCacheName::Native)]
    kv_cache: super::device::KvCacheName,
    /// Kernels of products of few rows.
    #[arg(long, value_enum, default_value_t = ProductName::Skinny)]
    products: ProductName,
    /// Query tokens.
    #[arg(long, value_name = "N", default_value_t = 64)]
    query: usize,
    /// Tokens to generate (decode).
    #[arg(long, value_name = "N", default_value_t = 32)]
    steps: usize,
    /// Runs of each; the median counts.
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeats: usize,
    /// One run alone, not warmed up, without the shares of the stages: for prefills of minutes (prefill).
    #[arg(long, conflicts_with = "repeats")]
    once: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Options of decode.
#[derive(Debug, Clone, clap::Args)]
struct DecodeOptions {
    #[command(flatten)]
    common: Options,
    /// Sequences that decode together, each over random keys and values of its own; without it one, after a prefill by each strategy.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=64))]
    batch: Vec<u16>,
}

/// Options of a mixed lot.
#[derive(Debug, Clone, clap::Args)]
struct MixedOptions {
    #[command(flatten)]
    common: Options,
    /// Documents.
    #[arg(long, value_name = "N", default_value_t = 64)]
    documents: usize,
    /// Tokens of the shortest.
    #[arg(long, value_name = "N", default_value = "4k", value_parser = tokens)]
    shortest: usize,
    /// Tokens of the longest.
    #[arg(long, value_name = "N", default_value = "128k", value_parser = tokens)]
    longest: usize,
    /// Tokens that each generates.
    #[arg(long, value_name = "N", default_value_t = 256)]
    new_tokens: usize,
}

/// Kernels of products of few rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProductName {
    /// Ours for up to 32 rows.
    Skinny,
    /// The same from two rows on, and for one row ours for vectors.
    Vector,
    /// For one row ours for vectors, cuBLASLt for more.
    Library,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Strategy {
    Full,
    Ring,
    Ulysses,
    Star,
    Apb,
}

impl Args {
    /// Measures or predicts, and prints.
    pub fn execute(self) -> Result<Status, CliError> {
        match &self.what {
            What::Plan(args) => args.execute(),
            What::Calibrate(args) => args.execute(),
            #[cfg(feature = "cuda")]
            what => cuda::execute(what),
            #[cfg(not(feature = "cuda"))]
            _ => Err(super::device::no_cuda()),
        }
    }
}

#[cfg(feature = "cuda")]
impl Options {
    /// How many GPUs there are.
    fn gpus(&self) -> usize {
        self.ranks.max(self.devices.len())
    }
}

fn ranks(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|ranks| *ranks > 0).ok_or_else(|| format!("'{text}' is no number of ranks"))
}

/// `4096`, `32k`, `1m`.
fn tokens(text: &str) -> Result<usize, String> {
    crate::simulate::tokens(text).ok_or_else(|| format!("'{text}' is no number of tokens"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_units() {
        assert_eq!(tokens("4096"), Ok(4096));
        assert_eq!(tokens("128K"), Ok(131_072));
        assert_eq!(tokens("1m"), Ok(1_048_576));
        assert!(tokens("0").is_err() && tokens("many").is_err() && tokens("-1k").is_err());
    }
}
