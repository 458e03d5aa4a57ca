//! `apbd serve`: the daemon. Doors in, the pipeline, events out; until it is told to stop.
//!
//! Start: the configuration as a whole, then the port, the database, the engine; each is waited for with words. Stop: the doors close, what
//! is in the engine may end within the grace, the rest is handed back, events are flushed. SIGHUP: both, in this order reversed.
//!
//! Invariant: every task that was started has ended when this returns; a decoder that nobody waits for any more ends with the process.

pub(super) mod engines;
mod events;
mod gauges;
mod learned;
mod reload;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::run::{model, prompter};
use super::{CliError, Status, runtime};
use crate::config::{AmqpConfig, Config};
use crate::cost::Observation;
use crate::document::fetch::{AllowedSource, DocumentSource, S3Source};
use crate::engine::Engine;
use crate::intake::amqp::hints::HintQueue;
use crate::intake::amqp::{AmqpIntake, Terms};
use crate::intake::dropfolder::{DropFolder, DropPlace};
use crate::job::WorkerId;
use crate::objects::ObjectClient;
use crate::outbox::Dispatcher;
use crate::outbox::results::ResultWriter;
use crate::pipeline::shutdown::{self, Phase, Shutdown};
use crate::pipeline::{Parts, Pipeline, Settings};
use crate::store::{self, Access, Store};
use crate::supervise::Pool;
use crate::telemetry::health::{Component, Health};
use crate::telemetry::{console, http};
use reload::Reload;

/// Wait between two tries to reach the database at the start.
const START_WAIT: Duration = Duration::from_secs(2);
/// How long the database is waited for at the start.
const START_WITHIN: Duration = Duration::from_secs(120);
/// Where nothing is said: one job is prepared ahead for so many in the engines, since they do not all end at once.
const AHEAD_PART: usize = 8;
/// How long the end waits for a question that is being answered.
const LAST_ANSWER: Duration = Duration::from_secs(1);
/// Where this machine says its name.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

/// Arguments of `apbd serve`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration (TOML); every key can also be set as `APBD_SECTION_KEY`.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// The configuration at `path` with this process's environment.
pub(super) fn load(path: &Path) -> Result<Config, CliError> {
    let environment: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    Config::load(path, &environment).map_err(|error| CliError::Usage(error.to_string()))
}

impl Args {
    /// Serves.
    pub fn execute(self) -> Result<Status, CliError> {
        let config = load(&self.config)?;
        let model = model::find(config.engine.model.as_deref()).map_err(CliError::Usage)?;
        let stores = clients(&config)?;
        let (handle, shutdown) = shutdown::channel();
        let runtime = runtime()?;
        let ended = runtime.block_on(async {
            let signals = |error| CliError::Internal(format!("signals: {error}"));
            let reload = Reload::on_hangup(self.config, handle.clone()).map_err(signals)?;
            shutdown::on_signals(handle, told).map_err(signals)?;
            serve(config, model, stores, shutdown).await.map(|()| reload)
        });
        // A thread may be deep in a document whose job was handed back: the end does not wait for it.
        runtime.shutdown_background();
        if ended?.is_asked() {
            return Err(reload::start_again());
        }
        Ok(Status::Done)
    }
}

/// A client a store.
pub(super) fn clients(config: &Config) -> Result<Vec<ObjectClient>, CliError> {
    let client = |options: &crate::objects::StoreOptions| ObjectClient::new(options.clone());
    config.stores.iter().map(client).collect::<Result<_, _>>().map_err(|error| CliError::Usage(error.to_string()))
}

async fn serve(config: Config, model: PathBuf, stores: Vec<ObjectClient>, shutdown: Shutdown) -> Result<(), CliError> {
    let health = Health::default();
    let start = health.component("start");
    let listener = http::bind(config.listen)
        .await
        .map_err(|error| CliError::Unavailable(format!("[http] listen {}: {error}", config.listen)))?;
    let over = CancellationToken::new();
    let answering = tokio::spawn(http::serve(listener, health.clone(), over.clone().cancelled_owned()));
    let Some(store) = open_store(&config, Access::Worker, &shutdown).await? else { return Ok(()) };
    let daemon = Daemon { config, stores, store, health, start };
    let ended = daemon.run(&model, shutdown).await;
    over.cancel();
    // It only answers questions; that it failed was its asker's to see, and one who asks slowly holds up no stop.
    let _ = tokio::time::timeout(LAST_ANSWER, answering).await;
    daemon.store.close().await;
    ended
}

/// Waits for the database; nothing if told to stop before.
pub(super) async fn open_store(
    config: &Config,
    access: Access,
    shutdown: &Shutdown,
) -> Result<Option<Arc<dyn Store>>, CliError> {
    let deadline = tokio::time::Instant::now() + START_WITHIN;
    loop {
        match store::open(&config.database, access, config.work.retry).await {
            Ok(store) => return Ok(Some(store)),
            Err(error) if error.is_transient() && tokio::time::Instant::now() < deadline => {
                warn!(error.message = %error, "waiting for the database");
                tokio::select! {
                    () = shutdown.draining() => return Ok(None),
                    () = tokio::time::sleep(START_WAIT) => {}
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Everything that was opened.
struct Daemon {
    config: Config,
    stores: Vec<ObjectClient>,
    store: Arc<dyn Store>,
    health: Health,
    /// Ready when every other part is at least known.
    start: Component,
}

impl Daemon {
    async fn run(&self, model: &Path, shutdown: Shutdown) -> Result<(), CliError> {
        let (observed, observations) = learned::channel();
        let engine = tokio::select! {
            started = self.start_engines(model, observed) => started?,
            // Its processes end with this one, whether they load a model or wait for other nodes.
            () = shutdown.draining() => return Ok(()),
        };
        engine.learn(&self.store.cost_learned(&engine.info().model_digest).await?);
        let names: Vec<&str> = self.config.engine.groups.iter().map(|group| group.name.as_str()).collect();
        let ahead = self.config.work.ahead.unwrap_or(engine.info().concurrency / AHEAD_PART).max(1);
        let parts = Parts {
            store: self.store.clone(),
            documents: self.documents(),
            prompter: Arc::new(prompter(model)?),
            engine,
            events: Arc::new(events::Telemetry::start(&names)),
        };
        let doors = self.open_doors(&shutdown);
        let flushed = CancellationToken::new();
        let outbox = self
            .dispatcher()
            .map(|outbox| tokio::spawn(outbox.run(flushed.clone().cancelled_owned(), shutdown.clone())));
        let writer = self.result_writer();
        if let Some(writer) = &writer {
            // Before the first job ends, so that none is missed.
            self.store.export_want(&writer.to.to_string()).await?;
        }
        let writing =
            writer.map(|writer| tokio::spawn(writer.run(flushed.clone().cancelled_owned(), shutdown.clone())));
        let learning = tokio::spawn(observations.keep(self.store.clone(), flushed.clone().cancelled_owned()));
        let sampling = tokio::spawn(gauges::sample(self.store.clone(), flushed.clone().cancelled_owned()));
        self.start.ready();
        info!(worker.pid = process::id(), "serving");
        let worked = Pipeline::new(parts, self.settings(ahead)).run(shutdown.clone()).await;
        flushed.cancel();
        for task in doors.into_iter().chain(outbox).chain(writing).chain([sampling, learning]) {
            if let Err(error) = task.await {
                warn!(error.message = %error, "a task of the daemon ended badly");
            }
        }
        worked.map_err(|error| CliError::Internal(error.to_string()))
    }

    async fn start_engines(
        &self,
        model: &Path,
        observed: impl Fn(Observation) + Send + Sync + 'static,
    ) -> Result<Arc<Pool>, CliError> {
        let groups = engines::groups(&self.config.engine, model, &self.store)?;
        let is_one = groups.len() == 1;
        let health = |name: &str| match is_one {
            true => self.health.component("engine"),
            false => self.health.one_of("engine", format!("engine {name}")),
        };
        let groups = groups.into_iter().map(|group| (health(&group.options.group), group));
        let groups: Vec<_> = groups.map(|(health, group)| (group, health)).collect();
        let started = tokio::task::spawn_blocking(move || Pool::start(groups, observed)).await;
        let started = started.map_err(|error| CliError::Internal(error.to_string()))?;
        started.map(Arc::new).map_err(|reason| CliError::Unavailable(format!("the engine does not start: {reason}")))
    }

    fn documents(&self) -> Arc<dyn DocumentSource> {
        Arc::new(AllowedSource::new(self.config.locations.clone(), S3Source::new(self.stores.clone())))
    }

    fn open_doors(&self, shutdown: &Shutdown) -> Vec<tokio::task::JoinHandle<()>> {
        let mut doors = Vec::new();
        if let Some(amqp) = &self.config.amqp {
            doors.push(tokio::spawn(self.intake(amqp).run(shutdown.clone())));
        }
        doors.extend(self.config.drops.iter().map(|place| tokio::spawn(self.drop_folder(place).run(shutdown.clone()))));
        doors
    }

    fn drop_folder(&self, place: &DropPlace) -> DropFolder {
        let broker = self.config.amqp.as_ref().map(|amqp| amqp.broker.clone());
        let events = place.events_queue.clone().zip(broker).map(|(queue, broker)| HintQueue { broker, queue });
        DropFolder {
            place: place.clone(),
            stores: self.stores.clone(),
            documents: self.documents(),
            store: self.store.clone(),
            max_document_bytes: self.config.work.max_document_bytes,
            events,
            health: self.health.component(format!("drop folder {}", place.at)),
        }
    }

    fn result_writer(&self) -> Option<ResultWriter> {
        Some(ResultWriter {
            to: self.config.results.clone()?,
            stores: self.stores.clone(),
            store: self.store.clone(),
            poll: self.config.work.poll,
            health: self.health.component("results"),
        })
    }

    fn intake(&self, amqp: &AmqpConfig) -> AmqpIntake {
        AmqpIntake {
            broker: amqp.broker.clone(),
            topology: amqp.topology.clone(),
            terms: Terms {
                limits: amqp.limits,
                locations: self.config.locations.clone(),
                reply_targets: amqp.reply_targets.clone(),
            },
            admission: amqp.admission,
            store: self.store.clone(),
            health: self.health.component("intake"),
        }
    }

    fn dispatcher(&self) -> Option<Dispatcher> {
        let amqp = self.config.amqp.as_ref()?;
        Some(Dispatcher {
            broker: amqp.broker.clone(),
            store: self.store.clone(),
            poll: self.config.work.poll,
            health: self.health.component("outbox"),
        })
    }

    fn settings(&self, ahead: usize) -> Settings {
        let work = &self.config.work;
        let host = std::fs::read_to_string(HOST_NAME).unwrap_or_else(|_| "worker".to_owned());
        Settings {
            worker: WorkerId::unique(host.trim(), process::id()),
            lease: work.lease,
            ahead,
            poll: work.poll,
            only: None,
            models: self.config.engine.names.clone(),
            claim_at_most_bytes: Some(work.max_document_bytes),
            documents_at_most_bytes: work.max_document_bytes,
            retry: work.retry,
            grace: work.grace,
        }
    }
}

fn told(phase: Phase) {
    match phase {
        Phase::Working => {}
        Phase::Draining => info!("draining: nothing new is taken in, what runs may end within the grace"),
        Phase::Stopping => {
            // What is held is claimed again when its lease has run out.
            console::line("stopped at once");
            process::exit(1);
        }
    }
}
