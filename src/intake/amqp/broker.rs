//! Connections to the broker.
//!
//! Invariant: every wait is bounded; no text made here has the password in it.

use std::fmt;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::tcp::OwnedTLSConfig;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties, Event};
use tracing::{info, warn};

use crate::telemetry::health::Component;

/// A broker that does not answer within this is down.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A connection that is silent for twice this long is dead; tells half-open sockets.
const HEARTBEAT_S: u16 = 5;

/// What can go wrong between this process and the broker. All of it is worth another try.
#[derive(Debug, thiserror::Error)]
pub enum AmqpError {
    /// The location is not one.
    #[error("broker URL: {reason}; expected amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…")]
    Url { reason: String },
    /// The certificate of the authority could not be used.
    #[error("{path}: {reason}")]
    Certificate { path: String, reason: String },
    /// The broker refused an operation, or the connection broke in it.
    #[error("{place}: {operation}: {source}")]
    Failed { place: String, operation: &'static str, source: lapin::Error },
    /// The broker did not answer in time.
    #[error("{place}: {operation}: no answer within {} s", bound.as_secs())]
    TimedOut { place: String, operation: &'static str, bound: Duration },
    /// The broker ended the consumer: its queue was deleted, or moved to another node.
    #[error("{place}: the broker cancelled the consumer of queue {queue}")]
    Cancelled { place: String, queue: String },
    /// A dead letter has no place to go.
    #[error("{place}: {source}")]
    DeadLetter { place: String, source: Box<super::publisher::PublishError> },
    /// The store refuses, and not for want of an answer.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
}

/// A broker, and how to speak to it.
#[derive(Clone)]
pub struct Broker {
    uri: AMQPUri,
    certificates: Option<String>,
    name: String,
}

impl Broker {
    /// The broker at `url`. `certificates` are authorities in PEM that are trusted beside the system's; `name` is how the broker's
    /// operator sees this client.
    pub fn new(url: &str, certificates: Option<String>, name: &str) -> Result<Self, AmqpError> {
        let mut uri: AMQPUri = url.parse().map_err(|reason| AmqpError::Url { reason })?;
        uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
        Ok(Self { uri, certificates, name: name.to_owned() })
    }

    /// Opens a connection and watches it: a broker that blocks it is reported to `health`.
    pub async fn connect(&self, health: &Component) -> Result<Connection, AmqpError> {
        let properties = ConnectionProperties::default().with_connection_name(self.name.as_str().into());
        let tls = OwnedTLSConfig { identity: None, cert_chain: self.certificates.clone() };
        let runtime = self.step("runtime", async { lapin::runtime::default_runtime() }).await?;
        let connecting = Connection::connect_uri_with_config(self.uri.clone(), properties, tls, runtime);
        let connection = self.step("connect", connecting).await?;
        let mut events = connection.events_listener();
        let (place, health) = (self.to_string(), health.clone());
        // Ends with the connection: the stream does.
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Event::ConnectionBlocked(reason) => {
                        warn!(broker.place = %place, reason, "the broker has blocked the connection");
                        health.degraded(&format!("{place}: the broker has blocked the connection: {reason}"));
                    }
                    Event::ConnectionUnblocked => {
                        info!(broker.place = %place, "the broker has unblocked the connection");
                        health.ready();
                    }
                    Event::Error(_) => return,
                    _ => {}
                }
            }
        });
        Ok(connection)
    }

    /// One request to the broker, bounded, with its place in the error.
    pub(super) async fn step<T>(
        &self,
        operation: &'static str,
        request: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T, AmqpError> {
        match tokio::time::timeout(ANSWER_WITHIN, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) => Err(AmqpError::Failed { place: self.to_string(), operation, source }),
            Err(_) => Err(AmqpError::TimedOut { place: self.to_string(), operation, bound: ANSWER_WITHIN }),
        }
    }
}

impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.uri.scheme == AMQPScheme::AMQPS { "amqps" } else { "amqp" };
        let (host, port) = (&self.uri.authority.host, self.uri.authority.port);
        write!(f, "{scheme}://{host}:{port}/{}", self.uri.vhost.trim_start_matches('/'))
    }
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Broker({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_password_is_shown() {
        let broker = Broker::new("amqps://user:s3cret@mq.example:5671/docs", None, "apbd").expect("a broker");
        assert_eq!(format!("{broker}"), "amqps://mq.example:5671/docs");
        assert!(!format!("{broker:?}").contains("s3cret"));
        let error = Broker::new("http://user:s3cret@mq.example", None, "apbd").expect_err("no broker").to_string();
        assert!(!error.contains("s3cret"), "{error}");
    }
}
