//! Completion events from the store to those who asked for them.
//!
//! Invariant: an event leaves the store when the broker has confirmed it; it may be sent twice, with the same id, and is never lost.

pub mod results;

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use tracing::warn;
use uuid::Uuid;

use crate::failpoint;
use crate::intake::amqp::{AmqpError, Broker, Message, PublishError, Publisher};
use crate::pipeline::shutdown::{Phase, Shutdown};
use crate::store::{OutboxEvent, Store, StoreError};
use crate::telemetry::health::Component;
use crate::telemetry::metrics;

/// Events taken at once.
const BATCH: u32 = 100;
/// Events sent before the first of them is confirmed.
const SENT_AT_ONCE: usize = 32;
/// How long taken events stay hidden from other daemons: as long as a broker may take to confirm them.
const LEASE: Duration = Duration::from_secs(30);
/// Tries for a target that does not take it before the event is given up (and kept for people).
const TRIES: u32 = 10;
/// Waits between tries for such a target.
const RETURNED: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));
/// Wait after a broker or a store that does not answer.
const BROKEN_WAIT: Duration = Duration::from_secs(2);

/// Sends events.
pub struct Dispatcher {
    /// Broker.
    pub broker: Broker,
    /// Where events wait.
    pub store: Arc<dyn Store>,
    /// How often to look for new ones.
    pub poll: Duration,
    /// Where its state is reported.
    pub health: Component,
}

/// Why a round of sending ended early.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Broker(#[from] AmqpError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Dispatcher {
    /// Sends until the drain is over: after `flushed` resolves, what is there by then is sent in one more round.
    pub async fn run(self, flushed: impl Future<Output = ()>, shutdown: Shutdown) {
        let mut publisher = None;
        tokio::pin!(flushed);
        loop {
            let last = tokio::select! {
                biased;
                () = &mut flushed => true,
                pause = self.round(&mut publisher) => tokio::select! {
                    () = &mut flushed => true,
                    () = tokio::time::sleep(pause) => false,
                },
            };
            if last {
                if shutdown.phase() != Phase::Stopping {
                    self.round(&mut publisher).await;
                }
                return;
            }
        }
    }

    /// Sends what is there; says how long to wait before the next round.
    async fn round(&self, publisher: &mut Option<Publisher>) -> Duration {
        match self.send_all(publisher).await {
            Ok(()) => {
                self.health.ready();
                self.poll
            }
            Err(broken) => {
                *publisher = None;
                self.health.degraded(&broken.to_string());
                warn!(error.message = %broken, "completion events wait");
                BROKEN_WAIT
            }
        }
    }

    async fn send_all(&self, slot: &mut Option<Publisher>) -> Result<(), Broken> {
        loop {
            let events = self.store.outbox_take(BATCH, LEASE).await?;
            if events.is_empty() {
                return Ok(());
            }
            let publisher = match slot {
                Some(publisher) => publisher,
                None => slot.insert(Publisher::connect(&self.broker, &self.health).await?),
            };
            failpoint::reach("outbox.taken");
            let publisher = &*publisher;
            let sends: Vec<_> = events.iter().map(|event| self.send(publisher, event)).collect();
            let mut sending = stream::iter(sends).buffer_unordered(SENT_AT_ONCE);
            let (mut sent, mut broken) = (Vec::new(), None);
            while let (None, Some(result)) = (&broken, sending.next().await) {
                match result {
                    Ok(id) => sent.extend(id),
                    Err(error) => broken = Some(error),
                }
            }
            // What the broker has is confirmed, whatever became of the others.
            self.store.outbox_confirm(&sent).await?;
            failpoint::reach("outbox.confirmed");
            metrics::EVENTS.add(&["sent"], sent.len() as u64);
            if let Some(error) = broken {
                return Err(error);
            }
        }
    }

    /// Sends an event; its id if the broker has it, none if its target would not take it.
    async fn send(&self, publisher: &Publisher, event: &OutboxEvent) -> Result<Option<Uuid>, Broken> {
        let body = event.body.to_string();
        let message = Message {
            exchange: "",
            routing_key: &event.reply.target,
            id: event.event_id.to_string(),
            correlation_id: event.reply.correlation_id.as_deref(),
            reply_to: None,
            headers: Vec::new(),
            body: body.as_bytes(),
        };
        let reason = match publisher.publish(&message).await {
            Ok(()) => {
                failpoint::reach("outbox.sent");
                return Ok(Some(event.event_id));
            }
            Err(PublishError::Broken(error)) => return Err(error.into()),
            Err(refused) => refused.to_string(),
        };
        let after = (event.tries < TRIES).then(|| RETURNED.0.saturating_mul(1 << event.tries.min(16)).min(RETURNED.1));
        warn!(event.id = %event.event_id, event.target = event.reply.target, error.message = reason, event.tries, "a completion event was not taken");
        metrics::EVENTS.add(&[if after.is_some() { "returned" } else { "given_up" }], 1);
        self.store.outbox_return(event.event_id, &reason, after).await?;
        Ok(None)
    }
}
