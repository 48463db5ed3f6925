//! How long a run is: one of `train.steps`, `train.tokens` and `train.epochs`.

use schemars::{json_schema, JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::place::{wrong, About};
use super::yaml::Value;
use super::Train;
use crate::error::Result;

/// The keys of `train:` that say it.
const LENGTHS: [&str; 3] = ["steps", "tokens", "epochs"];

impl Train {
    /// Whether the number of steps follows from another key and the data.
    pub fn follows_data(&self) -> bool {
        self.tokens.is_some() || self.epochs.is_some()
    }

    /// The same with this number of steps instead of any other length.
    pub fn of_steps(self, steps: usize) -> Self {
        Self { steps, tokens: None, epochs: None, ..self }
    }
}

/// A number of tokens; `300M` and `1.5B` are numbers, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value", into = "u64")]
pub struct Tokens(pub u64);

impl JsonSchema for Tokens {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Tokens".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": ["string", "integer"]})
    }
}

impl From<Tokens> for u64 {
    fn from(tokens: Tokens) -> Self {
        tokens.0
    }
}

impl TryFrom<serde_json::Value> for Tokens {
    type Error = String;
    fn try_from(value: serde_json::Value) -> std::result::Result<Self, String> {
        let text = match &value {
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Number(number) => number.to_string(),
            _ => "something else".into(),
        };
        let digits = text.replace('_', "");
        const UNITS: [(char, f64); 4] = [('K', 1e3), ('M', 1e6), ('B', 1e9), ('T', 1e12)];
        let with_unit = UNITS.iter().find_map(|&(letter, unit)| Some((digits.strip_suffix(letter)?, unit)));
        let (number, unit) = with_unit.unwrap_or((&digits[..], 1.0));
        // Of 1.1B the nearest whole number is meant; 2^53 is the last before which a float has all of them.
        let tokens = number.parse::<f64>().ok().map(|number| number * unit);
        let whole = tokens.filter(|tokens| (tokens - tokens.round()).abs() < 1e-3);
        let counted = whole.map(f64::round).filter(|tokens| (1.0..=9_007_199_254_740_992.0).contains(tokens));
        counted.map(|tokens| Self(tokens as u64)).ok_or_else(|| {
            format!("expected a number of tokens from 1, for example 300M, 1.5B or 300_000_000, found {text}")
        })
    }
}

/// The lengths that YAML gives.
fn given(root: &Value) -> Vec<&'static str> {
    let is_given = |name: &&str| root.get("train").and_then(|train| train.get(*name)).is_some_and(|v| !v.is_null());
    LENGTHS.into_iter().filter(is_given).collect()
}

/// Refuses YAML that gives two lengths.
pub(super) fn at_most_one(root: &Value) -> Result<()> {
    match given(root)[..] {
        [one, other, ..] => {
            let reason = format!("train.{one} is given, too, and each says how long the run is; keep one of them");
            wrong(About::Key(format!("train.{other}")), reason)
        }
        _ => Ok(()),
    }
}

/// Leaves one length at most: the one that the overrides give, if they do.
pub(super) fn settle(root: &mut Value, overrides: &Value) {
    let [replacing, told] = [given(overrides), given(root)];
    let Some(Value::Mapping(train)) = root.get_mut("train") else { return };
    for name in LENGTHS {
        if !told.contains(&name) || (!replacing.is_empty() && !replacing.contains(&name)) {
            train.remove(name);
        }
    }
}

/// Takes out the number of steps that is not known yet.
pub(super) fn leave_open(train: &Train, root: &mut Value) {
    if let Some(Value::Mapping(map)) = root.get_mut("train").filter(|_| train.follows_data()) {
        map.remove("steps");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn train(text: &str, overrides: &[&str]) -> Result<Train> {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        Config::parse(text, &overrides).map(|config| config.train)
    }

    #[test]
    fn tokens_are_written_in_many_ways() {
        for (text, expected) in [
            ("300M", 300_000_000),
            ("1.5B", 1_500_000_000),
            ("300_000_000", 300_000_000),
            ("1.1B", 1_100_000_000),
            ("2K", 2_000),
            ("1T", 1_000_000_000_000),
            ("3e8", 300_000_000),
            ("3.0e+8", 300_000_000),
            ("1", 1),
        ] {
            for found in
                [train("", &[&format!("train.tokens={text}")]), train(&format!("train: {{tokens: {text}}}"), &[])]
            {
                assert_eq!(found.unwrap().tokens, Some(Tokens(expected)), "{text}");
            }
        }
        for text in ["0", "-5", "1.5", "300m", "M", "many", "1e30", "0.1K5", "[1]", "true", "1.0001K"] {
            let error = format!("{:#}", train("", &[&format!("train.tokens={text}")]).unwrap_err());
            assert!(error.contains("train.tokens") && error.contains("for example 300M"), "{text}: {error}");
        }
    }

    #[test]
    fn one_length_at_most_and_an_override_replaces_the_files() {
        let lengths = |text, overrides: &[&str]| {
            let train = train(text, overrides).unwrap();
            (train.steps, train.tokens.map(u64::from), train.epochs)
        };
        assert_eq!(lengths("", &[]), (1000, None, None));
        assert_eq!(lengths("train: {steps: 7}", &[]), (7, None, None));
        assert_eq!(lengths("train: {steps: null, epochs: 3}", &[]), (1000, None, Some(3)));
        assert_eq!(lengths("train: {steps: 7}", &["train.tokens=5"]), (1000, Some(5), None));
        assert_eq!(lengths("train: {tokens: 5}", &["train.epochs=2"]), (1000, None, Some(2)));
        assert_eq!(lengths("train: {epochs: 2}", &["train.steps=9"]), (9, None, None));
        assert_eq!(lengths("train: {epochs: 2, loss: token_mean}", &["train={steps: 9}"]), (9, None, None));
        assert_eq!(lengths("train: {steps: 7}", &["train.steps=null"]), (1000, None, None));
        assert_eq!(lengths("train: {steps: 7}", &["train.tokens=5", "train.tokens=null"]), (7, None, None));
        for (text, overrides, names) in [
            ("train: {steps: 7, tokens: 5}", &[][..], ["train.steps", "train.tokens"]),
            ("train: {epochs: 7, tokens: 5}", &[], ["train.tokens", "train.epochs"]),
            ("train: {epochs: 7, tokens: 5}", &["train.steps=3"], ["train.tokens", "train.epochs"]),
            ("", &["train.steps=3", "train.epochs=3"], ["train.steps", "train.epochs"]),
        ] {
            let error = format!("{:#}", train(text, overrides).unwrap_err());
            assert!(names.iter().all(|name| error.contains(name)), "{error}");
        }
    }

    #[test]
    fn an_open_length_is_written_and_read_as_it_was() {
        for overrides in [vec!["train.tokens=300M".to_owned()], vec!["train.epochs=2".into()], Vec::new()] {
            let config = Config::parse("", &overrides).unwrap();
            let text = config.to_yaml().unwrap();
            assert_eq!(text.contains("  steps: 1000"), overrides.is_empty(), "{text}");
            assert_eq!(Config::parse(&text, &[]).unwrap(), config);
        }
        let open = Config::parse("", &["train.epochs=2".into()]).unwrap();
        assert_eq!((open.value("train.steps").unwrap(), open.value("train.epochs").unwrap()), ("".into(), "2".into()));
    }
}
