//! `apbd submit`: a job to the queue, confirmed by the broker.
//!
//! Invariant: prints the job's id only after the broker has the message.

use std::fs;
use std::io::Read;
use std::path::PathBuf;

use super::database::{Format, print_json};
use super::{CliError, Status, print, runtime};
use crate::intake::amqp::{Broker, Message, PublishError, Publisher};
use crate::job::{JobId, JobMessage, MessageLimits};
use crate::telemetry::health::Health;

/// Arguments of `apbd submit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Job as JSON; `-` reads stdin.
    job: PathBuf,
    /// Broker.
    #[arg(long, value_name = "URL", env = "APBD_AMQP_URL", hide_env_values = true)]
    amqp: Option<String>,
    /// File that holds the broker's URL.
    #[arg(long, value_name = "FILE", env = "APBD_AMQP_URL_FILE", conflicts_with = "amqp")]
    amqp_file: Option<PathBuf>,
    /// Authority that is trusted beside the system's, in PEM.
    #[arg(long, value_name = "FILE", env = "APBD_AMQP_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// Queue of the jobs.
    #[arg(long, value_name = "NAME", env = "APBD_AMQP_QUEUE", default_value = "apbd.jobs")]
    queue: String,
    /// Queue for the completion event.
    #[arg(long, value_name = "NAME")]
    reply_to: Option<String>,
    /// Own mark, given back with the completion event.
    #[arg(long, value_name = "TEXT", requires = "reply_to")]
    correlation_id: Option<String>,
    /// How to print the job's id.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

impl Args {
    /// Sends it.
    pub fn execute(self) -> Result<Status, CliError> {
        let broker = self.broker()?;
        let limits = MessageLimits::default();
        let message = JobMessage::parse(&self.text(limits.bytes)?, &limits)
            .and_then(|message| message.check(Some(JobId::random()), &limits))
            .map_err(|error| CliError::Usage(format!("{}: {error}", self.job.display())))?;
        let body = serde_json::to_vec(&message.message).map_err(|error| CliError::Internal(error.to_string()))?;
        runtime()?.block_on(self.send(&broker, message.id, &body))?;
        match self.format {
            Format::Json => print_json(&serde_json::json!({ "job_id": message.id, "queue": self.queue }))?,
            Format::Table => print(&format!("{}\n", message.id))?,
        }
        Ok(Status::Done)
    }

    async fn send(&self, broker: &Broker, id: JobId, body: &[u8]) -> Result<(), CliError> {
        let health = Health::default().component("submit");
        let unavailable = |error: &dyn std::error::Error| CliError::Unavailable(error.to_string());
        let publisher = Publisher::connect(broker, &health).await.map_err(|error| unavailable(&error))?;
        let message = Message {
            exchange: "",
            routing_key: &self.queue,
            id: id.to_string(),
            correlation_id: self.correlation_id.as_deref(),
            reply_to: self.reply_to.as_deref(),
            headers: Vec::new(),
            body,
        };
        publisher.publish(&message).await.map_err(|error| match error {
            PublishError::Returned { .. } => {
                CliError::Usage(format!("queue {} is not there; is a daemon configured for it?", self.queue))
            }
            error => unavailable(&error),
        })
    }

    fn broker(&self) -> Result<Broker, CliError> {
        let read = |path: &PathBuf| {
            fs::read_to_string(path).map_err(|error| CliError::Usage(format!("{}: {error}", path.display())))
        };
        let url = match (&self.amqp, &self.amqp_file) {
            (Some(url), _) => url.clone(),
            (None, Some(file)) => read(file)?.trim().to_owned(),
            (None, None) => return Err(CliError::Usage("name the broker with --amqp or APBD_AMQP_URL".to_owned())),
        };
        let certificates = self.ca_file.as_ref().map(read).transpose()?;
        Broker::new(&url, certificates, "apbd submit").map_err(|error| CliError::Usage(error.to_string()))
    }

    /// A byte more than allowed tells that there is more.
    fn text(&self, at_most: usize) -> Result<Vec<u8>, CliError> {
        let failed = |error: std::io::Error| CliError::Usage(format!("{}: {error}", self.job.display()));
        let mut text = Vec::new();
        let bound = at_most as u64 + 1;
        if self.job.as_os_str() == "-" {
            std::io::stdin().lock().take(bound).read_to_end(&mut text).map_err(failed)?;
        } else {
            fs::File::open(&self.job).map_err(failed)?.take(bound).read_to_end(&mut text).map_err(failed)?;
        }
        Ok(text)
    }
}
