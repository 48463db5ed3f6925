//! Resume is a promise: a stopped and resumed run ends bit for bit like an undisturbed one. `full/resume.rs` kills.

use crate::common::alike::{assert_learnt_alike, columns};
use crate::common::runs::{but_for_stragglers, last_step, Run, NO_END, VARIED};

fn stopped_and_resumed(ranks: usize, threads: usize, signal: &str) {
    let folder = tempfile::tempdir().unwrap();
    let config = VARIED.replace("MICRO", &(16 / ranks).to_string()).replace("save_every: 6", "save_every: 0");
    let broken = Run { threads, ..Run::new(folder.path(), "broken", &config, ranks) };
    for step in [5, 28, 61] {
        assert_eq!(broken.stop_at(step, &NO_END, signal).code(), Some(75));
        let last = last_step(&broken.dir);
        let saved = broken.dir.join(format!("checkpoints/step-{last:08}/MANIFEST.json"));
        assert!(saved.is_file(), "stopped after step {last} without saving it");
    }
    let steps = format!("train.steps={}", last_step(&broken.dir) + 10);
    let straight = Run { threads, ..Run::new(folder.path(), "straight", &config, ranks) };
    for run in [&broken, &straight] {
        assert!(run.start(&[&NO_END[..2], &["--set", &steps]].concat()).success());
    }
    // The resumed run makes up for an evaluation or a sample that was due at the stop.
    assert_learnt_alike(&broken.dir, &straight.dir);
}

#[test]
fn one_rank_of_two_threads_stops_on_request_with_75() {
    stopped_and_resumed(1, 2, "USR1");
}

#[test]
fn two_ranks_stop_together_on_request_with_75() {
    stopped_and_resumed(2, 1, "TERM");
}

/// If asked to stop during a step of many micro-batches, the ranks abandon it together and save the state before it.
fn given_up_and_resumed(ranks: usize) {
    let folder = tempfile::tempdir().unwrap();
    let config = format!(
        "data: {{layout: packed, block_size: 32, batch_size: {}, micro_batch: 1}}\n\
         model: {{n_layer: 2, n_head: 2, n_embd: 32, dropout: 0.1}}\ntrain: {{steps: 1, eval_every: 0}}\n",
        1500 * ranks
    );
    let straight = Run::new(folder.path(), "straight", &config, ranks);
    assert!(straight.start(&[]).success());
    let broken = Run::new(folder.path(), "broken", &config, ranks);
    assert_eq!(broken.stop_once_logged("sequences of each step", "TERM").code(), Some(75));
    let log = std::fs::read_to_string(broken.dir.join("logs/rank-0000.log")).unwrap();
    assert!(log.contains("asked to stop at step 1, micro-batch "), "{log}");
    assert!(columns(&broken.dir.join("train.csv"), &["step"]).is_empty());
    assert!(broken.dir.join("checkpoints/step-00000000/MANIFEST.json").is_file());
    assert!(broken.start(&[]).success());
    assert_learnt_alike(&broken.dir, &straight.dir);
}

#[test]
fn one_rank_gives_up_a_long_step_on_request() {
    given_up_and_resumed(1);
}

#[test]
fn two_ranks_give_up_a_long_step_together_on_request() {
    given_up_and_resumed(2);
}

const SHORT: &str =
    "data: {layout: packed, block_size: 16, batch_size: 4}\nmodel: {n_layer: 1, n_head: 1, n_embd: 16}\n\
    train: {steps: 12, eval_every: 4, save_every: 4}\n";

#[test]
fn a_log_without_its_checkpoints_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(folder.path(), "run", SHORT, 1);
    assert!(run.start(&[]).success());
    let log = std::fs::read(run.dir.join("train.csv")).unwrap();
    let away = folder.path().join("checkpoints");
    std::fs::rename(run.dir.join("checkpoints"), &away).unwrap();
    let done = run.command(&[]).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(4), "{said}");
    assert!(said.contains("the log of 12 steps but no checkpoint"), "{said}");
    assert_eq!(std::fs::read(run.dir.join("train.csv")).unwrap(), log);
    std::fs::rename(&away, run.dir.join("checkpoints")).unwrap();
    assert!(run.start(&[]).success());
    assert_eq!(std::fs::read(run.dir.join("train.csv")).unwrap(), log);
}

#[test]
fn another_runs_checkpoint_begins_a_run_and_a_restart_goes_on_with_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let first = Run::new(folder.path(), "first", SHORT, 1);
    assert!(first.start(&[]).success());
    let second = Run::new(folder.path(), "second", &SHORT.replace("steps: 12", "steps: 16"), 1);
    let from = first.dir.to_str().unwrap().to_string();
    assert!(second.start(&["--resume", &from]).success());
    assert_eq!(columns(&second.dir.join("train.csv"), &["step"]), [["13"], ["14"], ["15"], ["16"]]);
    // The same command, as from a requeued job, must not start over from the first run's checkpoint.
    assert!(second.start(&["--resume", &from, "--set", "train.steps=18"]).success());
    assert_eq!(columns(&second.dir.join("train.csv"), &["step"]).len(), 6);
    assert!(first.dir.join("checkpoints/step-00000012").exists());
}

#[test]
fn a_configuration_is_proved_to_resume_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let config = VARIED.replace("MICRO", "8");
    let run = Run::new(folder.path(), "mine", &format!("name: mine\n{config}"), 2);
    let prove = |ranks: usize, more: &[&str]| {
        let mut command =
            Run { config: run.config.clone(), dir: run.dir.clone(), threads: 1, ranks }.verb("checkpoint");
        command.arg("prove").arg("--config").arg(&run.config).args(more).current_dir(folder.path());
        let done = command.stdout(std::process::Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        (done.status.code(), said)
    };
    let (code, said) = prove(2, &["--set", "optim.zero1=true"]);
    assert_eq!(code, Some(0), "{said}");
    let parts = ["steps 11 to 20: tokens, loss, lr and grad_norm are alike", "bit for bit: 2 ranks"];
    for part in parts.into_iter().chain(["model.safetensors: alike", "rank-0001-of-0002.safetensors: alike"]) {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    assert!(!folder.path().join("runs/mine-proof").exists());
    assert!(!but_for_stragglers(&said).contains("WARN"), "a good proof has nothing to warn of: {said}");
    // Existing files are not removed.
    std::fs::create_dir_all(folder.path().join("runs/mine-proof")).unwrap();
    let (code, said) = prove(1, &["--steps", "4"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("mine-proof exists, from an earlier proof; remove it"), "{said}");
}
