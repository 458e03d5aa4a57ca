//! Queues and exchanges: a durable quorum work queue with a delivery limit, and where its dead letters go.
//!
//! Invariant: declaring is idempotent; a queue that exists with other arguments is an error, never changed.

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};

use super::broker::{AmqpError, Broker};

/// Names, and who makes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// Queue that jobs come by.
    pub queue: String,
    /// Exchange for what is no job, and for what was delivered too often.
    pub dead_letter_exchange: String,
    /// Queue that keeps what comes to that exchange.
    pub dead_letter_queue: String,
    /// Deliveries of one message after which the broker gives it up.
    pub delivery_limit: u32,
    /// Declare them; otherwise they must be there.
    pub declare: bool,
}

impl Default for Topology {
    fn default() -> Self {
        Self::named("apbd.jobs")
    }
}

impl Topology {
    /// A work queue of that name, and a dead-letter exchange and queue named after it.
    pub fn named(queue: &str) -> Self {
        let dead = format!("{queue}.dead");
        Self {
            queue: queue.to_owned(),
            dead_letter_exchange: dead.clone(),
            dead_letter_queue: dead,
            delivery_limit: 20,
            declare: true,
        }
    }

    /// Makes sure that all of it is there. A refusal closes `channel`.
    pub async fn ensure(&self, broker: &Broker, channel: &Channel) -> Result<(), AmqpError> {
        let passive = !self.declare;
        let exchange = ExchangeDeclareOptions { passive, durable: true, ..ExchangeDeclareOptions::default() };
        let queue = QueueDeclareOptions { passive, durable: true, ..QueueDeclareOptions::default() };
        let (dead_exchange, dead_queue) = (self.dead_letter_exchange.as_str(), self.dead_letter_queue.as_str());
        let kind = ExchangeKind::Fanout;
        let declaring = channel.exchange_declare(dead_exchange.into(), kind, exchange, FieldTable::default());
        broker.step("declare the dead-letter exchange", declaring).await?;
        let declaring = channel.queue_declare(dead_queue.into(), queue, quorum());
        broker.step("declare the dead-letter queue", declaring).await?;
        if self.declare {
            let options = QueueBindOptions::default();
            let table = FieldTable::default();
            let binding = channel.queue_bind(dead_queue.into(), dead_exchange.into(), "".into(), options, table);
            broker.step("bind the dead-letter queue", binding).await?;
        }
        let declaring = channel.queue_declare(self.queue.as_str().into(), queue, self.work_arguments());
        broker.step("declare the work queue", declaring).await?;
        Ok(())
    }

    /// At-least-once dead lettering needs `reject-publish`: a full dead-letter queue must push back, not lose.
    fn work_arguments(&self) -> FieldTable {
        let mut arguments = quorum();
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(i64::from(self.delivery_limit)));
        arguments.insert("x-dead-letter-exchange".into(), text(&self.dead_letter_exchange));
        arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
        arguments.insert("x-overflow".into(), text("reject-publish"));
        arguments
    }
}

fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}
