//! `tokenizer.json`, the format of Hugging Face `tokenizers`.
//!
//! Read without trust: a file is refused, with the place and the reason, unless it asks for what
//! this program does, which is byte-level BPE as in GPT-2 with [`END_OF_TEXT`] as the only added
//! token.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{json, Value};

use super::{byte_alphabet, Pair, Tokenizer, END_OF_TEXT};
use crate::error::{Error, Result};

/// No larger file is read. GPT-2's has 2 MB; a million tokens take about 60.
const MAX_BYTES: u64 = 256 << 20;

/// What may be at each place, as JSON; an absent key is null.
const SETTINGS: [(&str, &[&str]); 21] = [
    ("/version", &["\"1.0\""]),
    ("/truncation", &["null"]),
    ("/padding", &["null"]),
    ("/normalizer", &["null"]),
    ("/pre_tokenizer/type", &["\"ByteLevel\""]),
    ("/pre_tokenizer/add_prefix_space", &["false"]),
    ("/pre_tokenizer/use_regex", &["true", "null"]),
    ("/post_processor/type", &["\"ByteLevel\"", "\"TemplateProcessing\"", "null"]),
    // A template that adds no token: what transformers 5 writes.
    ("/post_processor/single", &["null", r#"[{"Sequence":{"id":"A","type_id":0}}]"#]),
    ("/post_processor/special_tokens", &["null", "{}"]),
    ("/decoder/type", &["\"ByteLevel\""]),
    ("/model/type", &["\"BPE\"", "null"]),
    ("/model/dropout", &["null"]),
    ("/model/unk_token", &["null"]),
    ("/model/continuing_subword_prefix", &["null", "\"\""]),
    ("/model/end_of_word_suffix", &["null", "\"\""]),
    ("/model/fuse_unk", &["false", "null"]),
    ("/model/byte_fallback", &["false", "null"]),
    ("/model/ignore_merges", &["false", "null"]),
    ("/added_tokens/0/content", &["\"<|endoftext|>\""]),
    ("/added_tokens/0/special", &["true"]),
];

/// The parts that may hold settings, and what else each may hold: what is read below, and what
/// changes no token of a text.
const PARTS: [(&str, &[&str]); 6] = [
    ("", &["added_tokens", "pre_tokenizer", "post_processor", "decoder", "model"]),
    ("/pre_tokenizer", &["trim_offsets"]),
    ("/post_processor", &["trim_offsets", "add_prefix_space", "use_regex", "pair"]),
    ("/decoder", &["trim_offsets", "add_prefix_space", "use_regex"]),
    ("/model", &["vocab", "merges"]),
    ("/added_tokens/0", &["id", "single_word", "lstrip", "rstrip", "normalized"]),
];

/// The JSON text of a tokenizer. Merges have the older form, "a b", which every version reads.
pub(super) fn write(tokenizer: &Tokenizer) -> String {
    let mut chars = [' '; 256];
    for (byte, c) in byte_alphabet() {
        chars[usize::from(byte)] = c;
    }
    let name = |id: u32| -> String {
        if id == tokenizer.end_of_text {
            return END_OF_TEXT.into();
        }
        let token = &tokenizer.tokens[id as usize];
        token.iter().map(|&byte| chars[usize::from(byte)]).collect()
    };
    let quoted = |text: String| Value::from(text).to_string();
    let vocab: Vec<String> =
        (0..tokenizer.tokens.len() as u32).map(|id| format!("{}:{id}", quoted(name(id)))).collect();
    let merges: Vec<String> =
        (tokenizer.merges.iter()).map(|&(left, right)| quoted(format!("{} {}", name(left), name(right)))).collect();
    let byte_level = r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#;
    [
        r#"{"version":"1.0","truncation":null,"padding":null,"#,
        &format!(r#""added_tokens":[{{"id":{},"content":"{END_OF_TEXT}","#, tokenizer.end_of_text),
        r#""single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"#,
        &format!(r#""normalizer":null,"pre_tokenizer":{byte_level},"#),
        &format!(r#""post_processor":null,"decoder":{byte_level},"#),
        r#""model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"#,
        r#""end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"#,
        &format!("\"vocab\":{{{}}},", vocab.join(",")),
        &format!("\"merges\":[{}]}}}}\n", merges.join(",")),
    ]
    .join("\n")
}

/// Reads a tokenizer; the errors name the place in the file, not the file.
pub(super) fn read(path: &Path) -> Result<Tokenizer> {
    parse(&read_value(path, "a tokenizer.json")?)
}

/// Reads the older pair of files, `vocab.json` and `merges.txt`, as the `tokenizer.json` that they stand for.
pub(super) fn read_pair(vocab: &Path, merges: &Path) -> Result<Tokenizer> {
    let ids = read_value(vocab, "tokens and their ids").map_err(|reason| Error::read(vocab, reason))?;
    let text = read_text(merges, "merges").map_err(|reason| Error::read(merges, reason))?;
    let text = String::from_utf8(text).map_err(|reason| Error::read(merges, reason))?;
    let lines = text.lines().enumerate().filter(|(number, line)| *number > 0 || !line.starts_with("#version"));
    let pairs: Vec<&str> = lines.map(|(_, line)| line).filter(|line| !line.is_empty()).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false});
    let file = json!({
        "version": "1.0",
        "added_tokens": [{"id": ids.get(END_OF_TEXT), "content": END_OF_TEXT, "special": true}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": pairs},
    });
    let both = format!("{} and {}, as /model of a tokenizer.json", vocab.display(), merges.display());
    parse(&file).map_err(|reason| Error::read(Path::new(&both), reason))
}

fn read_text(path: &Path, expected: &str) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(defect(format!("it has more than {MAX_BYTES} bytes; expected {expected}")));
    }
    Ok(text)
}

fn read_value(path: &Path, expected: &str) -> Result<Value> {
    serde_json::from_slice(&read_text(path, expected)?)
        .map_err(|reason| defect(format!("expected JSON, {expected}: {reason}")))
}

fn parse(file: &Value) -> Result<Tokenizer> {
    check_settings(file)?;
    let vocabulary = Vocabulary::read(file)?;
    let merges = vocabulary.read_merges(file)?;
    Tokenizer::new(vocabulary.tokens, merges, vocabulary.ids[END_OF_TEXT])
}

fn defect(message: String) -> anyhow::Error {
    Error::Data(message).into()
}

/// An error about a place in the file; place and content are shortened, both come from the file.
fn unexpected(place: &str, expected: &str, found: &Value) -> anyhow::Error {
    let short = |text: &str| match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    };
    defect(format!("{} is {}; expected {expected}", short(place), short(&found.to_string())))
}

fn at<'a>(file: &'a Value, place: &str) -> &'a Value {
    file.pointer(place).unwrap_or(&Value::Null)
}

/// Refuses a file that asks for anything but plain byte-level BPE.
fn check_settings(file: &Value) -> Result<()> {
    const REMEDY: &str =
        "(only byte-level BPE as in GPT-2 is supported: convert the tokenizer, or train one with bpe:N)";
    for (place, allowed) in SETTINGS {
        let found = at(file, place);
        if !allowed.contains(&found.to_string().as_str()) {
            return Err(unexpected(place, &format!("{} {REMEDY}", allowed.join(" or ")), found));
        }
    }
    for (part, others) in PARTS {
        let found = at(file, part);
        if found.is_null() {
            continue;
        }
        let keys = found.as_object().ok_or_else(|| unexpected(part, "an object", found))?.keys();
        for key in keys {
            let place = format!("{part}/{key}");
            let known = others.contains(&key.as_str()) || SETTINGS.iter().any(|(known, _)| *known == place);
            if !known {
                return Err(unexpected(&place, &format!("no such key {REMEDY}"), &found[key]));
            }
        }
    }
    let added = at(file, "/added_tokens");
    if added.as_array().map(Vec::len) != Some(1) {
        return Err(unexpected("/added_tokens", &format!("{END_OF_TEXT} alone {REMEDY}"), added));
    }
    Ok(())
}

struct Vocabulary<'a> {
    /// The bytes of each token, by id.
    tokens: Vec<Vec<u8>>,
    /// The id of each token's name in the file.
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a Value) -> Result<Self> {
        let vocab = at(file, "/model/vocab");
        let entries =
            vocab.as_object().ok_or_else(|| unexpected("/model/vocab", "an object of tokens and their ids", vocab))?;
        let added = at(file, "/added_tokens/0/id");
        if entries.get(END_OF_TEXT).is_some_and(|id| id != added) {
            let expected = "the id that /model/vocab gives this token";
            return Err(unexpected("/added_tokens/0/id", expected, added));
        }
        let mut names: HashMap<&str, &Value> = entries.iter().map(|(name, id)| (name.as_str(), id)).collect();
        names.insert(END_OF_TEXT, added);

        let bytes: HashMap<char, u8> = byte_alphabet().map(|(byte, c)| (c, byte)).collect();
        let mut tokens = vec![Vec::new(); names.len()];
        let mut ids = HashMap::with_capacity(names.len());
        for (name, id) in names {
            let refuse = |expected| unexpected(&format!("/model/vocab/{name}"), expected, id);
            let number = id.as_u64().and_then(|number| u32::try_from(number).ok());
            let free = number.and_then(|number| tokens.get_mut(number as usize)).filter(|token| token.is_empty());
            let (Some(number), Some(token)) = (number, free) else {
                return Err(refuse("each id from 0 to the number of tokens once"));
            };
            *token = if name == END_OF_TEXT {
                END_OF_TEXT.into()
            } else {
                let named: Option<_> = name.chars().map(|c| bytes.get(&c).copied()).collect();
                named.unwrap_or_default()
            };
            if token.is_empty() {
                return Err(refuse("a name of characters that stand for bytes, as in GPT-2"));
            }
            ids.insert(name, number);
        }
        Ok(Self { tokens, ids })
    }

    fn read_merges(&self, file: &Value) -> Result<Vec<Pair>> {
        let merges = at(file, "/model/merges");
        let list = merges.as_array().ok_or_else(|| unexpected("/model/merges", "a list of pairs of tokens", merges))?;
        let read = |(rank, merge)| {
            self.pair(merge).ok_or_else(|| {
                let expected = "two tokens of /model/vocab, as \"a b\" or [\"a\", \"b\"]";
                unexpected(&format!("/model/merges/{rank}"), expected, merge)
            })
        };
        list.iter().enumerate().map(read).collect()
    }

    fn pair(&self, merge: &Value) -> Option<Pair> {
        let (left, right) = match merge {
            Value::String(text) => text.split_once(' ')?,
            Value::Array(parts) if parts.len() == 2 => (parts[0].as_str()?, parts[1].as_str()?),
            _ => return None,
        };
        Some((*self.ids.get(left)?, *self.ids.get(right)?))
    }
}
