//! Lockstep trains GPT language models with N processes, called ranks, that move in lockstep: each holds the whole model,
//! computes its share of every batch, and adds its gradients to the others'.
//!
//! # The data's way
//!
//! ```text
//! text ──tokenizer──► ids ──data::prepare──► train.bin, valid.bin, test.bin
//!      ──data::loader (seed, step, rank, world size)──► Batch: inputs, targets, weights
//!      ──model::Gpt──► hidden states ──model::head──► loss      (the logits never exist whole)
//!      ──backward, block by block──► flat gradient
//!      ──comm──► sum over the ranks ──train::optimizer──► flat parameters
//!      ──rank 0──► train.csv, eval.csv, samples/, checkpoints/
//! ```
//!
//! # The modules, from the ground up
//!
//! A module imports only those above it in this list, but for [`checkpoint`], which knows the optimizer. `docs/design.md`
//! has the whole table, and `tests/layers.rs` holds the sources to it.
//!
//! - [`error`]: the classes of errors, and the exit code of each
//! - [`random`]: randomness as a function of where it is drawn
//! - [`device`]: CPU or GPU, threads, memory, and how fast this machine multiplies
//! - [`config`]: the YAML file, and the checked [`config::Plan`] that it becomes
//! - [`tokenizer`]: byte-level BPE, trained and applied, and GPT-2's vocabulary
//! - [`comm`]: the ranks and what they do together: through MPI, through NCCL, or alone
//! - [`metrics`]: the rows of the CSV files
//! - [`data`]: text, files of token ids, and who reads what at which step
//! - [`model`]: the GPT, its flat memory, its head, and generation; no ranks, no files
//! - [`fault`]: signals, as requests to stop; who trains in a run directory; which rank hangs, and which is slow
//! - [`checkpoint`]: folders that are complete or absent
//! - [`train`]: the loop, the optimizer, the schedules, evaluation, and the run directory
//! - [`compare`]: the same training on each device, timed
//! - [`doctor`]: what is wrong with a job before it trains
//! - [`cli`]: the command line's types
//! - [`commands`]: a function for each verb

pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod commands;
pub mod compare;
pub mod config;
pub mod data;
pub mod device;
pub mod doctor;
pub mod error;
pub mod fault;
pub mod metrics;
pub mod model;
pub mod random;
pub mod tokenizer;
pub mod train;
