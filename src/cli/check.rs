//! `apbd check`: a configuration, and everything that it connects to, on one screen.
//!
//! Invariant: changes nothing anywhere but what `serve` would declare at the broker.

use std::path::PathBuf;

use serde_json::json;

use super::database::{Format, print_json};
use super::run::model;
use super::{CliError, Status, print, runtime};
use crate::config::{AmqpConfig, Config};
use crate::intake::amqp::hints::HintQueue;
use crate::intake::amqp::{AmqpError, Publisher};
use crate::intake::dropfolder::{DropPlace, Profiles};
use crate::job::DocumentUri;
use crate::job::retry::RetryPolicy;
use crate::objects::ObjectClient;
use crate::store::{self, Access};
use crate::telemetry::health::Health;

/// Arguments of `apbd check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration (TOML), as for `serve`.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Only the configuration itself; connect to nothing.
    #[arg(long)]
    offline: bool,
    /// How to print what was found.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// What was looked at, and what is to be said about it.
struct Line {
    what: String,
    answer: Result<String, String>,
}

fn line(what: impl Into<String>, answer: Result<String, impl ToString>) -> Line {
    Line { what: what.into(), answer: answer.map_err(|error| error.to_string()) }
}

impl Args {
    /// Checks, and prints a line for each thing.
    pub fn execute(self) -> Result<Status, CliError> {
        let config = super::serve::load(&self.config)?;
        let clients = super::serve::clients(&config)?;
        let mut lines =
            vec![line(format!("configuration {}", self.config.display()), Ok::<_, String>("complete".to_owned()))];
        let model = model::find(config.engine.model.as_deref());
        lines.push(line("model", model.map(|path| path.display().to_string())));
        for group in &config.engine.groups {
            let model = group.model.as_ref().map(|model| format!(", model {}", model.display())).unwrap_or_default();
            let said = backend(&group.backend).map(|_| format!("{}{model}", group.devices()));
            lines.push(line(format!("group {}", group.name), said));
        }
        if !self.offline {
            runtime()?.block_on(connect(&config, &clients, &mut lines));
        }
        let failed = lines.iter().filter(|line| line.answer.is_err()).count();
        match self.format {
            Format::Json => print_json(&lines.iter().map(as_json).collect::<Vec<_>>())?,
            Format::Table => print(&lines.iter().map(as_text).collect::<String>())?,
        }
        match failed {
            0 => Ok(Status::Done),
            failed => Err(CliError::Unavailable(format!("{failed} of {} checks failed", lines.len()))),
        }
    }
}

fn as_text(line: &Line) -> String {
    match &line.answer {
        Ok(said) => format!("ok    {}: {said}\n", line.what),
        Err(reason) => format!("FAIL  {}: {reason}\n", line.what),
    }
}

fn as_json(line: &Line) -> serde_json::Value {
    let (Ok(said) | Err(said)) = &line.answer;
    json!({ "what": line.what, "ok": line.answer.is_ok(), "said": said })
}

/// Whether this program has it; whether this machine has the device is seen when the engine starts.
fn backend(name: &str) -> Result<String, String> {
    match name == "cuda" && !cfg!(feature = "cuda") {
        true => Err("cuda is not in this build; build with `--features cuda`, or use backend = \"cpu\"".to_owned()),
        false => Ok(name.to_owned()),
    }
}

async fn connect(config: &Config, clients: &[ObjectClient], lines: &mut Vec<Line>) {
    let opened = match store::open(&config.database, Access::Client, RetryPolicy::default()).await {
        Ok(store) => store.check().await.map(|()| "answers, schema as expected".to_owned()),
        Err(error) => Err(error),
    };
    lines.push(line(format!("database {}", config.database), opened));
    if let Some(amqp) = &config.amqp {
        let answer = broker(amqp).await.map(|()| format!("queue {} is there", amqp.topology.queue));
        lines.push(line(format!("broker {}", amqp.broker), answer));
    }
    for client in clients {
        for allowed in config.locations.objects.iter().filter(|allowed| allowed.store == client.alias()) {
            let place = format!("store s3://{}/{}/{}", allowed.store, allowed.bucket, allowed.prefix);
            let probed = client.probe(&allowed.bucket, &allowed.prefix).await;
            lines.push(line(place, probed.map(|probe| probe.summary())));
        }
    }
    for folder in &config.locations.folders {
        let answer = std::fs::read_dir(folder).map(|_| "can be listed".to_owned());
        lines.push(line(format!("folder {}", folder.display()), answer));
    }
    for drop in &config.drops {
        watched(config, drop, lines).await;
    }
    if let Some(to) = &config.results {
        lines.push(line(format!("results {to}"), results(to, clients).await));
    }
}

async fn watched(config: &Config, drop: &DropPlace, lines: &mut Vec<Line>) {
    let (kind, answer) = match &drop.at {
        // Its bucket or prefix is one of the allowed ones, which were listed.
        DocumentUri::S3 { .. } => ("prefix", Ok(())),
        DocumentUri::File { path } => ("folder", std::fs::read_dir(path).map(|_| ())),
    };
    let said = match &drop.profiles {
        Profiles::One(profile) => format!("task {}", profile.task.as_str()),
        Profiles::ByFolder(profiles) => {
            let names: Vec<&str> = profiles.keys().map(String::as_str).collect();
            format!("profiles {}", names.join(", "))
        }
    };
    lines.push(line(format!("drop {kind} {}", drop.at), answer.map(|()| said)));
    if let Some((queue, amqp)) = drop.events_queue.as_ref().zip(config.amqp.as_ref()) {
        let events = HintQueue { broker: amqp.broker.clone(), queue: queue.clone() };
        let answer = events.is_there().await.map(|()| "is there".to_owned());
        lines.push(line(format!("queue of events {queue}"), answer));
    }
}

/// Nothing is written: whether that is allowed is seen with the first result.
async fn results(to: &DocumentUri, clients: &[ObjectClient]) -> Result<String, String> {
    let untried = "; not tried: writing".to_owned();
    match to {
        DocumentUri::S3 { store, bucket, key } => {
            let client = clients.iter().find(|client| client.alias() == store).ok_or("no such store")?;
            let page = client.list(bucket, key, None).await.map_err(|error| error.to_string())?;
            Ok(format!("can be listed, {} objects on the first page{untried}", page.objects.len()))
        }
        DocumentUri::File { path } => match std::fs::metadata(path) {
            Ok(about) if about.is_dir() => Ok(format!("is a folder{untried}")),
            Ok(_) => Err("is no folder".to_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Ok("is made with the first result".to_owned())
            }
            Err(error) => Err(error.to_string()),
        },
    }
}

async fn broker(amqp: &AmqpConfig) -> Result<(), AmqpError> {
    let health = Health::default().component("check");
    let publisher = Publisher::connect(&amqp.broker, &health).await?;
    amqp.topology.ensure(&amqp.broker, publisher.channel()).await
}
