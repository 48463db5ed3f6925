//! Tests of one process: the library's functions, and the binary as one rank. Each takes seconds.

#[path = "../common/mod.rs"]
mod common;

mod compare;
mod config;
mod devices;
mod doctor;
mod documents;
mod download;
mod driver;
mod dry_run;
mod errors;
mod evaluate;
mod faults;
mod golden;
mod interop;
mod kernels;
mod layers;
mod lease;
mod libraries;
mod loader;
mod logs;
mod map;
mod model;
mod pipeline;
mod prepare;
mod runs;
mod sample;
mod shard;
mod tensorboard;
mod text;
mod tokenizer;
