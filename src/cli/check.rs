//! `apbd check`: a configuration, and everything that it connects to, on one screen.
//!
//! Invariant: changes nothing anywhere but what `serve` would declare at the broker.

use std::path::PathBuf;

use super::run::model;
use super::{CliError, Status, print, runtime};
use crate::config::{AmqpConfig, Config};
use crate::intake::amqp::AmqpError;
use crate::intake::dropfolder::Profiles;
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
}

impl Args {
    /// Checks, and prints a line for each thing.
    pub fn execute(self) -> Result<Status, CliError> {
        let config = super::serve::load(&self.config)?;
        let clients = super::serve::clients(&config)?;
        let mut lines = vec![(format!("configuration {}", self.config.display()), Ok("complete".to_owned()))];
        let model = model::find(config.engine.model.as_deref());
        lines.push(("model".to_owned(), model.map(|path| path.display().to_string())));
        for group in &config.engine.groups {
            let model = group.model.as_ref().map(|model| format!(", model {}", model.display())).unwrap_or_default();
            lines.push((format!("group {}", group.name), Ok(format!("{}{model}", group.devices()))));
        }
        if !self.offline {
            runtime()?.block_on(connect(&config, &clients, &mut lines));
        }
        let mut text = String::new();
        for (what, answer) in &lines {
            text += &match answer {
                Ok(said) => format!("ok    {what}: {said}\n"),
                Err(reason) => format!("FAIL  {what}: {reason}\n"),
            };
        }
        print(&text)?;
        match lines.iter().filter(|(_, answer)| answer.is_err()).count() {
            0 => Ok(Status::Done),
            failed => Err(CliError::Unavailable(format!("{failed} of {} checks failed", lines.len()))),
        }
    }
}

type Line = (String, Result<String, String>);

async fn connect(config: &Config, clients: &[ObjectClient], lines: &mut Vec<Line>) {
    let opened = match store::open(&config.database, Access::Client, RetryPolicy::default()).await {
        Ok(store) => store.check().await.map(|()| "answers, schema as expected".to_owned()),
        Err(error) => Err(error),
    };
    lines.push((format!("database {}", config.database), opened.map_err(|error| error.to_string())));
    if let Some(amqp) = &config.amqp {
        let answer = broker(amqp).await.map(|()| format!("queue {} is there", amqp.topology.queue));
        lines.push((format!("broker {}", amqp.broker), answer.map_err(|error| error.to_string())));
    }
    for client in clients {
        for allowed in config.locations.objects.iter().filter(|allowed| allowed.store == client.alias()) {
            let place = format!("store s3://{}/{}/{}", allowed.store, allowed.bucket, allowed.prefix);
            let probed = client.probe(&allowed.bucket, &allowed.prefix).await;
            lines.push((place, probed.map(|probe| probe.summary()).map_err(|error| error.to_string())));
        }
    }
    for folder in &config.locations.folders {
        let answer = std::fs::read_dir(folder).map(|_| "can be listed".to_owned()).map_err(|error| error.to_string());
        lines.push((format!("folder {}", folder.display()), answer));
    }
    for drop in &config.drops {
        let kind = if matches!(drop.at, DocumentUri::S3 { .. }) { "prefix" } else { "folder" };
        let said = match &drop.profiles {
            Profiles::One(profile) => format!("task {}", profile.task.as_str()),
            Profiles::ByFolder(profiles) => {
                let names: Vec<&str> = profiles.keys().map(String::as_str).collect();
                format!("profiles {}", names.join(", "))
            }
        };
        lines.push((format!("drop {kind} {}", drop.at), Ok(said)));
    }
    if let Some(to) = &config.results {
        lines.push((format!("results {to}"), Ok("not tried: nothing is written".to_owned())));
    }
}

async fn broker(amqp: &AmqpConfig) -> Result<(), AmqpError> {
    let health = Health::default().component("check");
    let publisher = crate::intake::amqp::Publisher::connect(&amqp.broker, &health).await?;
    amqp.topology.ensure(&amqp.broker, publisher.channel()).await
}
