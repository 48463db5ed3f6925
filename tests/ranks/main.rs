//! Tests of several ranks on one machine, which `launch/local` starts. Each takes seconds.
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
