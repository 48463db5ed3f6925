//! Which key is meant by a name that is none.

/// What other programs call the keys of a configuration.
const ALIASES: [(&str, &str); 27] = [
    ("seed", "random_seed manual_seed"),
    ("device", "accelerator"),
    ("precision", "dtype amp bf16 fp16 mixed_precision"),
    ("threads", "num_threads n_threads num_workers"),
    ("data.dir", "dataset data_dir data_path dataset_path"),
    (
        "data.block_size",
        "seq_len seq_length sequence_length max_seq_len max_seq_length context_length n_ctx n_positions",
    ),
    ("data.batch_size", "batch bs global_batch_size total_batch_size train_batch_size"),
    (
        "data.micro_batch",
        "micro_batch_size per_device_batch_size per_device_train_batch_size gradient_accumulation_steps grad_accum \
         accumulation accumulate_grad_batches",
    ),
    ("model.n_layer", "layers num_layers n_layers depth num_hidden_layers"),
    ("model.n_head", "heads num_heads n_heads num_attention_heads"),
    ("model.n_embd", "hidden_size d_model dim embed_dim n_embed width"),
    ("model.tied_head", "tie_weights tie_embeddings tie_word_embeddings"),
    ("model.recompute", "gradient_checkpointing activation_checkpointing checkpointing"),
    ("optim.lr", "learning_rate lr_max max_lr base_lr peak_lr max_learning_rate"),
    ("optim.min_lr", "lr_min min_learning_rate end_lr final_lr"),
    ("optim.betas", "beta1 beta2 adam_beta1 adam_beta2"),
    ("optim.eps", "epsilon adam_eps adam_epsilon"),
    ("optim.weight_decay", "wd"),
    ("optim.grad_clip", "clip clip_grad max_grad_norm gradient_clip gradient_clipping clip_grad_norm"),
    ("optim.schedule", "scheduler lr_scheduler lr_schedule lr_scheduler_type decay"),
    ("optim.warmup_steps", "warmup warmup_iters lr_warmup_steps num_warmup_steps warmup_ratio"),
    ("optim.decay_steps", "lr_decay_iters lr_decay_steps decay_iters"),
    ("train.steps", "max_steps max_iters iterations iters n_steps"),
    ("train.epochs", "num_epochs n_epochs max_epochs num_train_epochs"),
    ("train.tokens", "max_tokens n_tokens num_tokens total_tokens train_tokens"),
    ("train.eval_every", "eval_interval eval_steps eval_freq validate_every"),
    ("train.save_every", "save_interval save_steps checkpoint_every checkpoint_interval ckpt_every"),
];

/// Less alike than this, two words have nothing to do with each other.
const ALIKE: f64 = 0.5;

/// The path of the key that `name` in a section may stand for: the same word in another section, the key that is known by
/// this name elsewhere, else the most alike, of the section's own keys (`here`) first. `section` is empty or ends with a dot,
/// and `paths` are all keys.
pub fn meant(name: &str, section: &str, here: &[&str], paths: &[String]) -> Option<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let word = name.to_lowercase().replace('-', "_");
    if let Some(path) = paths.iter().find(|path| last(path) == word) {
        return Some(path.clone());
    }
    let known = ALIASES.iter().find(|(_, names)| names.split_whitespace().any(|alias| alias == word));
    if let Some((path, _)) = known {
        return Some((*path).into());
    }
    let alike = |other: &str| strsim::normalized_damerau_levenshtein(other, &word);
    let own = here.iter().map(|key| (alike(key), format!("{section}{key}")));
    let all = paths.iter().map(|path| (alike(&last(path)), path.clone()));
    let best = |found: &mut dyn Iterator<Item = (f64, String)>| {
        found.filter(|(score, _)| *score >= ALIKE).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, path)| path)
    };
    best(&mut own.into_iter()).or_else(|| best(&mut all.into_iter()))
}
