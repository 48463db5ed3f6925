//! Times BPE training and GPT-2 encoding on a text file; prints one JSON object of seconds.
//!
//! `RAYON_NUM_THREADS=1 cargo run --release --example bench_tokenizer -- TEXT VOCAB_SIZE` for one
//! thread. `analysis/bench/bench_tokenizer.py` sets the figures beside those of other tokenizers.

use std::time::Instant;

use lockstep::tokenizer::{train, Tokenizer, WordCounts};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(vocab_size)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("expected two arguments, a text file and a vocabulary size");
    };
    let text = std::fs::read_to_string(path)?;
    let lines: Vec<&str> = text.split_inclusive('\n').collect();

    let start = Instant::now();
    let mut counts = WordCounts::default();
    counts.add_lines(&lines);
    let count_s = start.elapsed().as_secs_f64();
    train(&counts, vocab_size.parse()?)?;
    let train_s = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let tokenizer = Tokenizer::gpt2()?;
    let load_s = start.elapsed().as_secs_f64();
    // The process's first call gives it memory and threads; it is not counted, here and of other programs.
    tokenizer.encode_lines(&[&text]);
    drop(tokenizer);

    // A fresh tokenizer, and a second pass of the same one.
    let tokenizer = Tokenizer::gpt2()?;
    let start = Instant::now();
    let ids = tokenizer.encode_lines(&[&text]);
    let encode_s = start.elapsed().as_secs_f64();
    let tokens: usize = ids.iter().map(<[u32]>::len).sum();
    drop(ids);
    let start = Instant::now();
    tokenizer.encode_lines(&[&text]);
    let again_s = start.elapsed().as_secs_f64();

    println!(
        "{{\"count_s\": {count_s}, \"train_s\": {train_s}, \"load_s\": {load_s}, \
         \"encode_s\": {encode_s}, \"again_s\": {again_s}, \"tokens\": {tokens}}}"
    );
    Ok(())
}
