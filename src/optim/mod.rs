//! How weights change: AdamW ([`adamw`]), and how fast ([`schedule`]).

pub mod adamw;
pub mod schedule;
