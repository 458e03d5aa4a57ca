//! What is written for producers and operators, held against the program.

mod compose;
mod events;
mod folders;
mod messages;
mod reasons;
#[path = "../services/mod.rs"]
mod services;
mod text;
