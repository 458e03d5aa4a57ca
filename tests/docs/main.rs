//! What is written for producers and operators, held against the program.

mod events;
mod folders;
mod messages;
mod reasons;
mod text;
