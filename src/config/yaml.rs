//! YAML in and out: overrides, unknown keys, and what a resumed run may change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

pub(super) use serde_yaml::{Mapping, Value};

use super::length;
use super::names::meant;
use super::place::{in_place, set_of, wrong, About};
use super::{keys, usage, Config, Key, Model, Train};
use crate::error::{Error, Result};

/// No longer configuration is read.
const MAX_BYTES: usize = 64 << 10;

impl Config {
    /// Reads a YAML file and applies `key=value` overrides to it.
    ///
    /// # Errors
    /// Usage: a file that cannot be read or is not YAML, a key that does not exist, a value of the wrong type.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(MAX_BYTES as u64 + 1).read_to_string(&mut text))
            .map_err(|e| Error::Usage(format!("cannot read the configuration {}: {e}", path.display())))?;
        Self::parse(&text, overrides).map_err(|e| in_place(e, path, overrides))
    }

    /// Parses YAML text and applies `key=value` overrides to it; errors as [`Config::load`].
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        let mut root =
            read_value(text).map_err(|reason| Error::Usage(format!("this is not a YAML configuration: {reason}")))?;
        if root.is_null() {
            root = Value::Mapping(Mapping::new());
        }
        let known = serde_yaml::to_value(Self::with_every_key())?;
        length::at_most_one(&root)?;
        let mut overriding = Value::Null;
        for item in overrides {
            let (key, value) = read_override(item)?;
            set(&mut root, key, value.clone()).or_else(|e| wrong(About::Set(item.clone()), e.to_string()))?;
            // What the file has in this place may stand in the way there, and has been refused then.
            set(&mut overriding, key, value)?;
        }
        length::at_most_one(&overriding)?;
        length::settle(&mut root, &overriding);
        let paths: Vec<String> = leaves(&known, "").into_iter().map(|(path, _)| path).collect();
        check_keys(&root, &known, "", &paths)?;
        // A float that YAML writes like a whole number (lr: 1) or without a dot (3e-4, which YAML 1.1 reads as text).
        coerce_numbers(&mut root, &known);
        serde_path(&root, overrides)
    }

    /// Refuses names that are no keys of a configuration, written as `optim.lr`.
    ///
    /// # Errors
    /// Usage, with the nearest key.
    pub fn check_names(names: &[String]) -> Result<()> {
        let known = serde_yaml::to_value(Self::with_every_key())?;
        let paths: Vec<String> = leaves(&known, "").into_iter().map(|(path, _)| path).collect();
        for name in names {
            let mut wanted = Value::Mapping(Mapping::new());
            set(&mut wanted, name, Value::Null)?;
            if paths.iter().any(|path| path.starts_with(&format!("{name}."))) {
                return usage(format!("`{name}` is a section; name one of its keys"));
            }
            if !paths.contains(name) {
                check_keys(&wanted, &known, "", &paths)?;
                return usage(format!("unknown key `{name}`: what comes before the last dot has no keys of its own"));
            }
        }
        Ok(())
    }

    fn with_every_key() -> Self {
        let model = Model {
            preset: Some("gpt-nano".into()),
            n_layer: Some(1),
            n_head: Some(1),
            n_embd: Some(1),
            ..Model::default()
        };
        let train = Train { init_from: Some("runs".into()), ..Train::default() };
        Self { model, train, ..Self::default() }
    }

    /// The keys, with both values, in which `self` differs from `older` and which would change what is learnt.
    pub fn changes_since(&self, older: &Self) -> Result<Vec<(String, String, String)>> {
        let changes = self.differences(older)?.into_iter();
        let asked: Vec<Key> = keys().into_iter().filter(|key| !key.free_on_resume).collect();
        Ok(changes.filter(|(changed, ..)| asked.iter().any(|key| key.path == *changed)).collect())
    }

    /// (key, value there, value here) for every key that differs from another configuration's.
    ///
    /// # Errors
    /// None in practice: a configuration is always valid YAML.
    pub fn differences(&self, other: &Self) -> Result<Vec<(String, String, String)>> {
        let (new, old) = (flatten(self)?, flatten(other)?);
        let keys: BTreeSet<&String> = new.keys().chain(old.keys()).collect();
        let text = |value: Option<&Value>| {
            let yaml = value.map(|value| serde_yaml::to_string(value).unwrap_or_default());
            yaml.map_or_else(|| "absent".into(), |yaml| yaml.trim().replace('\n', " "))
        };
        Ok(keys
            .into_iter()
            .filter(|key| new.get(*key) != old.get(*key))
            .map(|key| (key.clone(), text(old.get(key)), text(new.get(key))))
            .collect())
    }

    /// The value of one key, such as `data.batch_size`, in a line: text as it is, nothing for a key that is not set.
    ///
    /// # Errors
    /// Usage: a key that does not exist, with the nearest one.
    pub fn value(&self, key: &str) -> Result<String> {
        Self::check_names(&[key.into()])?;
        Ok(match flatten(self)?.remove(key) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text,
            Some(value) => serde_json::to_string(&value)?,
        })
    }

    /// The resolved configuration as YAML, for `config.yaml`.
    pub fn to_yaml(&self) -> Result<String> {
        Ok(serde_yaml::to_string(&self.as_value()?)?)
    }

    fn as_value(&self) -> Result<Value> {
        let mut root = serde_yaml::to_value(self)?;
        length::leave_open(&self.train, &mut root);
        Ok(root)
    }
}

/// Parses YAML, but for aliases: a few lines of them can stand for more than any memory holds.
fn read_value(text: &str) -> std::result::Result<Value, String> {
    if text.len() > MAX_BYTES {
        return Err(format!("it has more than {MAX_BYTES} bytes"));
    }
    // Some editors begin a file with it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let marked = |mark: char| {
        let names = text.split(|c: char| c.is_whitespace() || "[]{},:?\"'".contains(c));
        let names = names.filter_map(move |word| word.strip_prefix(mark));
        let end = |c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c);
        names.filter_map(move |name| name.split(end).next()).filter(|name| !name.is_empty()).collect::<BTreeSet<_>>()
    };
    if let Some(name) = marked('*').intersection(&marked('&')).next() {
        return Err(format!("`*{name}` repeats what `&{name}` marks; write it out instead"));
    }
    serde_yaml::from_str(text).map_err(|e| match e.to_string() {
        tab if tab.contains("cannot start any token")
            && text.lines().any(|line| line.trim_start_matches(' ').starts_with('\t')) =>
        {
            format!("{tab}: indent with spaces, not with tabs")
        }
        other => other,
    })
}

/// The key and the value of a `--set`.
fn read_override(item: &str) -> Result<(&str, Value)> {
    let refused = |reason: String| wrong(About::Set(item.into()), reason);
    match item.split_once('=') {
        None => refused("expected key=value, for example optim.lr=3e-4".into()),
        Some((_, value)) if value.trim().is_empty() => refused("the value is missing".into()),
        Some((key, value)) => match read_value(value) {
            Ok(value) => Ok((key, value)),
            Err(reason) => refused(format!("the value is not YAML: {reason}")),
        },
    }
}

fn set(root: &mut Value, path: &str, value: Value) -> Result<()> {
    let mut place = root;
    for key in path.split('.') {
        if place.is_null() {
            *place = Value::Mapping(Mapping::new());
        }
        let Value::Mapping(map) = place else {
            return usage(format!("`{key}` is inside something that has no keys"));
        };
        place = map.entry(key.into()).or_insert(Value::Null);
    }
    *place = value;
    Ok(())
}

/// Refuses keys that `known` does not have, naming the one of `paths` that may be meant.
fn check_keys(value: &Value, known: &Value, prefix: &str, paths: &[String]) -> Result<()> {
    let Value::Mapping(known) = known else { return Ok(()) };
    let Value::Mapping(map) = value else {
        let reason = format!("expected keys and values, found {}", kind_of(value));
        return match prefix.strip_suffix('.') {
            Some(section) => wrong(About::Key(section.into()), reason),
            None => usage(reason),
        };
    };
    let names: Vec<&str> = known.keys().filter_map(Value::as_str).collect();
    for (key, inner) in map {
        let name = key.as_str().unwrap_or_default();
        let Some(expected) = known.get(name) else {
            let hint = meant(name, prefix, &names, paths).map(|path| format!("did you mean `{path}`? "));
            let reason = format!("{}keys here: {}", hint.unwrap_or_default(), names.join(", "));
            return wrong(About::UnknownKey(format!("{prefix}{name}")), reason);
        };
        if expected.is_mapping() {
            check_keys(inner, expected, &format!("{prefix}{name}."), paths)?;
        }
    }
    Ok(())
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Sequence(_) => "a list",
        Value::Mapping(_) => "keys and values",
        Value::Tagged(_) => "a tagged value",
    }
}

/// Turns text such as `3e-4` into the number that the key needs.
fn coerce_numbers(value: &mut Value, known: &Value) {
    match (value, known) {
        (Value::Mapping(map), Value::Mapping(known)) => {
            for (key, inner) in map.iter_mut() {
                if let Some(expected) = known.get(key) {
                    coerce_numbers(inner, expected);
                }
            }
        }
        (Value::Sequence(items), Value::Sequence(known)) => {
            for (item, expected) in items.iter_mut().zip(known) {
                coerce_numbers(item, expected);
            }
        }
        // Of whole numbers none is written so that YAML takes it for text, but 010, which some read as 8.
        (value @ Value::String(_), Value::Number(known)) if known.is_f64() => {
            if let Some(number) = value.as_str().and_then(|text| text.parse::<f64>().ok()) {
                *value = number.into();
            }
        }
        _ => {}
    }
}

/// Deserializes, and names the key that an error is about.
fn serde_path(root: &Value, overrides: &[String]) -> Result<Config> {
    serde_path_to_error::deserialize(root).or_else(|error| {
        let path = error.path().to_string();
        let key = path.split('[').next().unwrap_or_default();
        let reason = error.inner().to_string();
        let kinds = ["invalid type: ", "invalid value: "];
        let expected = kinds.iter().find_map(|kind| reason.strip_prefix(kind)?.rsplit_once(", expected "));
        let (Some((_, expected)), Some(found)) = (expected, at(root, &path)) else {
            return wrong(About::Key(key.into()), reason);
        };
        let expected = in_words(expected);
        let write = spelling(expected, found).map(|right| match set_of(key, overrides) {
            Some(_) => format!("; write --set '{key}={right}'"),
            None => format!("; write {}: {right}", key.rsplit('.').next().unwrap_or_default()),
        });
        let found = match found {
            Value::Bool(_) | Value::Number(_) => {
                format!("`{}`", serde_yaml::to_string(found).unwrap_or_default().trim())
            }
            Value::String(text) => format!("{text:?}"),
            other => kind_of(other).into(),
        };
        wrong(About::Key(key.into()), format!("expected {expected}, found {found}{}", write.unwrap_or_default()))
    })
}

/// The value at a path such as `optim.betas[1]`.
fn at<'a>(root: &'a Value, path: &str) -> Option<&'a Value> {
    let mut parts = path.split(['.', '[', ']']).filter(|part| !part.is_empty());
    parts.try_fold(root, |value, part| value.get(part).or_else(|| value.get(part.parse::<usize>().ok()?)))
}

const TEXT: &str = "text";
const WHOLE: &str = "a whole number from 0";
const NUMBER: &str = "a number";
const BOOLEAN: &str = "true or false";
const LIST: &str = "a list";

/// Rust's names of types, as words.
fn in_words(expected: &str) -> &str {
    match expected {
        "a string" | "path string" => TEXT,
        "usize" | "u64" => WHOLE,
        "u32" => "a whole number from 0 to 4294967295",
        "f64" => NUMBER,
        "a boolean" => BOOLEAN,
        "a sequence" => LIST,
        "a Value::Tagged enum" => "a word",
        other => other,
    }
}

/// How a value of another type is written as what was expected, if it is clear what was meant.
fn spelling(expected: &str, found: &Value) -> Option<String> {
    let text = match found {
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => serde_yaml::to_string(found).ok()?.trim().into(),
        _ => return None,
    };
    let digits: String = text.chars().filter(|c| !"_, ".contains(*c)).collect();
    match expected {
        TEXT => Some(format!("\"{text}\"")),
        LIST => Some(format!("[{text:?}]")),
        WHOLE => {
            let number = digits.parse::<f64>().ok().filter(|n| n.fract() == 0.0 && (0.0..9e15).contains(n))?;
            Some(format!("{number}"))
        }
        NUMBER => digits.parse::<f64>().is_ok_and(f64::is_finite).then_some(digits),
        BOOLEAN => match text.to_lowercase().as_str() {
            "yes" | "on" | "y" | "1" => Some("true".into()),
            "no" | "off" | "n" | "0" => Some("false".into()),
            _ => None,
        },
        _ => None,
    }
}

/// (path, value) of everything that holds no keys itself.
fn leaves(value: &Value, prefix: &str) -> Vec<(String, Value)> {
    match value {
        Value::Mapping(map) => map
            .iter()
            .flat_map(|(key, inner)| {
                let name = key.as_str().unwrap_or_default();
                let path = if prefix.is_empty() { name.into() } else { format!("{prefix}.{name}") };
                leaves(inner, &path)
            })
            .collect(),
        _ => vec![(prefix.to_string(), value.clone())],
    }
}

fn flatten(config: &Config) -> Result<BTreeMap<String, Value>> {
    Ok(leaves(&config.as_value()?, "").into_iter().collect())
}
