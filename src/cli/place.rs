//! One document over several machines: which of them this is, and where they meet.
//!
//! Invariant: the token never stands on a command line.

use std::time::Duration;

use super::CliError;
use crate::comm::hub::Place;

/// Where the token comes from.
pub(super) const TOKEN_VARIABLE: &str = "APBD_HUB_TOKEN";

/// Options of a group on several nodes. Given by `apbd serve` to the engine's process; by hand for experiments.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct NodeArgs {
    /// Nodes that work on a document together, each with as many ranks.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    nodes: u16,
    /// Number of this node; the first is 0, and the others do what it decides.
    #[arg(long, value_name = "N", default_value_t = 0)]
    node: u16,
    /// Where the nodes meet: the first node's address and port, as the others reach it.
    #[arg(long, value_name = "HOST:PORT")]
    hub: Option<String>,
    /// Where the first node listens for them; by default at the address of `--hub`.
    #[arg(long, value_name = "ADDRESS:PORT")]
    hub_listen: Option<String>,
    /// Seconds until all nodes have to be there.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    hub_start_s: u64,
    /// What keeps nodes of other groups out, and those of an earlier time; the same on all nodes.
    #[arg(long, env = TOKEN_VARIABLE, hide = true, hide_env_values = true, default_value = "")]
    hub_token: String,
}

impl NodeArgs {
    /// Whether this is another node than the first.
    pub fn is_follower(&self) -> bool {
        self.nodes > 1 && self.node > 0
    }

    /// This node's place; none where there is one node.
    pub fn place(&self) -> Result<Option<Place>, CliError> {
        if self.nodes == 1 {
            return Ok(None);
        }
        if self.node >= self.nodes {
            let reason =
                format!("--node {}: of {} nodes the last has number {}", self.node, self.nodes, self.nodes - 1);
            return Err(CliError::Usage(reason));
        }
        let Some(address) = self.hub.clone() else {
            return Err(CliError::Usage("--nodes: --hub is missing, the address of the first node".to_owned()));
        };
        Ok(Some(Place {
            node: self.node.into(),
            nodes: self.nodes.into(),
            listen: self.hub_listen.clone().unwrap_or_else(|| address.clone()),
            address,
            token: self.hub_token.clone(),
            start: Duration::from_secs(self.hub_start_s),
        }))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        nodes: NodeArgs,
    }

    fn place(arguments: &[&str]) -> Result<Option<Place>, String> {
        let line = Line::try_parse_from([&["apbd"], arguments].concat()).map_err(|error| error.to_string())?;
        line.nodes.place().map_err(|error| error.to_string())
    }

    #[test]
    fn several_nodes_need_a_place_to_meet_and_a_number_each() {
        assert_eq!(place(&[]), Ok(None));
        assert!(place(&["--nodes", "2"]).unwrap_err().contains("--hub is missing"));
        assert!(place(&["--nodes", "2", "--node", "2", "--hub", "a:1"]).unwrap_err().contains("the last has number 1"));
        let first = place(&["--nodes", "2", "--hub", "a:1", "--hub-listen", "0.0.0.0:1"]).unwrap().unwrap();
        assert_eq!((first.node, &*first.listen, &*first.address), (0, "0.0.0.0:1", "a:1"));
        let second = place(&["--nodes", "2", "--node", "1", "--hub", "a:1"]).unwrap().unwrap();
        assert_eq!((second.node, &*second.listen), (1, "a:1"));
    }
}
