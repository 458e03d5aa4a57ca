//! What the daemon promises, shown on the real program with real services.

#[path = "../services/mod.rs"]
mod services;

mod harness;
mod intake;
mod life;
mod objects;
mod shared_database;
mod supervision;
