//! One session of consuming, from an open connection to its end.
//!
//! Invariant: the order is read, commit, ack; a batch whose commit is not known to have happened is not acked.

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};
use tracing::{info, warn};

use super::broker::AmqpError;
use super::publisher::{Message, Publisher};
use super::supervisor::AmqpIntake;
use crate::failpoint;
use crate::job::ErrorCode;
use crate::pipeline::shutdown::Shutdown;
use crate::store::{Door, Enqueued, NewJob, Rejection, StoreError};
use crate::telemetry::metrics;

/// Deliveries in one transaction at most; bounds what a commit that fails has to repeat.
const BATCH: usize = 64;
/// Waits for a store that does not answer.
const STORE_WAIT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Why a session ended without an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The process stops.
    Shutdown,
    /// The inbox is full.
    Full,
}

/// A consumer at work.
pub(super) struct Session<'a> {
    intake: &'a AmqpIntake,
    channel: Channel,
    consumer: Consumer,
    dead_letters: Publisher,
}

impl<'a> Session<'a> {
    /// Declares, limits what is in flight, and begins to consume, in this order.
    pub async fn open(intake: &'a AmqpIntake, connection: &Connection) -> Result<Self, AmqpError> {
        let broker = &intake.broker;
        let dead_letters = Publisher::on(broker, connection).await?;
        let channel = broker.step("open a channel", connection.create_channel()).await?;
        let limiting = channel.basic_qos(intake.admission.prefetch, BasicQosOptions::default());
        broker.step("limit what is in flight", limiting).await?;
        let queue = intake.topology.queue.as_str();
        let options = BasicConsumeOptions::default();
        let consuming = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
        let consumer = broker.step("consume", consuming).await?;
        Ok(Self { intake, channel, consumer, dead_letters })
    }

    /// Consumes until the process stops or the inbox is full; then what was delivered already is still taken in.
    pub async fn consume(mut self, shutdown: &Shutdown) -> Result<End, AmqpError> {
        let mut look = tokio::time::interval(self.intake.admission.look_every);
        let mut room = 0;
        let end = loop {
            tokio::select! {
                biased;
                () = shutdown.draining() => break End::Shutdown,
                _ = look.tick() => room = self.intake.room().await,
                delivery = self.consumer.next(), if room > 0 => {
                    let batch = self.batch(delivery)?;
                    room = room.saturating_sub(batch.len() as u64);
                    self.take_in(batch, shutdown).await?;
                    if room == 0 {
                        room = self.intake.room().await;
                    }
                }
            }
            if room == 0 {
                break End::Full;
            }
        };
        let cancelling = self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default());
        self.intake.broker.step("stop consuming", cancelling).await?;
        while let Some(Some(delivery)) = self.consumer.next().now_or_never() {
            let batch = self.batch(Some(delivery))?;
            self.take_in(batch, shutdown).await?;
        }
        Ok(end)
    }

    /// `first`, and what else has arrived by now.
    fn batch(&mut self, first: Option<lapin::Result<Delivery>>) -> Result<Vec<Delivery>, AmqpError> {
        let mut batch = vec![self.delivered(first)?];
        while batch.len() < BATCH
            && let Some(next @ Some(_)) = self.consumer.next().now_or_never()
        {
            batch.push(self.delivered(next)?);
        }
        Ok(batch)
    }

    /// The stream's end is a cancel by the broker: ours ends the loop before.
    fn delivered(&self, next: Option<lapin::Result<Delivery>>) -> Result<Delivery, AmqpError> {
        let place = self.intake.broker.to_string();
        match next {
            Some(Ok(delivery)) => Ok(delivery),
            Some(Err(source)) => Err(AmqpError::Failed { place, operation: "consume", source }),
            None => Err(AmqpError::Cancelled { place, queue: self.intake.topology.queue.clone() }),
        }
    }

    async fn take_in(&self, batch: Vec<Delivery>, shutdown: &Shutdown) -> Result<(), AmqpError> {
        failpoint::reach("intake.delivered");
        let (mut jobs, mut of_jobs) = (Vec::new(), Vec::new());
        let mut refused = Vec::new();
        for delivery in batch {
            match self.intake.terms.read(&self.intake.topology.queue, &delivery.data, &delivery.properties) {
                Ok(job) => {
                    jobs.push(job);
                    of_jobs.push(delivery);
                }
                Err(rejection) => refused.push((delivery, *rejection)),
            }
        }
        let answers = match jobs.is_empty() {
            true => Vec::new(),
            false => patiently(shutdown, "enqueue", || self.intake.store.enqueue(&jobs)).await?,
        };
        failpoint::reach("intake.committed");
        let mut taken = Vec::new();
        for ((delivery, job), answer) in of_jobs.into_iter().zip(&jobs).zip(answers) {
            metrics::INTAKE.add(&[answer_name(answer)], 1);
            match answer {
                Enqueued::Inserted | Enqueued::Duplicate { .. } => taken.push(delivery),
                Enqueued::Conflict => refused.push((delivery, conflict(job))),
            }
        }
        match taken.last() {
            // Everything delivered up to here is committed, earlier batches included.
            Some(last) if refused.is_empty() => self.ack_with(last, BasicAckOptions { multiple: true }).await?,
            _ => {
                for delivery in &taken {
                    self.ack(delivery).await?;
                }
            }
        }
        failpoint::reach("intake.acked");
        for (delivery, rejection) in refused {
            self.refuse(&delivery, &rejection, shutdown).await?;
        }
        Ok(())
    }

    /// Row first, dead letter second, ack last: whatever ends in between is repeated, and the row is written once.
    async fn refuse(&self, delivery: &Delivery, rejection: &Rejection, shutdown: &Shutdown) -> Result<(), AmqpError> {
        patiently(shutdown, "reject", || self.intake.store.reject(rejection)).await?;
        failpoint::reach("intake.rejected");
        let told = delivery.properties.message_id().as_ref().map(|id| id.as_str().to_owned());
        let letter = Message {
            exchange: &self.intake.topology.dead_letter_exchange,
            routing_key: &self.intake.topology.queue,
            id: told.unwrap_or_else(|| rejection.digest.to_string()),
            correlation_id: delivery.properties.correlation_id().as_ref().map(|id| id.as_str()),
            reply_to: delivery.properties.reply_to().as_ref().map(|queue| queue.as_str()),
            headers: vec![
                ("x-apbd-code", rejection.code.to_string()),
                ("x-apbd-reason", rejection.reason.clone()),
                ("x-apbd-queue", self.intake.topology.queue.clone()),
            ],
            body: &delivery.data,
        };
        let place = || self.intake.broker.to_string();
        self.dead_letters
            .publish(&letter)
            .await
            .map_err(|source| AmqpError::DeadLetter { place: place(), source: Box::new(source) })?;
        failpoint::reach("intake.dead_lettered");
        metrics::REJECTED.add(&["amqp", rejection.code.as_str()], 1);
        info!(rejection.code = %rejection.code, rejection.digest = %rejection.digest, "a message was refused");
        self.ack(delivery).await
    }

    async fn ack(&self, delivery: &Delivery) -> Result<(), AmqpError> {
        self.ack_with(delivery, BasicAckOptions::default()).await
    }

    async fn ack_with(&self, delivery: &Delivery, options: BasicAckOptions) -> Result<(), AmqpError> {
        let broker = &self.intake.broker;
        match broker.step("ack", delivery.acker.ack(options)).await? {
            true => Ok(()),
            // The channel has gone under it: the broker delivers again, and the inbox knows the job.
            false => Err(AmqpError::Cancelled { place: broker.to_string(), queue: self.intake.topology.queue.clone() }),
        }
    }
}

fn answer_name(answer: Enqueued) -> &'static str {
    match answer {
        Enqueued::Inserted => "inserted",
        Enqueued::Duplicate { .. } => "duplicate",
        Enqueued::Conflict => "conflict",
    }
}

fn conflict(new: &NewJob) -> Rejection {
    Rejection {
        door: Door::Amqp,
        origin: new.origin.clone(),
        message_id: Some(new.job.id.to_string()),
        job_id: Some(new.job.id),
        code: ErrorCode::PayloadConflict,
        reason: "another job with this id and another payload was there first".to_owned(),
        digest: new.job.payload_digest,
        size_bytes: serde_json::to_vec(&new.job.message).map_or(0, |text| text.len() as u64),
    }
}

/// Repeats a call while the store does not answer. What is in flight stays unacked meanwhile: giving it back would count as a delivery.
async fn patiently<T, F: Future<Output = Result<T, StoreError>>>(
    shutdown: &Shutdown,
    operation: &'static str,
    call: impl Fn() -> F,
) -> Result<T, StoreError> {
    let mut wait = STORE_WAIT.0;
    loop {
        match call().await {
            Err(error) if error.is_transient() => {
                warn!(store.operation = operation, error.message = %error, "the store does not answer");
                tokio::select! {
                    () = shutdown.draining() => return Err(error),
                    () = tokio::time::sleep(wait) => wait = (wait * 2).min(STORE_WAIT.1),
                }
            }
            answer => return answer,
        }
    }
}
