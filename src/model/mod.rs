//! The model: mathematics on tensors, with no idea of ranks or files.

pub mod cache;
pub mod generate;
pub mod gpt;
pub mod head;
pub mod parameters;
mod written;

pub use gpt::Gpt;
pub use parameters::Parameters;
