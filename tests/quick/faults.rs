//! Storage that fails: full disks, read-only folders, damaged checkpoints, output that nobody reads.

use std::fs;
use std::process::Stdio;

use lockstep::data::folder::DataDir;
use lockstep::run::checkpoint;

use crate::common::alike::{assert_alike, assert_learnt_alike};
use crate::common::{flip, numbers, snapshot, table, Workspace};

fn model(step: usize) -> String {
    format!("run/checkpoints/step-{step:08}/model.safetensors")
}

#[test]
fn a_damaged_newest_checkpoint_is_passed_over_aloud() {
    let work = Workspace::new();
    work.train("straight", "--set train.steps=14").ok();
    work.trained("run");
    flip(&work.path(&model(12)), 100_000);
    let parts = ["WARN", "passing over", &model(12), "SHA-256"];
    work.lockstep("generate --run-dir run --checkpoint latest --prompt A --tokens 1").ok().says(&parts);
    let best = ["--checkpoint latest", &model(12), "SHA-256"];
    work.lockstep("eval --run-dir run").fails(4, &best);

    let said = work.train("run", "--set train.steps=14").ok().says(&parts);
    said.says(&["resuming from run/checkpoints/step-00000008 after 8 steps", "set-aside-1-step-00000012"]);
    assert!(work.path("run/checkpoints/set-aside-1-step-00000012/model.safetensors").is_file());
    assert_learnt_alike(&work.path("run"), &work.path("straight"));
    work.lockstep("checkpoint verify --run-dir run").ok();
}

#[test]
fn without_a_good_checkpoint_nothing_begins() {
    let work = Workspace::new();
    work.trained("run");
    for step in [4, 8, 12] {
        flip(&work.path(&model(step)), 100_000);
    }
    let before = snapshot(&work.path("run"));
    let all = [&model(4)[..], &model(8), &model(12), "restore one", "another --run-dir"];
    work.train("run", "--set train.steps=14").fails(4, &all);
    work.lockstep("eval --run-dir run --checkpoint latest").fails(4, &all);
    work.lockstep("checkpoint verify --run-dir run").fails(4, &["3 of 3", &model(4), &model(8), &model(12)]);
    assert!(snapshot(&work.path("run")) == before);
    // Another run does not start from damaged weights either.
    let from = "run/checkpoints/step-00000008";
    work.train("new", &format!("--set train.init_from={from}")).fails(4, &[&model(8), "SHA-256"]);
    work.train("new", &format!("--resume {from}")).fails(4, &[&model(8), "SHA-256"]);

    // A run without its checkpoints is not mistaken for one that has not begun.
    fs::remove_dir_all(work.path("run/checkpoints")).unwrap();
    let parts = ["run has the log of 12 steps but no checkpoint", "another --run-dir"];
    work.train("run", "--set train.steps=14").fails(4, &parts);
    assert_eq!(numbers(&work.path("run/train.csv"), "step").len(), 12);
}

#[test]
fn a_full_disk_keeps_what_was_there() {
    let work = Workspace::new();
    // Room for two checkpoints (0.5 MiB each), not for a third.
    let script = "mount -t tmpfs -o size=1500k none mnt
        $lockstep train --config tiny.yaml --run-dir mnt/run; code=$?; cp -r mnt/run out; exit $code";
    let Some(said) = work.with_mounts(script) else { return };
    said.fails(4, &["cannot write mnt/run/checkpoints/step-00000012", "No space left", "free space"]);
    work.lockstep("checkpoint verify --run-dir out").ok();
    let steps: Vec<usize> = checkpoint::list(&work.path("out/checkpoints")).iter().map(|found| found.0).collect();
    assert_eq!(steps, [4, 8]);
    // What the failed save had written is removed, which frees the space.
    assert!(snapshot(&work.path("out")).keys().all(|name| !name.contains("tmp")));
    assert_eq!(numbers(&work.path("out/train.csv"), "step").len(), 12);
    assert_eq!(numbers(&work.path("out/eval.csv"), "step"), [4.0, 8.0, 12.0]);
    work.lockstep("eval --run-dir out").ok();
    // With room, the run goes on as if nothing had happened.
    work.train("out", "").ok().says(&["after 8 steps"]);
    work.trained("straight");
    assert_alike(&work.path("out"), &work.path("straight"));
}

#[test]
fn a_disk_full_between_checkpoints_leaves_whole_rows() {
    let work = Workspace::new();
    work.trained("run");
    // The disk is filled, then six pages are freed: the log of steps is the first file to need more.
    let script = "mount -t tmpfs -o size=4m none mnt
        cp -r run mnt/run; cat /dev/zero >mnt/rest 2>/dev/null; truncate -s -24K mnt/rest
        more='--set train.steps=100000 --set train.eval_every=0 --set train.save_every=0 --set train.sample_every=0'
        $lockstep train --config tiny.yaml --run-dir mnt/run $more; code=$?; cp -r mnt/run out; exit $code";
    let Some(said) = work.with_mounts(script) else { return };
    said.fails(4, &["cannot write mnt/run/train.csv", "No space left", "free space"]);
    let (columns, rows) = table(&fs::read_to_string(work.path("out/train.csv")).unwrap());
    assert!(rows.len() > 20 && rows.iter().all(|row| row.len() == columns.len()));
    assert_eq!(rows.last().unwrap()["step"], rows.len().to_string());
    work.lockstep("checkpoint verify --run-dir out").ok();
    work.train("out", "--set train.steps=14").ok().says(&["after 12 steps"]);
    assert_eq!(numbers(&work.path("out/train.csv"), "step").len(), 14);

    // With no room at all, even the start fails, and changes nothing.
    let script = "mount -t tmpfs -o size=4m none mnt; cp -r run mnt/run; cat /dev/zero >mnt/rest 2>/dev/null
        $lockstep train --config tiny.yaml --run-dir mnt/run --set train.steps=14; code=$?; cp -r mnt/run full; exit $code";
    let Some(said) = work.with_mounts(script) else { return };
    said.fails(4, &["cannot write mnt/run/", "No space left", "free space"]);
    assert!(snapshot(&work.path("full")) == snapshot(&work.path("run")));
}

#[test]
fn a_full_disk_during_prepare_keeps_the_old_data_folder() {
    let work = Workspace::new();
    let script = "mount -t tmpfs -o size=400k none mnt; prepare='prepare --source sample --out mnt/made'
        $lockstep -q $prepare --tokenizer data/tokenizer.json || exit 1
        $lockstep -q $prepare --tokenizer bpe:300; code=$?; ls mnt; cp -r mnt/made out; exit $code";
    let Some(said) = work.with_mounts(script) else { return };
    let said = said.fails(4, &["cannot write", "mnt/made", "No space left", "free space"]);
    assert!(said.stdout.ends_with("\nmade\n"), "more than the old folder is left: {}", said.stdout);
    assert_eq!(DataDir::open(&work.path("out")).unwrap().meta.vocab_size, 512);
    assert!(snapshot(&work.path("out"))["train.bin"] == snapshot(&work.path("data"))["train.bin"]);
}

#[test]
fn a_read_only_folder_is_a_storage_error() {
    let work = Workspace::new();
    work.trained("run");
    let remedy = "name a folder that you may write to";
    for (command, place) in [
        ("prepare --source sample --tokenizer bpe:300 --out mnt/made", "mnt/made"),
        ("train --config tiny.yaml --run-dir mnt/new", "mnt/new/"),
        ("train --config tiny.yaml --run-dir mnt/run --set train.steps=14", "mnt/run/"),
    ] {
        let script = format!(
            "mount -t tmpfs none mnt; cp -r run mnt/run; mount -o remount,bind,ro mnt
            $lockstep -q {command}; code=$?; ls mnt; exit $code"
        );
        let Some(said) = work.with_mounts(&script) else { return };
        let said = said.fails(4, &["cannot write", place, "Read-only file system", remedy]);
        assert_eq!(said.stdout, "run\n");
    }
    // Verbs that only read work on a read-only disk.
    let script = "mount -t tmpfs none mnt; cp -r run mnt/run; mount -o remount,bind,ro mnt
        $lockstep eval --run-dir mnt/run && $lockstep checkpoint verify --run-dir mnt/run";
    work.with_mounts(script).unwrap().ok();
}

#[test]
fn what_stands_in_the_way_is_left_alone() {
    let work = Workspace::new();
    fs::write(work.path("file"), "precious").unwrap();
    work.train("file", "").fails(4, &["cannot write file/", "Not a directory"]);
    assert_eq!(fs::read_to_string(work.path("file")).unwrap(), "precious");
    // Another program's log under the same name.
    fs::create_dir(work.path("run")).unwrap();
    fs::write(work.path("run/train.csv"), "epoch,accuracy\n1,0.5\n").unwrap();
    let parts = ["run/train.csv", "expected step,tokens,", "found epoch,accuracy", "another --run-dir"];
    work.train("run", "").fails(4, &parts);
    assert_eq!(fs::read_to_string(work.path("run/train.csv")).unwrap(), "epoch,accuracy\n1,0.5\n");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let work = Workspace::new();
    work.trained("run");
    for verb in [
        "eval --run-dir run",
        "generate --run-dir run --prompt A B --tokens 1",
        "compare --config tiny.yaml --steps 2 --devices cpu",
        "checkpoint list --run-dir run",
        "checkpoint verify --run-dir run",
        "checkpoint prove --config tiny.yaml --steps 2",
        "tokenize --tokenizer gpt2 tiny.yaml",
        "prepare --source sample --tokenizer bpe:300 --out made",
        "doctor --device cpu",
        "completions bash",
        "man",
        "runs .",
        "watch run",
        "--help",
        "--version",
    ] {
        let mut command = work.command(&verb.split(' ').collect::<Vec<_>>());
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        command.stdout(writer);
        let said = crate::common::finish(command).ok();
        assert!(!said.stderr.contains("standard output"), "{verb}: {}", said.stderr);
    }
    // Each verb still does its work, and its verdict still decides the exit code.
    assert!(work.path("made/train.bin").is_file() && work.path("compare.csv").is_file());
    flip(&work.path(&model(8)), 100_000);
    let mut command = work.command(&["checkpoint", "verify", "--run-dir", "run"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    command.stdout(writer);
    crate::common::finish(command).fails(4, &["1 of 3 checkpoints"]);
}

#[test]
fn a_file_beyond_the_systems_limit_is_an_error() {
    let work = Workspace::new();
    // The limit is in blocks of 512 bytes or a kilobyte; either way no checkpoint fits.
    let limited = |arguments: &str| {
        let mut command = std::process::Command::new("sh");
        let script = format!("ulimit -f 100; exec {} {arguments}", crate::common::binary());
        command.args(["-c", &script]).current_dir(work.path("")).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
        crate::common::finish(command)
    };
    let parts = ["cannot write run/checkpoints/step-00000004", "File too large", "ulimit -f"];
    limited("train --config tiny.yaml --run-dir run").fails(4, &parts);
    let parts = ["cannot write ", "train.bin: File too large", "ulimit -f"];
    limited("prepare --source sample --tokenizer bpe:300 --out made").fails(4, &parts);
}

#[test]
fn a_table_that_a_spreadsheet_saved_is_taken_up() {
    let work = Workspace::new();
    work.trained("run");
    let path = work.path("run/train.csv");
    let ours = fs::read_to_string(&path).unwrap();
    let tokens: Vec<f64> = numbers(&path, "tokens");
    let theirs: Vec<String> = ours
        .lines()
        .map(|line| {
            let mut cells: Vec<String> = line.split(',').map(String::from).collect();
            if let Ok(tokens) = cells[1].parse::<f64>() {
                cells[1] = format!("{tokens:E}");
            }
            cells.join(",") + "\r\n"
        })
        .collect();
    fs::write(&path, theirs.concat()).unwrap();
    let said = work.train("run", "--set train.steps=14").ok();
    assert!(!said.stderr.contains("has no row"), "{}", said.stderr);
    assert_eq!(numbers(&path, "step").len(), 14);
    assert_eq!(numbers(&path, "tokens")[..12], tokens);
    assert!(fs::read_to_string(&path).unwrap().starts_with(&ours));
}

#[test]
fn a_table_that_is_not_understood_is_left_alone() {
    let work = Workspace::new();
    work.trained("run");
    for (table, line) in [("train.csv", 2), ("train.csv", 9), ("train.csv", 13), ("eval.csv", 3)] {
        let path = work.path("run").join(table);
        let whole = fs::read_to_string(&path).unwrap();
        let mut lines: Vec<String> = whole.lines().map(String::from).collect();
        lines[line - 1] = lines[line - 1].replace('.', ";");
        fs::write(&path, lines.join("\n") + "\n").unwrap();
        let before = snapshot(&work.path("run"));
        let parts = [&format!("run/{table}, line {line}: expected a row")[..], "nothing was changed"];
        work.train("run", "--set train.steps=14").fails(4, &parts);
        assert!(snapshot(&work.path("run")) == before, "{table}, line {line}");
        fs::write(&path, whole).unwrap();
    }
}

#[test]
fn rows_that_are_missing_are_named() {
    let work = Workspace::new();
    work.trained("run");
    let path = work.path("run/train.csv");
    let whole = fs::read_to_string(&path).unwrap();
    // The last row cut, and all but the first rows.
    fs::write(&path, &whole[..whole.len() - 5]).unwrap();
    work.train("run", "").ok().says(&["WARN", "run/train.csv has no row of steps 12 to 12"]);
    fs::write(&path, whole.lines().take(6).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    work.train("run", "").ok().says(&["WARN", "run/train.csv has no row of steps 6 to 12"]);
    let best = fs::read(work.path("run/best.json")).unwrap();
    fs::remove_file(&path).unwrap();
    fs::remove_file(work.path("run/eval.csv")).unwrap();
    let parts = ["run/train.csv has no row of steps 1 to 12", "run/eval.csv has no row of steps 1 to 11"];
    work.train("run", "--set train.steps=14").ok().says(&parts);
    assert_eq!(numbers(&path, "step"), [13.0, 14.0]);
    // The best evaluation is remembered even without its row.
    let noted: serde_json::Value = serde_json::from_slice(&best).unwrap();
    let now: serde_json::Value = serde_json::from_slice(&fs::read(work.path("run/best.json")).unwrap()).unwrap();
    assert!(now["loss"].as_f64() <= noted["loss"].as_f64(), "{now}, was {noted}");
}
