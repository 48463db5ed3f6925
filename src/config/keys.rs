//! What is known of each key: its meaning, its default, and whether it may change when a run resumes. All of it is read
//! from the types in this folder: their documentation, their `Default`, and the mark `x-free-on-resume`.

use schemars::schema_for;
use serde_json::Value;

use super::Config;

/// The longest line of a meaning in a template.
const COMMENT_WIDTH: usize = 96;

/// A key of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// As `--set` takes it, for example `optim.lr`.
    pub path: String,
    /// The default, as YAML.
    pub default: String,
    /// Whether a run may resume with another value without being asked.
    pub free_on_resume: bool,
    /// What it does, and what its values mean.
    pub meaning: String,
}

/// All keys, in the order of the types.
pub fn keys() -> Vec<Key> {
    let schema = schema_for!(Config).to_value();
    let mut found = Vec::new();
    collect(&schema, &schema, "", false, &mut found);
    found
}

/// The keys of a section, and of those within it.
fn collect(schema: &Value, section: &Value, prefix: &str, section_is_free: bool, found: &mut Vec<Key>) {
    for (name, key) in section["properties"].as_object().into_iter().flatten() {
        let path = format!("{prefix}{name}");
        let free_on_resume = section_is_free || key["x-free-on-resume"] == true;
        let kind = key["$ref"].as_str().and_then(|place| schema.pointer(place.trim_start_matches('#'))).unwrap_or(key);
        if kind["properties"].is_object() {
            collect(schema, kind, &format!("{path}."), free_on_resume, found);
            continue;
        }
        let mut meaning = text(key);
        for word in kind["oneOf"].as_array().into_iter().flatten() {
            meaning += &format!(" `{}`: {}", word["const"].as_str().unwrap_or_default(), text(word));
        }
        let default = match &key["default"] {
            Value::String(word) => word.clone(),
            other => other.to_string().replace(',', ", "),
        };
        found.push(Key { path, default, free_on_resume, meaning });
    }
}

/// A configuration file with every key, each with its meaning and its default.
pub fn template() -> String {
    let mut file = String::from(
        "# Every key of a configuration with its default.\n# Keep those that you change, and give the model a size.\n",
    );
    let schema = schema_for!(Config).to_value();
    let mut open = String::new();
    for key in keys() {
        let (section, name) = key.path.rsplit_once('.').unwrap_or(("", &key.path));
        let indent = if section.is_empty() { "" } else { "  " };
        file += "\n";
        if section != open {
            open = section.into();
            file += &format!("# {}\n{section}:\n", text(&schema["properties"][section]));
        }
        for line in textwrap::wrap(&key.meaning, COMMENT_WIDTH) {
            file += &format!("{indent}# {line}\n");
        }
        file += &format!("{indent}{name}: {}\n", key.default);
    }
    file
}

/// The documentation of a type, a field or a word, in one line.
fn text(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(key: &Key, value: &str) -> Option<Config> {
        Config::parse("", &[format!("{}={value}", key.path)]).ok()
    }

    #[test]
    fn every_key_has_a_meaning_and_the_default_of_the_types() {
        for key in keys() {
            assert_eq!(with(&key, &key.default), Some(Config::default()), "{key:?}");
            assert!(key.meaning.ends_with('.'), "{key:?}");
        }
    }

    #[test]
    fn the_template_has_every_key_and_says_what_the_defaults_say() {
        let template = template();
        assert_eq!(Config::parse(&template, &[]).unwrap(), Config::default());
        for key in keys() {
            let name = key.path.rsplit('.').next().unwrap();
            assert!(template.contains(&format!("{name}: {}\n", key.default)), "{}", key.path);
        }
        assert!(template.lines().all(|line| line.len() <= COMMENT_WIDTH + 4));
    }

    /// The contract with runs that exist.
    #[test]
    fn the_keys_that_may_change_are_these() {
        let free: Vec<String> = keys().into_iter().filter(|key| key.free_on_resume).map(|key| key.path).collect();
        let expected = [
            "name",
            "threads",
            "comm.overlap",
            "comm.bucket_mib",
            "comm.grad_dtype",
            "train.steps",
            "train.tokens",
            "train.epochs",
            "train.log_every",
            "train.eval_every",
            "train.save_every",
            "train.keep_last",
            "train.sample_every",
            "train.prompts",
            "train.tensorboard",
            "fault.startup_deadline_s",
            "fault.step_deadline_s",
            "fault.save_deadline_s",
            "fault.nonfinite",
            "fault.max_restarts_without_progress",
        ];
        assert_eq!(free, expected);
    }

    #[test]
    fn every_key_that_changes_is_named_unless_it_may() {
        let words = "7 0.5 true false cpu bf16 paragraphs post relu cosine sequence_mean skip word [0.5,0.5] [word]";
        for key in keys() {
            let mut values = words.split(' ').filter_map(|word| with(&key, word));
            let changed = values.find(|config| *config != Config::default()).unwrap_or_else(|| panic!("{key:?}"));
            let named = changed.changes_since(&Config::default()).unwrap();
            let named: Vec<&str> = named.iter().map(|(path, ..)| path.as_str()).collect();
            let expected: &[&str] = if key.free_on_resume { &[] } else { &[key.path.as_str()] };
            assert_eq!(named, expected);
        }
    }
}
