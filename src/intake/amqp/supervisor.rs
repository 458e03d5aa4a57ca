//! Sessions for as long as the process works: connecting again with growing, jittered waits, and the admission window.
//!
//! Invariant: ends only with the process; whatever the broker does, it is consumed from again when it is back and there is room.

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use tracing::{info, warn};

use super::broker::{AmqpError, Broker};
use super::delivery::Terms;
use super::session::{End, Session};
use super::topology::Topology;
use crate::pipeline::shutdown::{Phase, Shutdown};
use crate::store::{Door, Store};
use crate::telemetry::health::Component;
use crate::telemetry::metrics;

/// Waits between two tries to connect; each is drawn from the upper half.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// How much is taken in before it is processed: the broker stays the big buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admission {
    /// Waiting jobs at which consuming stops; it begins again at three quarters of them.
    pub window: u64,
    /// Unacked deliveries at most.
    pub prefetch: u16,
    /// How often the depth of the inbox is looked at.
    pub look_every: Duration,
}

impl Default for Admission {
    fn default() -> Self {
        Self { window: 1000, prefetch: 200, look_every: Duration::from_secs(1) }
    }
}

/// The door.
pub struct AmqpIntake {
    /// Broker.
    pub broker: Broker,
    /// Queue, and where dead letters go.
    pub topology: Topology,
    /// What messages have to keep to.
    pub terms: Terms,
    /// When to stop taking in.
    pub admission: Admission,
    /// Where jobs go.
    pub store: Arc<dyn Store>,
    /// Where the state of this door is reported.
    pub health: Component,
}

impl AmqpIntake {
    /// Takes in until the drain begins.
    pub async fn run(self, shutdown: Shutdown) {
        let mut wait = RECONNECT.0;
        while shutdown.phase() == Phase::Working {
            match self.connected(&shutdown).await {
                Ok(()) => return,
                Err(failure) => {
                    if failure.consumed {
                        wait = RECONNECT.0;
                    }
                    metrics::BROKER_FAILURES.add(&[], 1);
                    warn!(error.message = %failure.error, "the broker is not consumed from");
                    self.health.degraded(&failure.error.to_string());
                    let jittered = wait.mul_f64(rand::rng().random_range(0.5..=1.0));
                    wait = (wait * 2).min(RECONNECT.1);
                    tokio::select! {
                        () = shutdown.draining() => return,
                        () = tokio::time::sleep(jittered) => {}
                    }
                }
            }
        }
    }

    /// One connection and the sessions on it.
    async fn connected(&self, shutdown: &Shutdown) -> Result<(), Failure> {
        let failed = |consumed: bool| move |error: AmqpError| Failure { consumed, error };
        let connection = self.broker.connect(&self.health).await.map_err(failed(false))?;
        let channel = self.broker.step("open a channel", connection.create_channel()).await.map_err(failed(false))?;
        self.topology.ensure(&self.broker, &channel).await.map_err(failed(false))?;
        loop {
            if !self.wait_for_room(shutdown).await {
                break;
            }
            let session = Session::open(self, &connection).await.map_err(failed(false))?;
            info!(broker.place = %self.broker, queue = self.topology.queue, "consuming");
            self.health.ready();
            match session.consume(shutdown).await.map_err(failed(true))? {
                End::Shutdown => break,
                End::Full => info!(inbox.window = self.admission.window, "the inbox is full, consuming stops"),
            }
        }
        // The process is going: whether the broker hears the goodbye changes nothing.
        let _ = self.broker.step("close", connection.close(200, "drained".into())).await;
        Ok(())
    }

    /// How many jobs may still come in; jobs of other doors take no place from them. A store that does not answer is no reason to stop: enqueueing waits for it.
    pub(super) async fn room(&self) -> u64 {
        self.waiting().await.map_or(1, |waiting| self.admission.window.saturating_sub(waiting))
    }

    async fn waiting(&self) -> Option<u64> {
        let depth = self.store.inbox_depth(Some(Door::Amqp), self.admission.window).await;
        depth.ok().map(|depth| depth.queued)
    }

    /// Returns when there is room; `false` if the process stops before.
    async fn wait_for_room(&self, shutdown: &Shutdown) -> bool {
        let room = self.admission.window - self.admission.window / 4;
        let mut bound = self.admission.window;
        while self.waiting().await.is_some_and(|waiting| waiting >= bound) {
            // Once it was full it has to fall well below the window, so that consuming does not flutter.
            bound = room;
            tokio::select! {
                () = shutdown.draining() => return false,
                () = tokio::time::sleep(self.admission.look_every) => {}
            }
        }
        shutdown.phase() == Phase::Working
    }
}

/// How a connection ended.
struct Failure {
    /// It had been consumed from: the next wait is short again.
    consumed: bool,
    error: AmqpError,
}
