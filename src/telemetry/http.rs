//! `/healthz`, `/readyz` and `/metrics` over HTTP.
//!
//! Invariant: reads only; says nothing of any job's content.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use super::health::Health;
use super::metrics;

/// Listens; done before the daemon starts, so that a port that is taken is a start-up error.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, std::io::Error> {
    TcpListener::bind(address).await
}

/// Answers until `over`.
pub async fn serve(
    listener: TcpListener,
    health: Health,
    over: impl Future<Output = ()> + Send + 'static,
) -> Result<(), std::io::Error> {
    let router = Router::new()
        .route("/healthz", get(|| async { "alive\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(measured))
        .with_state(health);
    axum::serve(listener, router).with_graceful_shutdown(over).await
}

async fn measured(State(health): State<Health>) -> impl IntoResponse {
    for (part, is_ready) in health.parts() {
        metrics::READY.set(&[&part], u64::from(is_ready));
    }
    ([("content-type", "text/plain; version=0.0.4")], metrics::text())
}

async fn ready(State(health): State<Health>) -> (StatusCode, String) {
    let faults = health.faults();
    match faults.is_empty() {
        true => (StatusCode::OK, "ready\n".to_owned()),
        false => (StatusCode::SERVICE_UNAVAILABLE, faults.join("\n") + "\n"),
    }
}
