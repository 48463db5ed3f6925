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
//!      ──comm──► sum over the ranks ──optim──► flat parameters
//!      ──rank 0──► train.csv, eval.csv, samples/, checkpoints/
//! ```
//!
//! # The modules, from the ground up
//!
//! A module imports only those of lower floors; `docs/design.md` has the whole table, and `tests/quick/layers.rs` holds the
//! sources to it.
//!
//! - Floor 0: [`error`] (classes of errors, and the exit code of each), [`files`] (durable writes, digests), [`host`],
//!   [`patience`] (deadlines), [`random`] (randomness as a function of where it is drawn), [`stop`] (requests to stop)
//! - Floor 1: [`launcher`] (who started this process), [`torch`] (CPU or GPU, threads, memory, and what LibTorch offers in
//!   C++ only), [`config`] (the YAML file, and the checked [`config::Plan`] that it becomes), [`tokenizer`] (byte-level
//!   BPE)
//! - Floor 2: [`comm`] (the ranks and what they do together: through MPI, through NCCL, or alone), [`data`] (text, files of
//!   token ids, and who reads what at which step), [`model`] (the GPT; no ranks, no files), [`optim`] (AdamW, schedules),
//!   [`watch`] (which rank hangs, and which is slow)
//! - Floor 3: [`run`] (the run directory: tables, checkpoints, and whose it is)
//! - Floor 4: [`train`] (the loop), [`compare`] (the same training on each device, timed), [`doctor`] (what is wrong with a
//!   job before it trains), [`interop`] (Hugging Face's folders), [`view`] (runs, in a terminal)
//! - Floor 5: [`cli`] (the command line)

pub mod cli;
pub mod comm;
pub mod compare;
pub mod config;
pub mod data;
pub mod doctor;
pub mod error;
pub mod files;
pub mod host;
pub mod interop;
pub mod launcher;
pub mod model;
pub mod optim;
pub mod patience;
pub mod random;
pub mod run;
pub mod stop;
pub mod tokenizer;
pub mod torch;
pub mod train;
pub mod view;
pub mod watch;
