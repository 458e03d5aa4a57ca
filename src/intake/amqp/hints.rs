//! A queue of messages that are welcome and not needed: their bodies are handed on, and whoever is busy loses them.
//!
//! Invariant: no message is kept waiting, and nothing rests on one being received.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::broker::{AmqpError, Broker};
use crate::pipeline::shutdown::{Phase, Shutdown};
use crate::telemetry::health::Health;

/// Deliveries on their way at most.
const PREFETCH: u16 = 100;
/// Longer messages are no hints.
const BYTES_AT_MOST: usize = 256 * 1024;
/// Waits between two tries to connect.
const RECONNECT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// A queue of hints, which somebody else has declared and bound.
pub struct HintQueue {
    /// Broker.
    pub broker: Broker,
    /// Its name.
    pub queue: String,
}

impl HintQueue {
    /// Hands bodies on until the drain begins.
    pub async fn run(self, hints: mpsc::Sender<Vec<u8>>, shutdown: Shutdown) {
        let mut wait = RECONNECT.0;
        while shutdown.phase() == Phase::Working {
            let listening = self.listen(&hints, &mut wait);
            let ended = tokio::select! {
                () = shutdown.draining() => return,
                ended = listening => ended,
            };
            if let Err(error) = ended {
                warn!(broker.queue = self.queue, error.message = %error, "no events are heard, polling goes on");
            }
            tokio::select! {
                () = shutdown.draining() => return,
                () = tokio::time::sleep(wait) => wait = (wait * 2).min(RECONNECT.1),
            }
        }
    }

    /// Whether somebody has declared it.
    pub async fn is_there(&self) -> Result<(), AmqpError> {
        let connection = self.broker.connect(&Health::default().component("events")).await?;
        let channel = self.broker.step("open a channel", connection.create_channel()).await?;
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let asked = channel.queue_declare(self.queue.as_str().into(), options, FieldTable::default());
        self.broker.step("look for the queue of events", asked).await.map(drop)
    }

    async fn listen(&self, hints: &mpsc::Sender<Vec<u8>>, wait: &mut Duration) -> Result<(), AmqpError> {
        let broker = &self.broker;
        // Readiness does not rest on this connection.
        let connection = broker.connect(&Health::default().component("events")).await?;
        let channel = broker.step("open a channel", connection.create_channel()).await?;
        broker.step("limit what is in flight", channel.basic_qos(PREFETCH, BasicQosOptions::default())).await?;
        let queue = self.queue.as_str();
        let consuming =
            channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default());
        let mut consumer = broker.step("consume events", consuming).await?;
        info!(broker.queue = queue, "listening to events");
        *wait = RECONNECT.0;
        while let Some(delivery) = consumer.next().await {
            let place = || broker.to_string();
            let delivery =
                delivery.map_err(|source| AmqpError::Failed { place: place(), operation: "consume events", source })?;
            broker.step("ack", delivery.acker.ack(BasicAckOptions::default())).await?;
            if delivery.data.len() <= BYTES_AT_MOST {
                // One that finds no room is lost: the next look finds what it spoke of.
                let _ = hints.try_send(delivery.data);
            }
        }
        Err(AmqpError::Cancelled { place: broker.to_string(), queue: self.queue.clone() })
    }
}
