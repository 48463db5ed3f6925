//! Checks the rules of `docs/design.md` by reading the sources: which room imports which, where `unsafe` may be, and
//! how long a file may be.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::UseTree;

/// The rooms of each floor: folders of `src`, and files beside them. A room imports lower floors, and itself.
const FLOORS: [&[&str]; 6] = [
    &["error", "files", "host", "patience", "random", "stop"],
    &["torch", "launcher", "config", "tokenizer"],
    &["comm", "data", "model", "optim", "watch"],
    &["run"],
    &["train", "compare", "doctor", "interop", "view"],
    &["cli", "main", "lib"],
];

/// The only imports within a floor: errors are for every room, the optimizer updates the model's flat memory, and
/// `main` starts the command line.
const NEIGHBOURS: [(&str, &str); 6] =
    [("files", "error"), ("host", "error"), ("host", "files"), ("stop", "error"), ("optim", "model"), ("main", "cli")];

/// The fences of `unsafe`: foreign memory, libraries, and SIMD.
const UNSAFE: [&str; 4] = ["comm/mpi.rs", "comm/nccl.rs", "torch/", "model/head/"];

const MAX_LINES: usize = 500;

/// All Rust files below `src`: their paths relative to it, and their text.
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

/// The room of a file.
fn room(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

/// What a file names of the crate, and whether it has `unsafe`. Its `#[cfg(test)]` modules may import anything.
#[derive(Default)]
struct Reader {
    rooms: BTreeSet<String>,
    holds_unsafe: bool,
    in_tests: bool,
}

impl Reader {
    fn of(text: &str) -> Self {
        let mut reader = Self::default();
        reader.visit_file(&syn::parse_file(text).unwrap());
        reader
    }

    fn names(&mut self, first: &str, second: String) {
        if ["crate", "lockstep"].contains(&first) && !self.in_tests {
            self.rooms.insert(second);
        }
    }

    /// The rooms at the head of a tree below `crate::`.
    fn heads(&mut self, first: &str, tree: &UseTree) {
        match tree {
            UseTree::Path(path) => self.names(first, path.ident.to_string()),
            UseTree::Name(name) => self.names(first, name.ident.to_string()),
            UseTree::Rename(rename) => self.names(first, rename.ident.to_string()),
            UseTree::Glob(_) => self.names(first, "*".into()),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.heads(first, tree)),
        }
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        let before = self.in_tests;
        let is_test =
            |attribute: &syn::Attribute| attribute.parse_args::<syn::Ident>().is_ok_and(|word| word == "test");
        self.in_tests |= module.attrs.iter().any(is_test);
        visit::visit_item_mod(self, module);
        self.in_tests = before;
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if let UseTree::Path(path) = &item.tree {
            self.heads(&path.ident.to_string(), &path.tree);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let mut names = path.segments.iter().map(|segment| segment.ident.to_string());
        if let (Some(first), Some(second)) = (names.next(), names.next()) {
            self.names(&first, second);
        }
        visit::visit_path(self, path);
    }

    fn visit_expr_unsafe(&mut self, block: &'ast syn::ExprUnsafe) {
        self.holds_unsafe = true;
        visit::visit_expr_unsafe(self, block);
    }

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        self.holds_unsafe |= signature.unsafety.is_some();
        visit::visit_signature(self, signature);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        self.holds_unsafe |= item.unsafety.is_some();
        visit::visit_item_impl(self, item);
    }
}

/// A file's imports that violate the table, as sentences.
fn violations(file: &str, text: &str) -> Vec<String> {
    let home = room(file);
    let Some(own) = floor(home) else { return vec![format!("{file} has no room in the table")] };
    let mut wrong = Vec::new();
    for other in Reader::of(text).rooms {
        match floor(&other) {
            _ if other == home || NEIGHBOURS.contains(&(home, &other)) => {}
            Some(below) if below < own => {}
            Some(at) => wrong.push(format!("{file} (floor {own}) imports {other} (floor {at})")),
            None => wrong.push(format!("{file} imports {other}, which has no room in the table")),
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
fn every_name_in_the_table_is_a_room() {
    let sources = sources();
    let rooms: BTreeSet<&str> = sources.iter().map(|(file, _)| room(file)).collect();
    let table: BTreeSet<&str> = FLOORS.into_iter().flatten().copied().collect();
    assert_eq!(rooms, table);
}

#[test]
fn unsafe_stays_within_its_fences() {
    let (inside, outside): (Vec<_>, Vec<_>) =
        sources().into_iter().partition(|(file, _)| UNSAFE.iter().any(|fence| file.starts_with(fence)));
    let holds = |(_, text): &&(String, String)| Reader::of(text).holds_unsafe;
    let escaped: Vec<&String> = outside.iter().filter(holds).map(|(file, _)| file).collect();
    assert!(escaped.is_empty(), "{escaped:?}");
    for fence in UNSAFE {
        assert!(inside.iter().filter(holds).any(|(file, _)| file.starts_with(fence)), "{fence} has no unsafe");
    }
}

/// The YAML crate is deprecated. Only one file uses it, so it can be replaced there.
#[test]
fn one_file_reads_yaml() {
    let names_it = |(file, text): (String, String)| text.contains("serde_yaml::").then_some(file);
    assert_eq!(sources().into_iter().filter_map(names_it).collect::<Vec<_>>(), ["config/yaml.rs"]);
}

#[test]
fn no_file_is_longer_than_a_reader_can_hold() {
    let long = sources().into_iter().map(|(file, text)| (text.lines().count(), file));
    let long: Vec<(usize, String)> = long.filter(|(lines, _)| *lines > MAX_LINES).collect();
    assert!(long.is_empty(), "more than {MAX_LINES} lines: {long:?}");
}

#[test]
fn a_planted_violation_is_found() {
    let text = r##"
        //! Not an import: [`crate::cli::run`].
        use std::path::Path;
        use crate::{error::{Error, Result}, train::{self, evaluate::Evaluation as E},};
        use super::loader::Loader;
        /* crate::doctor */
        fn f(path: &Path) -> crate::error::Result<&str> {
            crate::run::checkpoint::save::<Path>(path);
            Ok("crate::main")
        }
        #[cfg(test)]
        mod tests {
            use crate::cli;
        }
    "##;
    let imports = |what: &str| format!("data/shard.rs (floor 2) imports {what}");
    assert_eq!(violations("data/shard.rs", text), [imports("run (floor 3)"), imports("train (floor 4)")]);
    assert_eq!(violations("model/gpt.rs", "use crate::comm::Comm;").len(), 1);
    assert_eq!(violations("train/mod.rs", "use crate::comm::Comm; use crate::run;").len(), 0);
    assert_eq!(violations("stray.rs", "").len(), 1);
    assert!(Reader::of("fn f() { unsafe { g() } }").holds_unsafe);
    assert!(Reader::of("unsafe impl Send for S {}").holds_unsafe);
    assert!(!Reader::of("fn f() { /* unsafe */ }").holds_unsafe);
}
