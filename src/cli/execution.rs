//! How a plan is carried out: the options that `forward` and `bench prefill` share.
//!
//! Invariant: an option that is left out is what a plan has without it.

use clap::ValueEnum;

use crate::plan::{Execution, PassingType, Placement};

/// Options of execution.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ExecutionArgs {
    /// Which hosts share a rank: neighbours, or early ones with late ones, which evens out the ranks' work.
    #[arg(long, value_enum, default_value_t = PlacementName::Paired)]
    pub placement: PlacementName,
    /// Whether blocks of other ranks are awaited while a rank's own are attended to.
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub overlap: Switch,
    /// In which type passing blocks go from rank to rank: fp8 halves them and costs some exactness.
    #[arg(long, value_enum, default_value_t = PassingTypeName::Native)]
    pub passing_type: PassingTypeName,
    /// Whether the query goes through the layers together with the context, which saves a pass over the weights.
    #[arg(long, value_enum, default_value_t = Switch::Off)]
    pub query_with_context: Switch,
}

/// Placements of `--placement`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PlacementName {
    /// Neighbours.
    Contiguous,
    /// With 2R hosts on R ranks, hosts r and 2R-1-r on rank r.
    Paired,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Switch {
    On,
    Off,
}

/// Types of `--passing-type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PassingTypeName {
    /// As they are computed.
    Native,
    /// FP8 (e4m3), a scale for every row and head.
    Fp8,
}

impl ExecutionArgs {
    /// As a plan has them.
    pub fn of_plan(&self) -> Execution {
        Execution {
            placement: match self.placement {
                PlacementName::Contiguous => Placement::Contiguous,
                PlacementName::Paired => Placement::Paired,
            },
            overlap: self.overlap == Switch::On,
            passing_type: match self.passing_type {
                PassingTypeName::Native => PassingType::Native,
                PassingTypeName::Fp8 => PassingType::Fp8,
            },
            query_with_context: self.query_with_context == Switch::On,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        execution: ExecutionArgs,
    }

    fn parsed(arguments: &[&str]) -> Execution {
        let words = ["command"].iter().chain(arguments);
        Command::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).execution.of_plan()
    }

    #[test]
    fn what_is_left_out_is_the_default_of_a_plan() {
        assert_eq!(parsed(&[]), Execution::default());
        let all = parsed(&[
            "--placement",
            "contiguous",
            "--overlap",
            "off",
            "--passing-type",
            "fp8",
            "--query-with-context",
            "on",
        ]);
        let expected = Execution {
            placement: Placement::Contiguous,
            overlap: false,
            passing_type: PassingType::Fp8,
            query_with_context: true,
        };
        assert_eq!(all, expected);
    }
}
