//! From text to batches: sources ([`wikitext`]), files of token ids ([`shard`]), and who reads what when ([`loader`]).

pub mod download;
pub mod loader;
pub mod prepare;
pub mod shard;
pub mod wikitext;
