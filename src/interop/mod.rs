//! Hugging Face's folders: a run's model as one that `transformers` loads ([`export()`]), and a GPT-2 of theirs as a run
//! ([`import()`]).
//!
//! GPT-2's linear layers are `Conv1D` there: their weights are (in, out), and ours are (out, in). A square one loads
//! either way round, so [`is_transposed`] says by the name which they are.

mod card;
mod export;
mod gpt2;
mod import;

pub use export::{export, Exported};
pub use import::import;

const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";

/// Whether this tensor is (in, out) in Hugging Face's files.
fn is_transposed(name: &str) -> bool {
    ["c_attn.weight", "c_fc.weight", "c_proj.weight"].iter().any(|linear| name.ends_with(linear))
}
