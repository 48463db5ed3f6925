//! A lease of another machine, waited out in real time. `quick/lease.rs` has what needs no wait.

use std::fs;

use crate::common::{numbers, Workspace};

#[test]
fn a_lease_that_stands_still_for_12_s_is_taken() {
    let work = Workspace::in_memory();
    work.trained("run");
    // A process that is killed during a write on a file system without links leaves this.
    fs::write(work.path("run/lease.json"), "{\"cluster\": nu").unwrap();
    let said = work.train("run", "--set train.steps=14").ok();
    let parts =
        ["waiting up to 12 s", "taking over run/lease.json from", "the file is damaged", "it stood still for 12 s"];
    said.says(&parts);
    assert_eq!(numbers(&work.path("run/train.csv"), "step").len(), 14);
    assert!(!work.path("run/lease.json").exists());
}
