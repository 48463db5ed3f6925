//! The model: mathematics on tensors, with no idea of ranks or files.

pub mod cache;
mod decode;
pub mod generate;
pub mod gpt;
pub mod head;
pub mod parameters;
mod product;
mod written;

pub use gpt::Gpt;
pub use parameters::Parameters;
