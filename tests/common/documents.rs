//! The documents for users, for `tests/quick/documents.rs` and `tests/full/documents.rs`.

use std::fs;
use std::path::Path;

/// The clone.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Their paths in the clone: README.md first, since the others' commands build on its commands, then the guide.
pub fn documents() -> Vec<String> {
    let mut pages: Vec<String> = fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|entry| format!("docs/{}", entry.unwrap().file_name().to_str().unwrap()))
        .filter(|name| name.ends_with(".md") && name != "docs/guide.md")
        .collect();
    pages.sort();
    ["README.md", "docs/guide.md", "CONTRIBUTING.md", "CHANGELOG.md"]
        .map(String::from)
        .into_iter()
        .chain(pages)
        .collect()
}
