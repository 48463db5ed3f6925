//! A run's model as a folder that `transformers` loads.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{json, Value};
use tch::{no_grad, Kind, Tensor};

use super::{card, gpt2, is_transposed, CONFIG, MODEL, TOKENIZER};
use crate::config::{Config, Precision};
use crate::error::Result;
use crate::files::{resolve_new, write_synced, Partial};
use crate::model::gpt::{HEAD, WPE, WTE};
use crate::model::Gpt;
use crate::run::checkpoint::{write_tensors, State};
use crate::run::RunDir;
use crate::tokenizer::{Tokenizer, END_OF_TEXT};

/// What is exported: a run's model at one of its checkpoints.
pub struct Exported<'a> {
    /// The run, whose tables the model card quotes.
    pub dir: &'a RunDir,
    /// Its configuration.
    pub config: &'a Config,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The checkpoint's state.
    pub state: &'a State,
    /// The checkpoint's weights, in host memory.
    pub model: &'a Gpt,
}

/// Writes the folder `out` with everything that `GPT2LMHeadModel.from_pretrained` and `AutoTokenizer.from_pretrained`
/// read, its weights rounded to this precision, and a model card.
///
/// # Errors
/// Usage, if `out` exists, or no GPT-2 computes what this model does; storage, if the folder cannot be written.
pub fn export(exported: &Exported, out: &Path, precision: Precision) -> Result<()> {
    let Exported { tokenizer, model, .. } = exported;
    let place = resolve_new(out)?;
    let (kind, dtype) = match precision {
        Precision::Fp32 => (Kind::Float, "float32"),
        Precision::Bf16 => (Kind::BFloat16, "bfloat16"),
    };
    let end_of_text = tokenizer.end_of_text();
    let config = gpt2::describe(&model.shape, end_of_text, dtype)?;
    let generation = json!({"bos_token_id": end_of_text, "eos_token_id": end_of_text});
    let tokenizer_config = json!({
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": model.shape.block_size,
    });
    let card = card::write(exported, precision)?;

    let partial = Partial::beside(&place)?;
    let write = |name: &str, text: &str| write_synced(&partial.path().join(name), text.as_bytes());
    write(CONFIG, &pretty(&config)?)?;
    write("generation_config.json", &pretty(&generation)?)?;
    write("tokenizer_config.json", &pretty(&tokenizer_config)?)?;
    write(TOKENIZER, &tokenizer.to_json())?;
    write("README.md", &card)?;
    // `transformers` asks for this word about the tensors' origin.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    write_tensors(&partial.path().join(MODEL), &tensors(model, kind), Some(metadata))?;
    partial.appear()
}

fn pretty(value: &Value) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// The weights under GPT-2's names, as it has them. A GPT-2 has a bias everywhere: where the model has none, it is zero.
fn tensors(model: &Gpt, kind: Kind) -> Vec<(String, Tensor)> {
    no_grad(|| {
        let mut all = Vec::new();
        for spec in &model.parameters.specs {
            let weight = spec.view(&model.parameters.flat);
            let weight = if is_transposed(&spec.name) { weight.tr() } else { weight };
            all.push((spec.name.clone(), weight.to_kind(kind)));
            let part = spec.name.strip_suffix(".weight").filter(|_| ![HEAD, WPE, WTE].contains(&&spec.name[..]));
            if let Some(part) = part.filter(|_| !model.shape.bias) {
                all.push((format!("{part}.bias"), Tensor::zeros([spec.shape[0]], (kind, weight.device()))));
            }
        }
        all
    })
}
