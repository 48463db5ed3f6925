//! What takes minutes, with one rank or several; `launch/test --full` runs it.

#[path = "../common/mod.rs"]
mod common;

mod corruption;
mod lease;
#[cfg(feature = "mpi")]
mod watchdog;
