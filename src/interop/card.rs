//! The model card of an exported run: `README.md`, which Hugging Face shows.

use std::fmt::Write;
use std::fs;

use super::export::Exported;
use crate::config::{Config, Precision};
use crate::data::folder::Meta;
use crate::error::Result;
use crate::run::tables::{EvalRow, Table};

/// The text of the card: figures of the checkpoint and of the run's tables, its data, its configuration.
///
/// # Errors
/// Storage, if `eval.csv` cannot be read.
pub fn write(exported: &Exported, precision: Precision) -> Result<String> {
    let Exported { dir, config, tokenizer, state, model } = exported;
    let evaluations: Vec<EvalRow> = Table::rows(&dir.eval_csv())?;
    let valid = || evaluations.iter().filter(|row| row.split == "valid");
    let shape = &model.shape;
    let mut text = format!(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2, lockstep]\n---\n\n# {}\n\n\
         A GPT-2 of {} parameters: {} layers, {} heads, width {}, {} tokens of context, and a vocabulary of {}. \
         Lockstep {} exported it. The weights are {}.\n\n| | |\n|---|---|\n",
        config.name,
        model.parameters.numel(),
        shape.n_layer,
        shape.n_head,
        shape.n_embd,
        shape.block_size,
        tokenizer.vocab_size(),
        env!("CARGO_PKG_VERSION"),
        precision_name(precision),
    );
    let mut row = |name: &str, value: String| writeln!(text, "| {name} | {value} |");
    if state.is_imported() {
        row("training", "none here: the weights were imported".into())?;
    } else {
        row("training steps", state.step.to_string())?;
        row("training tokens", state.tokens.to_string())?;
        row("training data", data(config))?;
    }
    if let Some(here) = valid().find(|row| row.step == state.step) {
        row("validation loss of these weights", figures(here))?;
    }
    if let Some(best) = valid().min_by(|a, b| a.loss.total_cmp(&b.loss)) {
        row("best validation loss of the run", format!("{}, after {} steps", figures(best), best.step))?;
    }
    if !shape.bias {
        row("biases", "zero: the model was trained without".into())?;
    }
    write!(
        text,
        "\n```python\nfrom transformers import AutoTokenizer, GPT2LMHeadModel\n\n\
         tokenizer = AutoTokenizer.from_pretrained(\".\")\nmodel = GPT2LMHeadModel.from_pretrained(\".\")\n```\n\n\
         ## Configuration\n\n```yaml\n{}```\n",
        config.to_yaml()?
    )?;
    Ok(text)
}

fn precision_name(precision: Precision) -> &'static str {
    match precision {
        Precision::Fp32 => "fp32",
        Precision::Bf16 => "bf16",
    }
}

/// A loss in nats a token, and its perplexities.
fn figures(row: &EvalRow) -> String {
    let word = row.word_ppl.map(|ppl| format!(", for each word {ppl:.2}")).unwrap_or_default();
    format!("{:.4} (perplexity {:.2}{word})", row.loss, row.ppl)
}

/// What the data folder says that it holds; its name, if it is gone.
fn data(config: &Config) -> String {
    let dir = &config.data.dir;
    let meta = fs::read(dir.join("meta.json")).ok().and_then(|text| serde_json::from_slice::<Meta>(&text).ok());
    match meta {
        Some(meta) => format!("{}, {} tokens ({})", meta.source, meta.train.tokens, meta.tokenizer),
        None => dir.display().to_string(),
    }
}
