//! Publishing with certainty: a message counts as sent when the broker has confirmed it and has not given it back.
//!
//! Invariant: `Ok` means that a queue has it, durably; anything else may be repeated, since every message has a stable id.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection};

use super::broker::{AmqpError, Broker};
use crate::failpoint;
use crate::telemetry::health::Component;

/// A blocked broker confirms nothing; longer than this is not waited.
const CONFIRM_WITHIN: Duration = Duration::from_secs(30);
/// Delivery mode of messages that survive a restart of the broker.
const PERSISTENT: u8 = 2;

/// A message to send; JSON.
#[derive(Debug, Clone, PartialEq)]
pub struct Message<'a> {
    /// Exchange; empty: straight to the queue named by the routing key.
    pub exchange: &'a str,
    /// Routing key, or the queue's name.
    pub routing_key: &'a str,
    /// Identity, the same however often it is sent.
    pub id: String,
    /// The producer's own mark.
    pub correlation_id: Option<&'a str>,
    /// Queue for the answer.
    pub reply_to: Option<&'a str>,
    /// Text headers.
    pub headers: Vec<(&'static str, String)>,
    /// The message.
    pub body: &'a [u8],
}

/// Why a message does not count as sent.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// No queue takes it: the target does not exist. The connection is fine.
    #[error("returned by the broker: {reason}")]
    Returned { reason: String },
    /// The broker refused to keep it: a queue is full. The connection is fine.
    #[error("refused by the broker: a queue that it goes to is full")]
    Refused,
    /// Whether it arrived is not known.
    #[error(transparent)]
    Broken(#[from] AmqpError),
}

/// A connection for publishing.
pub struct Publisher {
    broker: Broker,
    /// Keeps the channel's connection open.
    _connection: Option<Connection>,
    channel: Channel,
}

impl Publisher {
    /// Opens a connection of its own, so that a broker that blocks publishers does not stop consumers.
    pub async fn connect(broker: &Broker, health: &Component) -> Result<Self, AmqpError> {
        let connection = broker.connect(health).await?;
        let mut publisher = Self::on(broker, &connection).await?;
        publisher._connection = Some(connection);
        Ok(publisher)
    }

    /// A channel on a connection that somebody else keeps.
    pub async fn on(broker: &Broker, connection: &Connection) -> Result<Self, AmqpError> {
        let channel = broker.step("open a channel", connection.create_channel()).await?;
        broker.step("ask for confirms", channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(Self { broker: broker.clone(), _connection: None, channel })
    }

    /// The channel, to declare on it.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Sends a message and waits until it is safe.
    pub async fn publish(&self, message: &Message<'_>) -> Result<(), PublishError> {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let sending = self.channel.basic_publish(
            message.exchange.into(),
            message.routing_key.into(),
            options,
            message.body,
            properties(message),
        );
        let confirm = self.broker.step("publish", sending).await?;
        failpoint::reach("publish.unconfirmed");
        let timed_out =
            |_| AmqpError::TimedOut { place: self.broker.to_string(), operation: "confirm", bound: CONFIRM_WITHIN };
        let confirmed = tokio::time::timeout(CONFIRM_WITHIN, confirm).await.map_err(timed_out)?;
        let broken = |source| AmqpError::Failed { place: self.broker.to_string(), operation: "confirm", source };
        match confirmed.map_err(broken)? {
            // A returned message is acked too: that it was acked alone says nothing.
            Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned)) => {
                Err(PublishError::Returned { reason: returned.reply_text.to_string() })
            }
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Nack(None) | Confirmation::NotRequested => Err(PublishError::Refused),
        }
    }
}

fn properties(message: &Message<'_>) -> BasicProperties {
    let mut properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_delivery_mode(PERSISTENT)
        .with_app_id("apbd".into())
        .with_message_id(message.id.as_str().into());
    if let Some(id) = message.correlation_id {
        properties = properties.with_correlation_id(id.into());
    }
    if let Some(queue) = message.reply_to {
        properties = properties.with_reply_to(queue.into());
    }
    if !message.headers.is_empty() {
        let mut table = FieldTable::default();
        for (name, value) in &message.headers {
            table.insert((*name).into(), AMQPValue::LongString(value.as_str().into()));
        }
        properties = properties.with_headers(table);
    }
    properties
}
