//! What several ranks on one machine show, within seconds a test; `launch/local` starts them.
#![cfg(feature = "mpi")]

#[path = "../common/mod.rs"]
mod common;

mod collectives;
mod data;
mod distributed;
mod doctor;
mod nonfinite;
mod resume;
mod watchdog;
mod zero1;
