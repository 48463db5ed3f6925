//! From text to batches: where text comes from ([`wikitext`], [`inputs`], [`sample`]), the documents in it ([`corpus`]), files of token
//! ids ([`shard`]) in a data folder ([`prepare`](mod@prepare), [`folder`]), and who reads what when ([`loader`]).

pub mod corpus;
pub mod documents;
pub mod download;
pub mod folder;
mod ids;
pub mod inputs;
pub mod loader;
pub mod prepare;
mod records;
pub mod sample;
pub mod shard;
pub mod wikitext;
