//! `lockstep config`: job scripts rely on it to read a configuration, in whatever style of YAML.

use std::fs;

use lockstep::config::PRESETS;

use crate::common::{finish, Workspace};

/// What it prints for these arguments.
#[track_caller]
fn printed(work: &Workspace, arguments: &[&str]) -> String {
    let arguments = [&["config"], arguments].concat();
    work.run(&arguments).ok().stdout
}

#[test]
fn the_run_directory_is_the_one_that_train_takes_in_any_spelling() {
    let work = Workspace::new();
    let spellings = [
        ("name: plain\n", "plain"),
        ("\"name\": quoted\n", "quoted"),
        ("{name: flow, seed: 3}\n", "flow"),
        ("name: it's\n", "it's"),
        ("name: 'two words'\r\nseed: 3\r\n", "two words"),
        ("name: foo#bar # a comment\n", "foo#bar"),
        ("? name\n: odd\n", "odd"),
        ("seed: 3\n", "run"),
    ];
    for (text, name) in spellings {
        fs::write(work.path("spelt.yaml"), text).unwrap();
        let said = printed(&work, &["--print", "run_dir", "--config", "spelt.yaml", "--set", "model.preset=gpt-nano"]);
        assert_eq!(said, format!("runs/{name}\n"), "{text:?}");
    }
    let of_tiny = ["--print", "run_dir", "--config", "tiny.yaml", "--set", "name='via set'"];
    assert_eq!(printed(&work, &of_tiny), "runs/via set\n");
    // A job passes the same arguments as to `train`.
    let more = ["--run-dir=else where", "--resume", "never", "--allow-config-change", "seed", "-q"];
    assert_eq!(printed(&work, &[&of_tiny[..], &more].concat()), "else where\n");

    let run = ["train", "--config", "tiny.yaml", "--set", "name='via set'", "--set", "train.steps=1"];
    work.run(&run).ok();
    assert!(work.path("runs/via set/config.yaml").is_file());
}

#[test]
fn every_key_has_a_value_in_one_line() {
    let work = Workspace::new();
    let whole = printed(&work, &["--config", "tiny.yaml", "--set", "optim.lr=3e-4"]);
    assert!(whole.starts_with("name: tiny\n") && whole.contains("\n  lr: 0.0003\n"), "{whole}");
    let values = [
        ("data.batch_size", "8"),
        ("data.dir", "data"),
        ("device", "cpu"),
        ("optim.lr", "0.0003"),
        ("optim.betas", "[0.9,0.95]"),
        ("model.bias", "true"),
        ("model.n_layer", "2"),
        ("train.init_from", ""),
        ("train.prompts", r#"[" The river",""]"#),
        ("data.micro_batch", "auto"),
    ];
    for (key, value) in values {
        let said = printed(&work, &["--config", "tiny.yaml", "--set", "optim.lr=3e-4", "--print", key]);
        assert_eq!(said, format!("{value}\n"), "{key}");
    }
    // Without a file: the defaults.
    assert_eq!(printed(&work, &["--print", "data.block_size"]), "128\n");
}

#[test]
fn the_template_is_a_configuration_and_says_what_each_key_means() {
    let work = Workspace::new();
    let template = printed(&work, &["--defaults"]);
    fs::write(work.path("all.yaml"), &template).unwrap();
    work.lockstep("config --config all.yaml").fails(2, &["in all.yaml: model: give a preset"]);
    let chosen = ["--set", "model.preset=gpt-nano", "--print", "data.block_size", "--config", "all.yaml"];
    assert_eq!(printed(&work, &chosen), "128\n");
    assert!(template.contains("\n# How it is trained.\noptim:\n  # The highest learning rate.\n  lr: "), "{template}");
    work.lockstep("config --defaults --config tiny.yaml").fails(2, &["--defaults", "cannot be used with"]);
}

#[test]
fn presets_are_printed_for_programs() {
    let work = Workspace::new();
    let printed: serde_json::Value = serde_json::from_str(&printed(&work, &["--presets"])).unwrap();
    assert_eq!(printed["gpt2"], serde_json::json!({"n_layer": 12, "n_head": 12, "n_embd": 768}));
    assert_eq!(printed.as_object().unwrap().len(), PRESETS.len());
}

#[test]
fn what_it_cannot_print_is_refused() {
    let work = Workspace::new();
    let key = |key| work.lockstep(&format!("config --config tiny.yaml --print {key}"));
    key("data.batchsize").fails(2, &["unknown key `data.batchsize`", "did you mean `data.batch_size`?"]);
    key("rundir").fails(2, &["`run_dir`", "unknown key `rundir`"]);
    key("data").fails(2, &["`data` is a section"]);
    key("seed.x").fails(2, &["unknown key `seed.x`"]);
    work.lockstep("config --config none.yaml --print run_dir").fails(2, &["none.yaml"]);
    work.lockstep("config --config tiny.yaml --set train.log_every=0")
        .fails(2, &["in --set train.log_every=0: train.log_every: expected 1"]);
}

#[test]
fn the_work_of_one_process_is_refused_to_several() {
    let work = Workspace::new();
    let verbs = [
        ("prepare", "--source sample --tokenizer bpe:300 --out new"),
        ("tokenize", "--tokenizer gpt2"),
        ("config", ""),
        ("generate", "--run-dir run --prompt A"),
        ("checkpoint list", "--run-dir run"),
        ("checkpoint verify", "--run-dir run"),
        ("completions", "bash"),
    ];
    for (verb, options) in verbs {
        let arguments: Vec<String> = format!("{verb} {options}").split_whitespace().map(String::from).collect();
        for variables in [[("OMPI_COMM_WORLD_SIZE", "2"); 2], [("SLURM_STEP_NUM_TASKS", "3"), ("SLURM_PROCID", "0")]] {
            let mut command = work.command(&arguments);
            command.envs(variables);
            finish(command).fails(2, &[&format!("`{verb}` is one process's work")]);
        }
    }
    assert!(!work.path("new").exists());
    // A batch shell and a job with one task are not ranks, whatever the job's other variables say.
    let mut command = work.command(&["config"]);
    command.envs([("SLURM_STEP_NUM_TASKS", "1"), ("SLURM_NTASKS", "3"), ("SLURM_PROCID", "0")]);
    finish(command).ok();
}
