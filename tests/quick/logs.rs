//! What is said during a run: to people, to programs, to those who want quiet, and in the run's own log.

use std::fs;

use serde_json::Value;

use crate::common::Workspace;

/// Each line of a log as JSON.
fn lines(stderr: &str) -> Vec<Value> {
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    stderr.lines().map(parse).collect()
}

#[test]
fn programs_read_numbers_from_fields_and_the_end_from_one_object() {
    let work = Workspace::new();
    let said = lines(&work.train("run", "--log-format json").ok().stderr);
    assert!(said.iter().all(|line| line["level"].is_string() && line["timestamp"].is_string()), "{said:?}");
    let step = said.iter().find(|line| line["step"] == 1 && line["lr"].is_null()).unwrap();
    assert!(step["loss"].as_f64().unwrap() > 5.0 && step["tokens_per_s"].as_f64().unwrap() > 0.0, "{step}");
    assert!(step["left_s"].as_f64().unwrap() > 0.0 && step["steps"] == 12, "{step}");
    let evaluation = said.iter().find(|line| line["split"] == "valid" && line["ppl"].is_number()).unwrap();
    assert_eq!(evaluation["step"], 4);

    for (arguments, class) in [
        ("train --config absent.yaml", "usage"),
        ("train --confi absent.yaml", "usage"),
        ("eval --run-dir run --checkpoint step-5", "storage"),
    ] {
        let ended = work.lockstep(&format!("{arguments} --log-format json"));
        let last = lines(&ended.stderr).pop().unwrap();
        assert_eq!(last["exit_code"], ended.code, "{last}");
        assert_eq!((&last["class"], &last["level"]), (&class.into(), &"ERROR".into()), "{last}");
        assert!(!last["message"].as_str().unwrap().is_empty());
    }
}

#[test]
fn people_read_the_time_left_and_no_sample_ids_unless_they_ask() {
    let work = Workspace::new();
    let said = work.train("run", "").ok().stderr;
    let step = said.lines().find(|line| line.contains("step 1/12: loss ")).unwrap_or_else(|| panic!("{said}"));
    assert!(step.ends_with(" s left") && step.contains(" tokens/s, "), "{step}");
    assert!(!said.contains("computes samples") && !said.contains("step="), "{said}");
    let asked = work.train("asked", "-v").ok().stderr;
    assert!(asked.contains("of step 1, rank 0 computes samples ["), "{asked}");
}

#[test]
fn quiet_is_the_terminal_and_not_the_log() {
    let work = Workspace::new();
    let said = work.train("run", "-q").ok();
    assert_eq!(said.stderr, "");
    let log = fs::read_to_string(work.path("run/logs/rank-0000.log")).unwrap();
    for part in ["parameters, vocabulary", "step 1/12: loss", "the best so far"] {
        assert!(log.contains(part), "no {part:?} in {log}");
    }
}

#[test]
fn versions_name_the_libraries_and_a_v_is_short() {
    let work = Workspace::new();
    let long = work.lockstep("--version").ok().stdout;
    let names: Vec<&str> = long.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(names, ["lockstep", "LibTorch", "CUDA", "MPI", "NCCL"], "{long}");
    assert!(long.contains("LibTorch 2."), "{long}");
    assert_eq!(work.lockstep("-V").ok().stdout, concat!("lockstep ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn every_shell_gets_its_completions() {
    let work = Workspace::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = work.lockstep(&format!("completions {shell}")).ok().stdout;
        assert!(script.contains("run-dir"), "{shell}");
    }
}

#[test]
fn man_pages_are_pages_that_groff_reads() {
    let work = Workspace::new();
    let all = work.lockstep("man").ok().stdout;
    for part in [".TH lockstep 1", "lockstep\\-train", ".SH \"EXIT STATUS\"\n.TP\n0\ndone\n"] {
        assert!(all.contains(part), "no {part:?} in {all}");
    }
    let verb = work.lockstep("man checkpoint prove").ok().stdout;
    assert!(verb.contains(".TH lockstep-checkpoint-prove 1") && verb.contains("\\-\\-steps"), "{verb}");
    work.lockstep("man trane").fails(2, &["man trane: there is no such verb", "train, "]);
    for page in [all, verb] {
        fs::write(work.path("page.1"), page).unwrap();
        let Ok(groff) = std::process::Command::new("groff")
            .args(["-man", "-Tutf8", "-ww", "-z", "page.1"])
            .current_dir(work.path(""))
            .output()
        else {
            return crate::common::not_run("groff is not installed");
        };
        assert!(groff.status.success() && groff.stderr.is_empty(), "{}", String::from_utf8_lossy(&groff.stderr));
    }
}
