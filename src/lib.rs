//! Lockstep trains GPT language models with N processes that move in lockstep.
pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod commands;
pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod fault;
pub mod metrics;
pub mod model;
pub mod random;
pub mod tokenizer;
pub mod train;
