//! Tests that take minutes, with one rank or several; `launch/test --full` runs them.

#[path = "../common/mod.rs"]
mod common;

mod corruption;
#[cfg(feature = "mpi")]
mod documents;
mod dry_run;
mod errors;
mod hugging_face;
mod kernels;
mod lease;
mod resume;
mod tensorboard;
#[cfg(feature = "mpi")]
mod watchdog;
#[cfg(feature = "mpi")]
mod zero1;
