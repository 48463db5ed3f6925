//! From text to batches: sources ([`wikitext`], [`sample`]), files of token ids ([`shard`]), and who reads what when ([`loader`]).

pub mod download;
pub mod loader;
pub mod prepare;
pub mod sample;
pub mod shard;
pub mod wikitext;
