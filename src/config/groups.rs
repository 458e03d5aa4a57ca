//! The groups of the pool: which devices work on documents together.
//!
//! Invariant: no GPU is in two groups; there is one group at least, also where none is written down.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::checked::{fault, refuse};
use super::raw;

/// Seconds until all nodes of a group have to be there, where nothing is said: what a large model takes to load from a slow disk.
const NODES_WITHIN_S: u64 = 600;

/// Devices with an engine of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupConfig {
    /// Its name in logs and metrics.
    pub name: String,
    /// Where its model is; absent: where the engine's is.
    pub model: Option<PathBuf>,
    /// `cpu` or `cuda`.
    pub backend: String,
    /// GPUs by their numbers, one a rank; empty: the first ones.
    pub gpus: Vec<usize>,
    /// Ranks that work on a document together.
    pub ranks: usize,
    /// Threads of all ranks on the CPU; absent: all there are.
    pub threads: Option<usize>,
    /// The other nodes, where documents are worked on by several.
    pub nodes: Option<NodesConfig>,
    /// Another program in the place of this one's own engine, with its arguments; empty: this one.
    pub command: Vec<String>,
}

/// Several machines that work on a document together, each with the same devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodesConfig {
    /// How many.
    pub count: usize,
    /// Where the first one is reached by the others.
    pub address: String,
    /// Where it listens for them.
    pub listen: String,
    /// Time until all have to be there with their models loaded.
    pub within: Duration,
}

/// The one group of a configuration without `[[pool.group]]`.
pub(super) fn only_one(engine: &raw::Engine, faults: &mut Vec<String>) -> Vec<GroupConfig> {
    refuse(faults, engine.ranks == Some(0), "[engine] ranks: at least 1");
    refuse(faults, engine.threads == Some(0), "[engine] threads: at least 1");
    let backend = engine.backend.clone().unwrap_or_else(|| "cpu".to_owned());
    refuse(faults, !["cpu", "cuda"].contains(&backend.as_str()), "[engine] backend: cpu or cuda");
    vec![GroupConfig {
        name: "1".to_owned(),
        model: None,
        backend,
        gpus: Vec::new(),
        ranks: engine.ranks.unwrap_or(1),
        threads: engine.threads,
        nodes: None,
        command: engine.command.clone().unwrap_or_default(),
    }]
}

/// All of `[[pool.group]]`.
pub(super) fn check(
    engine: &raw::Engine,
    groups: Vec<(usize, raw::Group)>,
    faults: &mut Vec<String>,
) -> Vec<GroupConfig> {
    let said = [
        ("ranks", engine.ranks.is_some()),
        ("threads", engine.threads.is_some()),
        ("backend", engine.backend.is_some()),
    ];
    for (key, _) in said.iter().filter(|(_, is_said)| *is_said) {
        faults
            .push(format!("[engine] {key}: with [[pool.group]] each group says it for itself, by gpus or cpu_threads"));
    }
    let groups = groups.into_iter().filter_map(|(number, group)| check_one(number, group, engine, faults));
    let groups: Vec<GroupConfig> = groups.collect();
    let (mut names, mut gpus) = (BTreeSet::new(), BTreeSet::new());
    for group in &groups {
        refuse(faults, !names.insert(&group.name), &format!("[[pool.group]]: two have the name {}", group.name));
        for gpu in &group.gpus {
            refuse(faults, !gpus.insert(gpu), &format!("[[pool.group]] {}: GPU {gpu} is named twice", group.name));
        }
    }
    groups
}

fn check_one(number: usize, group: raw::Group, engine: &raw::Engine, faults: &mut Vec<String>) -> Option<GroupConfig> {
    let name = group.name.unwrap_or_else(|| number.to_string());
    let at = format!("[[pool.group]] {name}");
    refuse(faults, name.is_empty() || name.len() > 32, &format!("{at}: a name has 1 to 32 characters"));
    check_model(&at, group.model.as_deref(), faults);
    let command = group.command.or_else(|| engine.command.clone()).unwrap_or_default();
    let said = (group.nodes, group.address, group.listen, group.nodes_within_s);
    let nodes = check_nodes(&at, said, faults);
    refuse(faults, nodes.is_some() && !command.is_empty(), &format!("{at} nodes: not with a command of its own"));
    let (backend, devices) = match (&group.gpus, group.cpu_threads) {
        (Some(gpus), None) if !gpus.is_empty() => ("cuda", gpus.len()),
        (None, Some(threads)) if threads > 0 => ("cpu", threads),
        (None, None) if !command.is_empty() => ("cpu", group.ranks.unwrap_or(1)),
        _ => return fault(faults, &format!("{at}: either gpus = [0, 1], or cpu_threads = 8; at least one")),
    };
    let ranks = group.ranks.unwrap_or(if backend == "cuda" { devices } else { 1 });
    refuse(faults, ranks == 0 || ranks > devices, &format!("{at} ranks: 1 to {devices}, as many as it has devices"));
    let is_whole = backend != "cuda" || ranks == devices;
    refuse(faults, !is_whole, &format!("{at} ranks: one for each of its {devices} GPUs; leave it out"));
    Some(GroupConfig {
        name,
        model: group.model,
        backend: backend.to_owned(),
        gpus: group.gpus.unwrap_or_default(),
        ranks,
        threads: group.cpu_threads,
        nodes,
        command,
    })
}

/// Several nodes need a place to meet.
fn check_nodes(
    at: &str,
    (count, address, listen, within_s): (Option<usize>, Option<String>, Option<String>, Option<u64>),
    faults: &mut Vec<String>,
) -> Option<NodesConfig> {
    let Some(count) = count.filter(|count| *count != 1) else {
        let is_said = address.is_some() || listen.is_some() || within_s.is_some();
        refuse(faults, is_said, &format!("{at}: address, listen and nodes_within_s are for nodes = 2 or more"));
        return None;
    };
    refuse(faults, count == 0, &format!("{at} nodes: at least 1"));
    let has_port = |place: &str| {
        place.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
    };
    let Some(address) = address.filter(|address| has_port(address)) else {
        return fault(faults, &format!("{at} address: expected HOST:PORT, where the other nodes reach the first one"));
    };
    let listen = match listen {
        Some(listen) => listen,
        None => format!("0.0.0.0:{}", address.rsplit_once(':').map_or("", |(_, port)| port)),
    };
    refuse(faults, !has_port(&listen), &format!("{at} listen: expected ADDRESS:PORT"));
    let within = Duration::from_secs(within_s.unwrap_or(NODES_WITHIN_S));
    refuse(faults, within.is_zero(), &format!("{at} nodes_within_s: at least 1"));
    Some(NodesConfig { count, address, listen, within })
}

/// A model that is named has to be there.
pub(super) fn check_model(at: &str, model: Option<&Path>, faults: &mut Vec<String>) {
    if let Some(model) = model {
        let is_there = model.join("config.json").is_file();
        refuse(faults, !is_there, &format!("{at} model: {} has no config.json", model.display()));
    }
}

impl GroupConfig {
    /// Its devices, for people.
    pub fn devices(&self) -> String {
        match &self.nodes {
            Some(nodes) => format!("{} nodes, each {}", nodes.count, self.devices_of_a_node()),
            None => self.devices_of_a_node(),
        }
    }

    fn devices_of_a_node(&self) -> String {
        if !self.command.is_empty() {
            return self.command.join(" ");
        }
        let ranks = if self.ranks == 1 { "1 rank".to_owned() } else { format!("{} ranks", self.ranks) };
        let gpus: Vec<String> = self.gpus.iter().map(ToString::to_string).collect();
        match (self.backend.as_str(), self.threads) {
            ("cuda", _) if gpus.is_empty() => format!("cuda, {ranks}"),
            ("cuda", _) => format!("GPU {}, {ranks}", gpus.join(", ")),
            (_, Some(threads)) => format!("cpu, {threads} threads, {ranks}"),
            _ => format!("cpu, all threads, {ranks}"),
        }
    }
}
