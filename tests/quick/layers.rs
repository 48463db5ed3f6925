//! The rules of `docs/design.md` about the sources, held by reading them: who may import whom, where `unsafe` may stand,
//! and how long a file may be.

use std::fs;
use std::path::{Path, PathBuf};

/// Floors and their rooms. A room is a module with all below it, but for those that have a row of their own; it may
/// import rooms of lower floors, and itself.
const ROOMS: [(usize, &str); 24] = [
    (0, "error"),
    (0, "device"),
    (0, "random"),
    (1, "config"),
    (1, "tokenizer"),
    (1, "comm"),
    (1, "metrics"),
    (1, "data/shard"),
    (1, "model/parameters"),
    (2, "data"),
    (2, "model"),
    (2, "train/schedule"),
    (2, "train/optimizer"),
    (2, "fault"),
    (3, "checkpoint"),
    (3, "train/evaluate"),
    (3, "train/gradients"),
    (4, "train"),
    (4, "compare"),
    (4, "doctor"),
    (5, "cli"),
    (5, "commands"),
    (5, "lib"),
    (5, "main"),
];

/// The only imports within a floor: errors are everybody's, and the command line is one thing in three files.
const NEIGHBOURS: [(&str, &str); 4] = [("device", "error"), ("commands", "cli"), ("main", "cli"), ("main", "commands")];

/// Rooms of pure arithmetic, which know nothing of other ranks.
const WITHOUT_RANKS: [&str; 3] = ["model", "model/parameters", "train/optimizer"];

/// The fences of `unsafe`: foreign memory, libraries, memory maps, and SIMD.
const UNSAFE: [&str; 5] = ["comm/mpi.rs", "comm/nccl.rs", "device/", "data/shard.rs", "model/head/"];

const MAX_LINES: usize = 500;

/// All Rust files below `src`, with their paths relative to it.
fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(&path, found),
                false => found.push(path),
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    walk(&src, &mut paths);
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "rs"));
    paths.sort();
    let name = |path: &Path| path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
    paths.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// The module of a file: `data/mod.rs` is data, `data/shard.rs` data, shard.
fn module(file: &str) -> Vec<String> {
    let name = file.strip_suffix(".rs").unwrap();
    let name = name.strip_suffix("/mod").unwrap_or(name);
    name.split('/').map(str::to_owned).collect()
}

/// The row of the table that a path belongs to: the longest that it begins with.
fn room(path: &[String]) -> Option<(usize, &'static str)> {
    (1..=path.len()).rev().find_map(|n| {
        let name = path[..n].join("/");
        ROOMS.into_iter().find(|(_, room)| *room == name)
    })
}

/// A file's code in pieces: identifiers, `::`, and single characters. Comments, strings, character literals and the
/// tests at its end are left out.
fn tokens(text: &str) -> Vec<String> {
    let code: Vec<char> = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text).chars().collect();
    let is_word = |c: &char| c.is_alphanumeric() || *c == '_';
    let starts = |at: usize, what: &str| what.chars().enumerate().all(|(i, c)| code.get(at + i) == Some(&c));
    let end_of = |from: usize, what: &str| (from..code.len()).find(|&i| starts(i, what)).map(|i| i + what.len());
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < code.len() {
        let word = code[at..].iter().take_while(|c| is_word(c)).count();
        at = if starts(at, "//") {
            end_of(at, "\n").unwrap_or(code.len())
        } else if starts(at, "/*") {
            end_of(at, "*/").unwrap_or(code.len())
        } else if starts(at, "r\"") {
            end_of(at + 2, "\"").unwrap_or(code.len())
        } else if starts(at, "r#\"") {
            end_of(at, "\"#").unwrap_or(code.len())
        } else if code[at] == '"' {
            let mut end = at + 1;
            while code.get(end).is_some_and(|&c| c != '"') {
                end += if code[end] == '\\' { 2 } else { 1 };
            }
            end + 1
        } else if starts(at, "'\\") {
            end_of(at + 3, "'").unwrap_or(code.len())
        } else if code[at] == '\'' && code.get(at + 2) == Some(&'\'') {
            at + 3
        } else {
            let length = if starts(at, "::") { 2 } else { word.max(1) };
            let token: String = code[at..at + length].iter().collect();
            if !token.trim().is_empty() {
                tokens.push(token);
            }
            at + length
        };
    }
    tokens
}

/// The paths within the crate that a file of this module names, in `use` lines and elsewhere, from the crate's root.
fn paths(module: &[String], text: &str) -> Vec<Vec<String>> {
    let tokens = tokens(text);
    let at = |i: usize| tokens.get(i).map_or("", String::as_str);
    let mut found = Vec::new();
    for i in 0..tokens.len() {
        let begins = ["crate", "lockstep", "super", "self"].contains(&at(i)) && at(i + 1) == "::";
        if begins && (i == 0 || at(i - 1) != "::") {
            tree(&tokens, i, &[], &mut found);
        }
    }
    found.into_iter().map(|path| from_root(module, path)).collect()
}

/// Reads a path, or a tree of paths in braces, at `at`; returns where it ends.
fn tree(tokens: &[String], mut at: usize, prefix: &[String], found: &mut Vec<Vec<String>>) -> usize {
    let token = |i: usize| tokens.get(i).map_or("", String::as_str);
    if token(at) == "{" {
        while at < tokens.len() && token(at) != "}" {
            at = tree(tokens, at + 1, prefix, found);
            // `as NAME`
            while !["", ",", "}"].contains(&token(at)) {
                at += 1;
            }
        }
        return at + 1;
    }
    // Neither a name follows after the last comma in braces, nor after `::` in `::<T>` and `::*`.
    if !token(at).starts_with(|c: char| c.is_alphabetic() || c == '_') {
        if !prefix.is_empty() && token(at) != "}" {
            found.push(prefix.to_vec());
        }
        return at + usize::from(token(at) == "*");
    }
    let path = [prefix, &[token(at).to_owned()]].concat();
    if token(at + 1) == "::" {
        return tree(tokens, at + 2, &path, found);
    }
    found.push(path);
    at + 1
}

/// Resolves `crate`, `super` and `self` at a path's beginning, and `self` at its end.
fn from_root(module: &[String], path: Vec<String>) -> Vec<String> {
    let mut base = match path[0].as_str() {
        "crate" | "lockstep" => Vec::new(),
        _ => module.to_vec(),
    };
    for name in path {
        match name.as_str() {
            "crate" | "lockstep" | "self" => {}
            "super" => drop(base.pop()),
            _ => base.push(name),
        }
    }
    base
}

/// What a file imports against the table, as sentences.
fn violations(file: &str, text: &str) -> Vec<String> {
    let module = module(file);
    let Some((floor, home)) = room(&module) else { return vec![format!("{file} has no room in the table")] };
    let mut wrong = Vec::new();
    for path in paths(&module, text) {
        let Some((below, other)) = room(&path) else { continue };
        if WITHOUT_RANKS.contains(&home) && other == "comm" {
            wrong.push(format!("{file} ({home}) names comm"));
        } else if other != home && below >= floor && !NEIGHBOURS.contains(&(home, other)) {
            wrong.push(format!("{file} ({home}, floor {floor}) imports {other} (floor {below})"));
        }
    }
    wrong
}

#[test]
fn every_room_imports_lower_floors_only() {
    let wrong: Vec<String> = sources().iter().flat_map(|(file, text)| violations(file, text)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_row_of_the_table_is_a_room() {
    let homes: Vec<&str> = sources().iter().filter_map(|(file, _)| Some(room(&module(file))?.1)).collect();
    for (_, name) in ROOMS {
        assert!(homes.contains(&name), "{name} is in the table, and no file is in it");
    }
}

#[test]
fn unsafe_stays_within_its_fences() {
    for (file, text) in sources() {
        if !UNSAFE.iter().any(|fence| file.starts_with(fence)) {
            let tests = text.split("#[cfg(test)]").skip(1).flat_map(tokens);
            let word = tokens(&text).into_iter().chain(tests).find(|token| token.starts_with("unsafe"));
            assert_eq!(word, None, "in {file}");
        }
    }
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    let long = sources().into_iter().map(|(file, text)| (text.lines().count(), file));
    let long: Vec<(usize, String)> = long.filter(|(lines, _)| *lines > MAX_LINES).collect();
    assert!(long.is_empty(), "more than {MAX_LINES} lines: {long:?}");
}

#[test]
fn tests_stand_at_the_end_of_a_file() {
    // `tokens` leaves out all that follows.
    for (file, text) in sources() {
        let Some((_, tests)) = text.split_once("#[cfg(test)]") else { continue };
        assert!(tests.starts_with("\nmod tests {\n"), "{file}: #[cfg(test)] is for `mod tests` alone");
        assert_eq!(tests.find("\n}\n"), Some(tests.len() - 3), "{file}: code after its tests");
    }
}

#[test]
fn a_planted_violation_is_found() {
    let text = r##"
        //! Not an import: [`crate::commands::run`].
        use std::path::Path;
        use crate::{error::{Error, Result}, train::{self, evaluate::Evaluation as E, schedule::*,},};
        use super::loader::Loader;
        /* crate::comm */
        fn f<'a>(path: &'a Path) -> crate::error::Result<char> {
            let text = ("crate::main", r"crate::cli", r#"a "crate::cli""#, "\"crate::cli", '"', '\'');
            crate::checkpoint::save::<Path>(path);
            self::g();
            Ok('x')
        }
        #[cfg(test)]
mod tests {
            use crate::commands;
        }
    "##;
    let imports = |what: &str| format!("data/shard.rs (data/shard, floor 1) imports {what}");
    let expected = [
        "train (floor 4)",
        "train/evaluate (floor 3)",
        "train/schedule (floor 2)",
        "data (floor 2)",
        "checkpoint (floor 3)",
    ];
    assert_eq!(violations("data/shard.rs", text), expected.map(imports));

    assert_eq!(violations("model/gpt.rs", "use crate::comm::Comm;"), ["model/gpt.rs (model) names comm"]);
    assert_eq!(violations("train/mod.rs", "use self::evaluate::E; use crate::comm::Comm; use crate::fault;").len(), 0);
    assert_eq!(violations("cli.rs", "use crate::commands;").len(), 1);
    assert_eq!(violations("commands.rs", "use crate::cli;").len(), 0);
    assert_eq!(violations("stray.rs", "").len(), 1);
    assert!(tokens("fn f() { unsafe { g() } }").contains(&"unsafe".to_owned()));
}
