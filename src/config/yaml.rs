//! YAML in and out: overrides, unknown keys, and what a resumed run may change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_yaml::{Mapping, Value};

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
        Self::parse(&text, overrides).map_err(|e| e.context(format!("in {}", path.display())))
    }

    /// Parses YAML text and applies `key=value` overrides to it; errors as [`Config::load`].
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        let mut root =
            read_value(text).map_err(|reason| Error::Usage(format!("this is not a YAML configuration: {reason}")))?;
        if root.is_null() {
            root = Value::Mapping(Mapping::new());
        }
        let known = serde_yaml::to_value(Self::with_every_key())?;
        for item in overrides {
            let (key, value) = item
                .split_once('=')
                .ok_or_else(|| Error::Usage(format!("--set {item}: expected key=value, for example optim.lr=3e-4")))?;
            let value =
                read_value(value).map_err(|e| Error::Usage(format!("--set {item}: the value is not YAML: {e}")))?;
            set(&mut root, key, value)?;
        }
        let paths: Vec<String> = leaves(&known, "").into_iter().map(|(path, _)| path).collect();
        check_keys(&root, &known, "", &paths)?;
        // A float that YAML writes like a whole number (lr: 1) or without a dot (3e-4, which YAML 1.1 reads as text).
        coerce_numbers(&mut root, &known);
        serde_path(&root)
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
        Ok(serde_yaml::to_string(self)?)
    }
}

/// Parses YAML, but for aliases: a few lines of them can stand for more than any memory holds.
fn read_value(text: &str) -> std::result::Result<Value, String> {
    if text.len() > MAX_BYTES {
        return Err(format!("it has more than {MAX_BYTES} bytes"));
    }
    let marked = |mark: char| {
        let names = text.split(|c: char| c.is_whitespace() || "[]{},:?\"'".contains(c));
        let names = names.filter_map(move |word| word.strip_prefix(mark));
        let end = |c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c);
        names.filter_map(move |name| name.split(end).next()).filter(|name| !name.is_empty()).collect::<BTreeSet<_>>()
    };
    if let Some(name) = marked('*').intersection(&marked('&')).next() {
        return Err(format!("`*{name}` stands for what `&{name}` marks; write it out where it is meant"));
    }
    serde_yaml::from_str(text).map_err(|e| e.to_string())
}

fn set(root: &mut Value, path: &str, value: Value) -> Result<()> {
    let mut place = root;
    for key in path.split('.') {
        if place.is_null() {
            *place = Value::Mapping(Mapping::new());
        }
        let Value::Mapping(map) = place else {
            return usage(format!("--set {path}: `{key}` is inside something that has no keys"));
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
        return usage(format!("{}: expected keys and values, found {}", place(prefix), kind_of(value)));
    };
    let names: Vec<&str> = known.keys().filter_map(Value::as_str).collect();
    for (key, inner) in map {
        let name = key.as_str().unwrap_or_default();
        let Some(expected) = known.get(name) else {
            // The same word in another section, else the most alike of this one.
            let elsewhere = paths.iter().find(|path| path.rsplit('.').next() == Some(name)).cloned();
            let alike = |word: &str| strsim::normalized_damerau_levenshtein(word, name);
            let here = names.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
            let nearest = elsewhere.or_else(|| here.map(|word| format!("{prefix}{word}")));
            let hint = nearest.map_or(String::new(), |path| format!("; did you mean `{path}`?"));
            return usage(format!("unknown key `{prefix}{name}`{hint} (keys here: {})", names.join(", ")));
        };
        if expected.is_mapping() {
            check_keys(inner, expected, &format!("{prefix}{name}."), paths)?;
        }
    }
    Ok(())
}

fn place(prefix: &str) -> &str {
    if prefix.is_empty() {
        "the file"
    } else {
        prefix.trim_end_matches('.')
    }
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

/// Turns text such as `3e-4` into the number that the key wants.
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
        (value @ Value::String(_), Value::Number(_)) => {
            if let Some(number) = value.as_str().and_then(|text| text.parse::<f64>().ok()) {
                *value = number.into();
            }
        }
        _ => {}
    }
}

/// Deserializes, and names the key that an error is about.
fn serde_path(root: &Value) -> Result<Config> {
    serde_path_to_error::deserialize(root).map_err(|error| {
        let (key, reason) = (error.path().to_string(), in_words(&error.inner().to_string()));
        Error::Usage(if key == "." { reason } else { format!("{key}: {reason}") }).into()
    })
}

/// Rust's names of types, as words.
fn in_words(error: &str) -> String {
    let names = [("usize", "a whole number from 0"), ("u64", "a whole number from 0"), ("f64", "a number")];
    names.iter().fold(error.to_string(), |text, (name, words)| {
        text.replace(&format!("expected {name}"), &format!("expected {words}"))
    })
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
    Ok(leaves(&serde_yaml::to_value(config)?, "").into_iter().collect())
}
