//! The documents of a split: what `eval --by-document` has a row for.
//!
//! A document is an article as WikiText has them: it begins with a line ` = Title = `, one equals sign on either side, that is
//! the first of the text or follows an empty line. It also begins after the special token that ends a text. What comes before
//! the first article is a document without a title.

use schemars::JsonSchema;
use serde::Serialize;

use super::evaluate::Sums;
use crate::data::shard::Shards;
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// A row of the file that `eval --by-document` writes.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct DocumentRow {
    /// The document's number, from 1.
    pub document: usize,
    /// The article's title; empty if the document does not begin with one.
    pub title: String,
    /// The number of its first line in the text, from 1.
    pub first_line: usize,
    /// Lines.
    pub lines: usize,
    /// Words, separated by white space.
    pub words: u64,
    /// Bytes of text.
    pub bytes: u64,
    /// Tokens predicted.
    pub tokens: u64,
    /// Mean over those tokens.
    pub loss: Option<f64>,
    /// exp(loss).
    pub ppl: Option<f64>,
    /// Total negative log-likelihood in bits, over `bytes`.
    pub bits_per_byte: Option<f64>,
    /// The share of the tokens that the model finds likeliest.
    pub accuracy: Option<f64>,
}

/// A document's place and size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its first token in the split.
    pub start: usize,
    title: String,
    first_line: usize,
    lines: usize,
    words: u64,
    bytes: u64,
}

impl Document {
    /// The row that tells what the document's targets came to.
    pub fn row(&self, number: usize, sums: &Sums) -> DocumentRow {
        let loss = sums.loss();
        DocumentRow {
            document: number,
            title: self.title.clone(),
            first_line: self.first_line,
            lines: self.lines,
            words: self.words,
            bytes: self.bytes,
            tokens: sums.tokens as u64,
            loss,
            ppl: loss.map(f64::exp),
            bits_per_byte: sums.bits_per_byte(self.bytes),
            accuracy: sums.accuracy(),
        }
    }
}

/// The documents of a split, in order; the first begins with its first token.
///
/// # Errors
/// Data, if the shard can no longer be read or its ids are not the tokenizer's.
pub fn documents(shards: &Shards, tokenizer: &Tokenizer) -> Result<Vec<Document>> {
    let mut lines = Vec::with_capacity(shards.n_lines());
    shards.for_each_line(|line| lines.push(line))?;
    let mut found: Vec<Document> = Vec::new();
    let (mut ids, mut may_begin, mut begins) = (Vec::new(), true, true);
    for (number, line) in lines.into_iter().enumerate() {
        ids.clear();
        shards.tokens(line.clone(), &mut ids)?;
        let ends = ids.iter().any(|&id| id == i64::from(tokenizer.end_of_text()));
        let text_ids: Vec<u32> = ids.iter().map(|&id| id as u32).filter(|&id| id != tokenizer.end_of_text()).collect();
        let bytes = tokenizer.decode(&text_ids)?;
        let text = String::from_utf8_lossy(&bytes);
        let title = title(&text).filter(|_| may_begin);
        if begins || title.is_some() {
            found.push(Document {
                start: line.start,
                title: title.unwrap_or_default().into(),
                first_line: number + 1,
                lines: 0,
                words: 0,
                bytes: 0,
            });
        }
        if let Some(document) = found.last_mut() {
            document.lines += 1;
            document.words += text.split_whitespace().count() as u64;
            document.bytes += bytes.len() as u64;
        }
        (may_begin, begins) = (ends || text.trim().is_empty(), ends);
    }
    Ok(found)
}

/// The title of an article that begins with this line.
fn title(line: &str) -> Option<&str> {
    let title = line.trim().strip_prefix("= ")?.strip_suffix(" =")?.trim();
    (!title.is_empty() && !title.starts_with('=') && !title.ends_with('=')).then_some(title)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::shard::{Shard, ShardWriter};

    #[test]
    fn articles_and_ended_texts_are_documents() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::gpt2().unwrap();
        let path = folder.path().join("split.bin");
        let mut writer = ShardWriter::create(&path, tokenizer.vocab_size(), tokenizer.digest()).unwrap();
        let lines = [
            " before\n",
            " \n",
            " = One , two = \n",
            " \n",
            " caf\u{e9} = 3 = \n",
            " = not one = \n",
            " \n",
            " = = Section = = \n",
            "last<|endoftext|>\n",
            "Next",
        ];
        for line in lines {
            let (text, ends) = line.split_once("<|endoftext|>").map_or((line, false), |(text, _)| (text, true));
            let mut ids = tokenizer.encode(text);
            ids.extend(ends.then_some(tokenizer.end_of_text()));
            writer.write_line(&ids, 0).unwrap();
        }
        writer.finish().unwrap();
        let found = documents(&Shard::open(&path).unwrap().into(), &tokenizer).unwrap();
        let told: Vec<_> = found.iter().map(|d| (&d.title[..], d.first_line, d.lines, d.words, d.bytes)).collect();
        let article: usize = lines[2..9].iter().map(|line| line.len()).sum();
        let article = article as u64 - "<|endoftext|>\n".len() as u64;
        assert_eq!(told, [("", 1, 2, 1, 10), ("One , two", 3, 7, 19, article), ("", 10, 1, 1, 4)]);
        assert_eq!(found[0].start, 0);
        let before: usize = lines[..2].iter().map(|line| tokenizer.encode(line).len()).sum();
        assert_eq!(found[1].start, before);
    }
}
