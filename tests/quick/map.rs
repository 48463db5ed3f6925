//! tests/README.md is the map: it names every file that holds tests.

use std::fs;
use std::path::Path;

#[test]
fn every_file_with_tests_is_on_the_map() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let map = fs::read_to_string(tests.join("README.md")).unwrap();
    for folder in ["quick/", "ranks/", "full/", ""] {
        for entry in fs::read_dir(tests.join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let holds_tests = match folder {
                "" => name.starts_with("test_"),
                _ => name != "main.rs",
            };
            let place = format!("`{folder}{name}`");
            assert!(!holds_tests || map.contains(&place), "tests/README.md does not name {place}");
        }
    }
}
