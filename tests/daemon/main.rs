//! What the daemon promises, shown on the real program with real services.

#[path = "../services/mod.rs"]
mod services;

mod broker;
mod company;
mod drops;
mod errors;
mod harness;
mod hostile;
mod intake;
mod life;
mod nodes;
mod objects;
mod outputs;
mod pool;
mod reading;
mod shared_database;
mod supervision;
mod tls;
