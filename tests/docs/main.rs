//! What is written for producers and operators, held against the program.

mod chart;
mod compose;
mod events;
mod folders;
mod messages;
mod nodes;
mod operations;
mod reasons;
#[path = "../services/mod.rs"]
mod services;
mod text;
