//! `tokenizer.json`, the format of Hugging Face `tokenizers`.
//!
//! Read without trust: a file is refused, with the place and the reason, unless it asks for what
//! this program does, which is byte-level BPE as in GPT-2 with [`END_OF_TEXT`] as the only added
//! token.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustc_hash::FxHashMap;
use serde_json_borrow::Value;

use super::{byte_alphabet, Pair, Tokenizer, Tokens, END_OF_TEXT};
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
    // Two of the characters that stand for bytes are escaped.
    let mut names = [const { String::new() }; 256];
    for (byte, c) in byte_alphabet() {
        names[usize::from(byte)] = if matches!(c, '"' | '\\') { format!("\\{c}") } else { c.into() };
    }
    let mut text = String::with_capacity(64 * tokenizer.tokens.len());
    let push_name = |text: &mut String, id: u32| match id == tokenizer.end_of_text {
        true => text.push_str(END_OF_TEXT),
        false => tokenizer.tokens[id].iter().for_each(|&byte| text.push_str(&names[usize::from(byte)])),
    };
    let byte_level = r#"{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}"#;
    text += "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\n";
    text += &format!("\"added_tokens\":[{{\"id\":{},\"content\":\"{END_OF_TEXT}\",\n", tokenizer.end_of_text);
    text += "\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":true}],\n";
    text += &format!("\"normalizer\":null,\"pre_tokenizer\":{byte_level},\n");
    text += &format!("\"post_processor\":null,\"decoder\":{byte_level},\n");
    text += "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":null,\n";
    text += "\"end_of_word_suffix\":null,\"fuse_unk\":false,\"byte_fallback\":false,\"ignore_merges\":false,\n";
    text += "\"vocab\":{";
    for id in 0..tokenizer.tokens.len() as u32 {
        text += if id == 0 { "\"" } else { ",\"" };
        push_name(&mut text, id);
        text += "\":";
        text += &id.to_string();
    }
    text += "},\n\"merges\":[";
    for (rank, &(left, right)) in tokenizer.merges.iter().enumerate() {
        text += if rank == 0 { "\"" } else { ",\"" };
        push_name(&mut text, left);
        text.push(' ');
        push_name(&mut text, right);
        text.push('"');
    }
    text += "]}}\n";
    text
}

/// Reads a tokenizer; the errors name the place in the file, not the file.
pub(super) fn read(path: &Path) -> Result<Tokenizer> {
    let expected = "a tokenizer.json";
    parse(&read_value(&read_text(path, expected)?, expected)?)
}

/// Reads the older pair of files, `vocab.json` and `merges.txt`, as the `tokenizer.json` that they stand for.
pub(super) fn read_pair(vocab: &Path, merges: &Path) -> Result<Tokenizer> {
    let expected = "tokens and their ids";
    let ids = read_text(vocab, expected).map_err(|reason| Error::read(vocab, reason))?;
    let ids = read_value(&ids, expected).map_err(|reason| Error::read(vocab, reason))?;
    let text = read_text(merges, "merges").map_err(|reason| Error::read(merges, reason))?;
    let text = String::from_utf8(text).map_err(|reason| Error::read(merges, reason))?;
    let lines = text.lines().enumerate().filter(|(number, line)| *number > 0 || !line.starts_with("#version"));
    let pairs: Vec<&str> = lines.map(|(_, line)| line).filter(|line| !line.is_empty()).collect();
    let byte_level = object(vec![("type", "ByteLevel".into()), ("add_prefix_space", false.into())]);
    let added = object(vec![
        ("id", at(&ids, "/<|endoftext|>").clone()),
        ("content", END_OF_TEXT.into()),
        ("special", true.into()),
    ]);
    let file = object(vec![
        ("version", "1.0".into()),
        ("added_tokens", Value::Array(vec![added])),
        ("pre_tokenizer", byte_level.clone()),
        ("decoder", byte_level),
        ("model", object(vec![("type", "BPE".into()), ("vocab", ids), ("merges", pairs.into())])),
    ]);
    let both = format!("{} and {}, as /model of a tokenizer.json", vocab.display(), merges.display());
    parse(&file).map_err(|reason| Error::read(Path::new(&both), reason))
}

fn object<'a>(entries: Vec<(&'a str, Value<'a>)>) -> Value<'a> {
    Value::Object(entries.into())
}

fn read_text(path: &Path, expected: &str) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(defect(format!("it has more than {MAX_BYTES} bytes; expected {expected}")));
    }
    Ok(text)
}

fn read_value<'a>(text: &'a [u8], expected: &str) -> Result<Value<'a>> {
    serde_json::from_slice(text).map_err(|reason| defect(format!("expected JSON, {expected}: {reason}")))
}

fn parse(file: &Value) -> Result<Tokenizer> {
    check_settings(file)?;
    let vocabulary = Vocabulary::read(file)?;
    let merges = vocabulary.read_merges(file)?;
    let end_of_text = vocabulary.ids[END_OF_TEXT];
    Tokenizer::new(vocabulary.tokens, merges, end_of_text)
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

/// What is at a place, such as "/added_tokens/0/id"; null if nothing is. Of equal keys, the last counts.
fn at<'a, 'b>(file: &'a Value<'b>, place: &str) -> &'a Value<'b> {
    place.split('/').skip(1).fold(file, |part, key| {
        let found = match part {
            Value::Object(entries) => entries.iter().filter(|(name, _)| *name == key).map(|(_, value)| value).last(),
            Value::Array(items) => key.parse().ok().and_then(|index: usize| items.get(index)),
            _ => None,
        };
        found.unwrap_or(&Value::Null)
    })
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
        let entries = found.as_object().ok_or_else(|| unexpected(part, "an object", found))?;
        for (key, value) in entries.iter() {
            let place = format!("{part}/{key}");
            let known = others.contains(&key) || SETTINGS.iter().any(|(known, _)| *known == place);
            if !known {
                return Err(unexpected(&place, &format!("no such key {REMEDY}"), value));
            }
        }
    }
    let added = at(file, "/added_tokens");
    if added.as_array().map(<[_]>::len) != Some(1) {
        return Err(unexpected("/added_tokens", &format!("{END_OF_TEXT} alone {REMEDY}"), added));
    }
    Ok(())
}

struct Vocabulary<'a> {
    tokens: Tokens,
    /// The id of each token's name in the file.
    ids: FxHashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a Value) -> Result<Self> {
        let vocab = at(file, "/model/vocab");
        let entries =
            vocab.as_object().ok_or_else(|| unexpected("/model/vocab", "an object of tokens and their ids", vocab))?;
        let added = at(file, "/added_tokens/0/id");
        if entries.iter().any(|(name, id)| name == END_OF_TEXT && id != added) {
            let expected = "the id that /model/vocab gives this token";
            return Err(unexpected("/added_tokens/0/id", expected, added));
        }
        let refuse = |name: &str, id: &Value, expected| unexpected(&format!("/model/vocab/{name}"), expected, id);
        let once = "each id from 0 to the number of tokens once";
        let mut ids = FxHashMap::default();
        ids.reserve(entries.len() + 1);
        for (name, id) in entries.iter().chain([(END_OF_TEXT, added)]) {
            let number = id.as_u64().and_then(|number| u32::try_from(number).ok());
            ids.insert(name, number.ok_or_else(|| refuse(name, id, once))?);
        }
        let mut names = vec![None; ids.len()];
        for (&name, &id) in &ids {
            match names.get_mut(id as usize) {
                Some(free @ None) => *free = Some(name),
                _ => return Err(refuse(name, &u64::from(id).into(), once)),
            }
        }

        let mut bytes = [None; 0x200];
        for (byte, c) in byte_alphabet() {
            bytes[c as usize] = Some(byte);
        }
        let mut tokens = Tokens::default();
        let mut token = Vec::new();
        for (id, name) in (0_u64..).zip(names.into_iter().flatten()) {
            token.clear();
            match name {
                END_OF_TEXT => token.extend_from_slice(name.as_bytes()),
                _ => token.extend(name.chars().map_while(|c| bytes.get(c as usize).copied().flatten())),
            }
            if token.is_empty() || name != END_OF_TEXT && token.len() < name.chars().count() {
                return Err(refuse(name, &id.into(), "a name of characters that stand for bytes, as in GPT-2"));
            }
            tokens.push(&token);
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
            Value::Str(text) => text.split_once(' ')?,
            Value::Array(parts) if parts.len() == 2 => (parts[0].as_str()?, parts[1].as_str()?),
            _ => return None,
        };
        Some((*self.ids.get(left)?, *self.ids.get(right)?))
    }
}
