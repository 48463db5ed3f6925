//! The documents are true: the reference's tables are made from the program's own types, the troubleshooting page
//! quotes messages that exist, links lead somewhere, and every configuration is listed. `tests/full/documents.rs` runs
//! the commands.
//!
//! `LOCKSTEP_BLESS=1 cargo test --release --test quick documents` rewrites the reference's tables.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command, CommandFactory};
use lockstep::cli::args::Cli;
use lockstep::compare::CompareRow;
use lockstep::config::{self, Config, PRESETS};
use lockstep::error::EXIT_CODES;
use lockstep::run::tables::{EvalRow, RankRow, TrainRow};
use lockstep::train::documents::DocumentRow;
use schemars::{schema_for, Schema};

use crate::common::documents::{documents, root};

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn readme_is_short() {
    let lines = read("README.md").lines().count();
    assert!(lines <= 150, "README.md has {lines} lines; move the rest to docs/");
}

/// The reference's tables, each between its two marks, are those that the program makes.
#[test]
fn the_references_tables_are_the_programs() {
    let mut text = read("docs/reference.md");
    let now = text.clone();
    for (name, table) in generated() {
        let (begin, end) =
            (format!("<!-- {name}: made by tests/quick/documents.rs -->\n"), format!("<!-- /{name} -->"));
        let start = text.find(&begin).unwrap_or_else(|| panic!("docs/reference.md has no {begin}")) + begin.len();
        let length = text[start..].find(&end).unwrap_or_else(|| panic!("docs/reference.md has no {end}"));
        text.replace_range(start..start + length, &format!("\n{table}\n"));
    }
    if std::env::var_os("LOCKSTEP_BLESS").is_some() {
        fs::write(root().join("docs/reference.md"), &text).unwrap();
    } else if let Some((found, expected)) = now.lines().zip(text.lines()).find(|(found, expected)| found != expected) {
        panic!("docs/reference.md says\n{found}\nand the types say\n{expected}\nLOCKSTEP_BLESS=1 writes it anew");
    } else {
        assert_eq!(now, text, "LOCKSTEP_BLESS=1 writes docs/reference.md anew");
    }
}

fn generated() -> Vec<(&'static str, String)> {
    let keys = config::keys().into_iter().map(|key| {
        let may = if key.free_on_resume { "yes" } else { "" };
        [code(&key.path), code(&key.default), may.into(), key.meaning]
    });
    let presets = PRESETS
        .iter()
        .map(|(name, layers, heads, width)| [code(name), layers.to_string(), heads.to_string(), width.to_string()]);
    let codes = EXIT_CODES.iter().map(|row| [row.code.to_string(), row.meaning.into()]);
    vec![
        ("verbs", verbs(&Cli::command())),
        ("keys", table(["key", "default", "may change on resume", "meaning"], keys)),
        ("presets", table(["preset", "n_layer", "n_head", "n_embd"], presets)),
        ("train.csv", columns(&schema_for!(TrainRow))),
        ("eval.csv", columns(&schema_for!(EvalRow))),
        ("by-document", columns(&schema_for!(DocumentRow))),
        ("ranks.csv", columns(&schema_for!(RankRow))),
        ("compare.csv", columns(&schema_for!(CompareRow))),
        ("exit-codes", table(["exit code", "meaning"], codes)),
    ]
}

fn code(text: &str) -> String {
    format!("`{text}`")
}

fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut text = format!("| {} |\n|{}\n", head.join(" | "), "---|".repeat(N));
    for row in rows {
        let cells = row.map(|cell| cell.replace('|', "\\|").replace('\n', " "));
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text
}

/// The columns of a row's type, with its documentation.
fn columns(row: &Schema) -> String {
    let properties = row.as_value()["properties"].as_object().unwrap();
    let meaning = |column: &serde_json::Value| column["description"].as_str().unwrap_or_default().to_owned();
    table(["column", "meaning"], properties.iter().map(|(name, column)| [code(name), meaning(column)]))
}

/// A section for each verb, from its `--help`.
fn verbs(program: &Command) -> String {
    let mut text = options("| option of every verb | default | meaning |", program.get_arguments());
    for verb in program.get_subcommands() {
        let inner: Vec<&Command> = verb.get_subcommands().collect();
        if inner.is_empty() {
            text += &section(verb, verb.get_name());
        }
        for action in inner {
            text += &section(action, &format!("{} {}", verb.get_name(), action.get_name()));
        }
    }
    text
}

fn section(verb: &Command, name: &str) -> String {
    let about = verb.get_long_about().or(verb.get_about()).unwrap_or_else(|| panic!("{name} has no help"));
    let example = verb.get_after_help().unwrap_or_else(|| panic!("{name} has no example")).to_string();
    let example = example.lines().skip(1).map(str::trim).collect::<Vec<_>>().join("\n");
    let arguments = options("| option | default | meaning |", verb.get_arguments());
    format!("\n### {name}\n\n{about}\n\n```text\n{example}\n```\n\n{arguments}")
}

fn options<'a>(head: &str, arguments: impl Iterator<Item = &'a Arg>) -> String {
    let mut text = format!("{head}\n|---|---|---|\n");
    for argument in arguments.filter(|argument| !["help", "version"].contains(&argument.get_id().as_str())) {
        let values: Vec<String> = argument.get_possible_values().iter().map(|v| v.get_name().to_owned()).collect();
        let names = argument.get_value_names().unwrap_or_default();
        let mut value = names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        if !values.is_empty() && argument.get_action().takes_values() {
            value = values.join("|");
        }
        let long = argument.get_long().map(|long| format!("--{long}")).unwrap_or_default();
        let repeated = if matches!(argument.get_action(), ArgAction::Append) { "..." } else { "" };
        let short = argument.get_short().map(|short| format!("`-{short}`, ")).unwrap_or_default();
        let usage = match argument.get_action().takes_values() {
            true => format!("{long} {value}{repeated}").trim().to_owned(),
            false => long,
        };
        let defaults: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        let default = match (argument.is_required_set(), defaults.is_empty() || !argument.get_action().takes_values()) {
            (true, _) => "required".into(),
            (false, true) => String::new(),
            (false, false) => code(&defaults.join(",")),
        };
        let meaning = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let cells = [format!("{short}{}", code(&usage)), default, meaning].map(|cell| cell.replace('|', "\\|"));
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text
}

/// Each quoted heading of the troubleshooting page is part of a message of the program or a script.
#[test]
fn the_messages_quoted_exist() {
    let mut files: Vec<PathBuf> = Vec::new();
    for folder in ["src", "launch", "slurm"] {
        files_below(&root().join(folder), &mut files);
    }
    // Joins text that continues on the next line in Rust or shell. Users do not see comments.
    let joined = |text: String| {
        let lines = text.replace("\" \\\n", "\\\n");
        let said = lines.lines().map(str::trim_start).filter(|line| !line.starts_with("//") && !line.starts_with("# "));
        said.collect::<Vec<_>>().join("\n")
    };
    let sources: String =
        files.iter().map(|path| joined(fs::read_to_string(path).unwrap()).replace("\\\n", "")).collect();
    let page = read("docs/troubleshooting.md");
    let quotes: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`')).collect();
    assert!(quotes.len() > 40, "{} quotes", quotes.len());
    for quote in quotes {
        assert!(sources.contains(quote), "docs/troubleshooting.md quotes {quote:?}, which nothing says");
    }
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            files_below(&entry, found);
        } else if std::str::from_utf8(&fs::read(&entry).unwrap()).is_ok() {
            found.push(entry);
        }
    }
}

/// A link leads to a file that exists, and to a heading in it.
#[test]
fn links_lead_somewhere() {
    for name in documents() {
        let text = read(&name);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(link, _)| link)) {
            if link.starts_with("http") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { PathBuf::from(&name) } else { Path::new(&name).with_file_name(file) };
            assert!(root().join(&target).exists(), "{name}: there is no {link}");
            if !heading.is_empty() {
                let headings: Vec<String> =
                    read(&target).lines().filter(|line| line.starts_with('#')).map(anchor).collect();
                assert!(headings.iter().any(|found| found == heading), "{name}: {link} is none of {headings:?}");
            }
        }
    }
}

/// The anchor of a heading, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_configuration_is_listed_and_legal() {
    let guide = read("docs/guide.md");
    for entry in fs::read_dir(root().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("configs/{}", path.file_name().unwrap().to_str().unwrap());
        assert!(guide.contains(&format!("\n| `{name}` |")), "docs/guide.md does not list {name}");
        for world_size in [1, 2, 4] {
            let config = Config::load(&path, &[]).unwrap();
            assert!(config.validate(world_size).is_ok(), "{name} with {world_size} ranks");
        }
    }
}
