//! Mistakes of users: the exit code, and a message with what was expected, what was found, where, and what to do.
//! Storage has its own file, `faults.rs`.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;

use lockstep::config::Config;
use lockstep::data::sample;
use lockstep::data::wikitext::Split;
use lockstep::error::exit_code;

use crate::common::{copy_folder, not_run, numbers, table, Workspace, TINY};

/// Asserts that `tiny.yaml` with these overrides cannot run on `world_size` ranks, with `train`'s error.
#[track_caller]
fn unplanned(overrides: &[&str], world_size: usize, parts: &[&str]) {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    let error = Config::parse(TINY, &overrides).and_then(|config| config.validate(world_size)).unwrap_err();
    let text = format!("{error:#}");
    assert_eq!(exit_code(&error), 2, "{text}");
    assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} in {text:?}");
}

#[test]
fn a_key_or_value_that_cannot_be_is_named() {
    let cases: [(&str, &[&str]); 46] = [
        ("train.stesp=3", &["unknown key `train.stesp`", "did you mean `train.steps`?"]),
        ("optim.rl=3", &["unknown key `optim.rl`", "did you mean `optim.lr`?"]),
        ("lr=1e-3", &["unknown key `lr`", "did you mean `optim.lr`?"]),
        ("modle.n_head=3", &["unknown key `modle`", "did you mean `model`?"]),
        ("optim.beta=3", &["unknown key `optim.beta`", "did you mean `optim.betas`?", "weight_decay"]),
        ("steps", &["--set steps", "key=value"]),
        ("seed.x=1", &["seed"]),
        ("optim.learning_rate=1", &["unknown key `optim.learning_rate`", "did you mean `optim.lr`?"]),
        ("learning_rate=1", &["did you mean `optim.lr`?"]),
        ("train.lr-max=1", &["did you mean `optim.lr`?"]),
        ("train.min_learning_rate=1", &["did you mean `optim.min_lr`?"]),
        ("batch=1", &["did you mean `data.batch_size`?"]),
        ("max_iters=1", &["did you mean `train.steps`?"]),
        ("data.seq_len=1", &["did you mean `data.block_size`?"]),
        ("model.weight_decay=1", &["did you mean `optim.weight_decay`?"]),
        ("eval_evry=1", &["did you mean `train.eval_every`?"]),
        ("data.zzz=1", &["unknown key `data.zzz`: keys here: dir, layout"]),
        // Spellings that YAML does not read as intended.
        ("optim.lr=", &["--set optim.lr=: the value is missing"]),
        ("name=2024", &["name: expected text, found `2024`", "--set 'name=\"2024\"'"]),
        ("seed=010", &["seed: expected a whole number from 0, found \"010\"", "--set 'seed=10'"]),
        ("train.steps=1_000", &["found \"1_000\"", "--set 'train.steps=1000'"]),
        ("model.bias=yes", &["model.bias: expected true or false, found \"yes\"", "--set 'model.bias=true'"]),
        ("train.prompts= A", &["train.prompts: expected a list, found \"A\"", "--set 'train.prompts=[\"A\"]'"]),
        ("device=0", &["device: expected a word, found `0`"]),
        ("train.steps=abc", &["train.steps", "\"abc\"", "a whole number"]),
        ("train.steps=-1", &["train.steps", "`-1`", "a whole number"]),
        ("train.steps=2.5", &["train.steps", "2.5", "a whole number"]),
        ("optim.lr=fast", &["optim.lr", "\"fast\"", "a number"]),
        ("optim.betas=[0.9]", &["optim.betas", "length 1", "length 2"]),
        ("model.tied_head=maybe", &["model.tied_head", "maybe", "true or false"]),
        ("model.norm=middle", &["model.norm", "`middle`", "`pre` or `post`"]),
        ("threads=0", &["threads", "`auto` or a whole number from 1"]),
        ("model=3", &["model: expected keys and values, found a number"]),
        ("model.preset=gpt2", &["preset or n_layer, n_head and n_embd, not both"]),
        ("data.batch_size=0", &["data.batch_size: expected 1", "found 0"]),
        ("data.batch_size=1000000000000", &["data.batch_size: expected", "found 1000000000000"]),
        ("data.block_size=1", &["data.block_size: expected 2", "found 1"]),
        ("model.dropout=1.5", &["model.dropout: expected 0 to below 1, found 1.5"]),
        ("model.n_head=3", &["model.n_embd: expected a multiple of model.n_head, found 32 with 3 heads"]),
        ("model.n_embd=1000000000000", &["model.n_embd: expected", "found 1000000000000"]),
        ("optim.lr=-1", &["optim.lr: expected a number above 0, found -1"]),
        ("optim.min_lr=1", &["optim.min_lr: expected 0 to optim.lr, found 1"]),
        ("optim.schedule=wsd", &["optim.decay_steps: expected 1 or more", "found 0"]),
        ("train.log_every=0", &["train.log_every: expected 1 or more, found 0"]),
        ("name=a/b", &["name: expected the name of a folder, found `a/b`"]),
        ("data.micro_batch=3", &["data.micro_batch: 3 does not divide the 8 sequences", "these do: 1, 2, 4, 8"]),
    ];
    for (set, parts) in cases {
        unplanned(&[set], 1, parts);
    }
    // Of two wrong values, the first is named.
    unplanned(&["train.steps=abc", "seed=xyz"], 1, &["train.steps: expected", "\"abc\""]);
}

#[test]
fn a_configuration_that_cannot_be_run_is_refused_before_anything_is_made() {
    let work = Workspace::new();
    // A mistake on the command line is not blamed on the file.
    let set = |set: &str, parts: &[&str]| {
        let place = format!("in --set {set}: ");
        let said =
            work.train("run", &format!("--set train.steps=5 --set {set}")).fails(2, &[&[&place[..]], parts].concat());
        assert!(!said.stderr.contains("tiny.yaml"), "{}", said.stderr);
    };
    set("train.stesp=3", &["unknown key `train.stesp`", "did you mean `train.steps`?"]);
    set("train.steps=abc", &["train.steps: expected a whole number from 0", "\"abc\""]);
    set("train.steps=0", &["train.steps: expected 1 or more, found 0"]);
    set("train={\"steps\":0}", &["train.steps: expected 1 or more, found 0"]);
    set("data.micro_batch=3", &["data.micro_batch: 3", "1, 2, 4, 8"]);
    set("model.preset=gpt2", &["model: give either preset or n_layer, n_head and n_embd, not both"]);
    work.train("run", "--set optim.lr=").fails(2, &["lockstep: --set optim.lr=: the value is missing"]);
    fs::write(work.path("batch.yaml"), TINY.replace("batch_size: 8", "batch_size: 0")).unwrap();
    let said = work.lockstep("train --config batch.yaml --set train.steps=3");
    said.fails(2, &["in batch.yaml: data.batch_size: expected 1 to 1048576, found 0"]);
    let said = work.lockstep("compare --config tiny.yaml --devices cpu --set optim.lr=-1");
    said.fails(2, &["in --set optim.lr=-1: optim.lr: expected a number above 0"]);
    assert!(!work.path("run").exists());

    let file = |text: &[u8], parts: &[&str]| {
        fs::write(work.path("bad.yaml"), text).unwrap();
        work.lockstep("train --config bad.yaml").fails(2, &[&["bad.yaml"], parts].concat());
    };
    file(b"optim: {rl: 1}", &["unknown key `optim.rl`", "did you mean `optim.lr`?"]);
    file(b"train: {steps: 3\n", &["not a YAML configuration", "line"]);
    file(b"just words", &["expected keys and values, found text"]);
    file(b"name: \xff", &["UTF-8"]);
    file(b"name: 2024", &["name: expected text, found `2024`; write name: \"2024\""]);
    file(b"seed: 010", &["seed: expected a whole number from 0, found \"010\"; write seed: 10"]);
    file(b"optim: {lr: }", &["optim.lr: expected a number, found nothing"]);
    file(b"optim:\n\tlr: 1", &["line 2", "indent with spaces, not with tabs"]);
    file(b"", &["preset, or all of n_layer, n_head and n_embd"]);
    file(b"model: {preset: gpt-nono}", &["model.preset", "gpt-nono", "gpt-nano, gpt-micro"]);
    work.lockstep("train --config none.yaml").fails(2, &["none.yaml", "No such file"]);
    work.lockstep("train").fails(2, &["--config <CONFIG>", "--help"]);
    work.lockstep("trian").fails(2, &["'trian'", "'train'"]);
}

#[test]
fn a_byte_order_mark_before_a_configuration_is_skipped() {
    let marked = Config::parse(&format!("\u{feff}{TINY}"), &[]).unwrap();
    assert_eq!(marked, Config::parse(TINY, &[]).unwrap());
}

#[test]
fn settings_that_hardly_anybody_means_are_said_once() {
    let said = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        Config::parse(TINY, &overrides).unwrap().validate(1).unwrap().oddities().join("\n")
    };
    let found = said(&["optim.warmup_steps=2000", "train.steps=1000"]);
    assert_eq!(found, "optim.warmup_steps is 2000, train.steps is 1000: the learning rate never reaches optim.lr");
    let wsd = ["optim.schedule=wsd", "optim.warmup_steps=5", "train.steps=12"];
    assert!(said(&[&wsd[..], &["optim.decay_steps=8"]].concat()).contains("the decay is cut short"));
    assert_eq!(said(&[&wsd[..], &["optim.decay_steps=7"]].concat()), "");
    assert!(said(&["optim.min_lr=1e-5"]).contains("optim.schedule is constant"));
    assert_eq!(said(&["optim.warmup_steps=12"]), "");

    let work = Workspace::new();
    let odd = "--set optim.warmup_steps=2000 --set data.block_size=16384 --set data.batch_size=2 --set model.n_embd=2";
    work.train("planned", &format!("{odd} --dry-run")).ok().says(&["optim.warmup_steps is 2000"]);
    let said = work.train("run", &format!("{odd} --set train.steps=1"));
    let parts = ["optim.warmup_steps is 2000", "data.block_size is 16384, the validation split has "];
    let said = said.ok().says(&parts);
    let log = fs::read_to_string(work.path("run/logs/rank-0000.log")).unwrap();
    for text in [&said.stderr, &log] {
        assert!(parts.iter().all(|part| text.matches(part).count() == 1), "{text}");
    }
}

#[test]
fn a_batch_that_the_ranks_cannot_share_is_answered_with_those_that_fit() {
    unplanned(&[], 3, &["data.batch_size: 8 sequences", "3 ranks", "6 or 9", "1, 2, 4, 8"]);
    unplanned(&["data.batch_size=2"], 3, &["batch_size of 3,", "numbers of ranks: 1, 2"]);
    let parts = ["data.micro_batch: 3 does not divide the 4 sequences", "batch_size of 12", "these do: 1, 2, 4"];
    unplanned(&["data.batch_size=12", "data.micro_batch=3"], 3, &parts);
    let plan = Config::parse(TINY, &["data.batch_size=12".into(), "data.micro_batch=2".into()]).unwrap();
    let plan = plan.validate(3).unwrap();
    assert_eq!((plan.micro_batch, plan.accumulation), (2, 2));
}

#[test]
fn data_that_cannot_be_trained_on_is_refused() {
    let work = Workspace::new();
    let remedy = "lockstep prepare";
    let refused = |set: &str, parts: &[&str]| work.train("run", &format!("--set {set}")).fails(3, parts);
    refused("data.dir=nowhere", &["nowhere: expected a data folder, found nothing", remedy]);
    fs::create_dir(work.path("foreign")).unwrap();
    fs::write(work.path("foreign/notes.txt"), "x").unwrap();
    refused("data.dir=foreign", &["foreign: expected a data folder, found no meta.json in it", remedy]);
    fs::write(work.path("foreign/meta.json"), "{\"title\": \"photographs\"}").unwrap();
    refused("data.dir=foreign", &["foreign/meta.json", "missing field", remedy]);

    for (name, keep) in [("train.bin", 60_000), ("valid.bin", 100)] {
        let shard = work.own_data("cut").join(name);
        fs::File::options().write(true).open(&shard).unwrap().set_len(keep).unwrap();
        refused("data.dir=cut", &[&format!("cut/{name}"), " at byte ", "expected", "found", remedy]);
    }
    crate::common::flip(&work.own_data("cut").join("test.bin"), 1000);
    refused("data.dir=cut", &["cut/test.bin", "checksum at byte 72", "expected", "found", remedy]);

    let meta: serde_json::Value = serde_json::from_slice(&fs::read(work.path("data/meta.json")).unwrap()).unwrap();
    let found = format!("needs 100001 tokens, the split has {}", meta["train"]["tokens"]);
    refused("data.block_size=100000", &["the training split", "data.block_size 100000", &found, "smaller"]);
    assert!(!work.path("run/config.yaml").exists());
}

#[test]
fn weights_do_not_meet_ids_of_another_vocabulary_of_the_same_size() {
    let work = Workspace::new();
    work.trained("run");
    fs::write(work.path("book.txt"), sample::text(Split::Valid, sample::BYTES)).unwrap();
    work.lockstep("-q prepare --source book.txt --valid 20% --tokenizer bpe:512 --out other").ok();
    let parts = ["other/tokenizer.json is not the tokenizer that run was trained with (run/tokenizer.json)", "prepare"];
    for from in ["run", "run/checkpoints/step-00000008"] {
        let begin = |from: &str| work.train("new", &format!("--set data.dir=other {from}")).fails(3, &parts);
        begin(&format!("--set train.init_from={from}"));
        begin(&format!("--resume {from} --allow-config-change data.dir"));
    }
    assert!(!work.path("new").exists());

    // A checkpoint on its own does not tell which ids it was trained on, unless they are those of the given data.
    copy_folder(&work.path("run/checkpoints/step-00000008"), &work.path("alone"));
    let doubt = "alone does not lie in a run directory with its tokenizer.json: make sure that it was trained with";
    work.train("new", "--set data.dir=other --set train.init_from=alone").ok().says(&[doubt, "other/tokenizer.json"]);
    let said = work.train("sure", "--set train.init_from=alone").ok();
    assert!(!said.stderr.contains("alone does not lie"), "{}", said.stderr);
}

#[test]
fn a_schedule_that_jumps_is_said_with_both_rates_and_the_step() {
    let work = Workspace::new();
    let cosine = "--set optim.schedule=cosine --set optim.lr=1e-3 --set optim.min_lr=1e-4";
    work.train("run", cosine).ok();
    copy_folder(&work.path("run"), &work.path("longer"));
    let jump = "the learning rate jumps at step 13";
    let said = work.train("longer", &format!("{cosine} --set train.steps=24")).ok();
    said.says(&[&format!("{jump}: it is 4.9e-4 there, and would have been 1.0e-4 (train.steps was 12 and is 24)")])
        .says(&["--set optim.decay_steps=12 --allow-config-change optim.decay_steps keeps to the old course"]);
    // The remedy works without --allow-config-change: the decay ends at the same step as before.
    let said = work.train("run", &format!("{cosine} --set train.steps=24 --set optim.decay_steps=12")).ok();
    assert!(!said.stderr.contains("jumps"), "{}", said.stderr);
    assert_eq!(numbers(&work.path("run/train.csv"), "lr")[11..], [1e-4; 13]);
    // With another rate, too, that would not keep to it, so it is not said.
    let allowed = "--allow-config-change optim.lr";
    copy_folder(&work.path("longer"), &work.path("faster"));
    let said = work.train("faster", &format!("{cosine} --set train.steps=26 --set optim.lr=2e-3 {allowed}")).ok();
    assert!(!said.stderr.contains("keeps to the old course"), "{}", said.stderr);
    // Another run's checkpoint, and another rate.
    let from = "longer/checkpoints/step-00000020";
    let said = work.train("new", &format!("--resume {from} --set optim.lr=0.1 --set train.steps=22")).ok();
    let parts = ["jumps at step 21: it is 1.0e-1 there, and would have been 1.3e-4", "optim.lr was 0.001 and is 0.1"];
    said.says(&parts);
}

#[test]
fn what_auto_and_a_path_stood_for_may_be_written_out() {
    if lockstep::torch::has_driver() {
        return not_run("`device: auto` may mean a GPU here");
    }
    let work = Workspace::new();
    let auto = "--set device=auto --set data.micro_batch=auto";
    let written = "--set device=cpu --set data.micro_batch=8 --set data.dir=./data";
    for (steps, keys) in [(4, auto), (6, written), (8, auto)] {
        work.train("run", &format!("{keys} --set train.steps={steps}")).ok();
    }
    assert_eq!(numbers(&work.path("run/train.csv"), "step").len(), 8);
    let said = work.train("run", "--set data.micro_batch=4 --set train.steps=9");
    said.fails(2, &["data.micro_batch was auto and is 4", "allow it with --allow-config-change data.micro_batch"]);
}

#[test]
fn a_prompt_outside_the_vocabulary_is_refused() {
    let work = Workspace::new();
    work.trained("run");
    let arguments = ["generate", "--run-dir", "run", "--prompt"].map(OsStr::new);
    work.run(&[&arguments[..], &[OsStr::from_bytes(b"caf\xe9")]].concat()).fails(2, &["UTF-8", "--prompt"]);

    // A tokenizer that lacks a byte might meet text that it cannot encode, so it is refused wherever it is named.
    let text = fs::read_to_string(work.path("data/tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
    let id = vocabulary.remove("Z").unwrap();
    vocabulary.insert("ZZZ".into(), id);
    json["model"]["merges"] = serde_json::json!([]);
    fs::write(work.path("lacking.json"), json.to_string()).unwrap();
    let parts = ["lacking.json", "0x5a", "256 bytes"];
    work.lockstep("tokenize --tokenizer lacking.json tiny.yaml").fails(3, &parts);
    work.lockstep("prepare --source sample --tokenizer lacking.json --out made").fails(3, &parts);
    fs::copy(work.path("lacking.json"), work.path("run/tokenizer.json")).unwrap();
    let parts = ["run/tokenizer.json", "0x5a", "256 bytes"];
    work.lockstep("generate --run-dir run --prompt ZEBRA").fails(3, &parts);

    for (option, parts) in [
        ("--temperature -1", ["--temperature", "0 or more"]),
        ("--temperature nan", ["--temperature", "0 or more"]),
        ("--top-k 0", ["--top-k", "1 or more"]),
        ("--top-p 1.5", ["--top-p", "above 0 to 1"]),
        ("--tokens many", ["many", "--tokens"]),
    ] {
        work.lockstep(&format!("generate --run-dir run --prompt A {option}")).fails(2, &parts);
    }
}

#[test]
fn a_gpu_that_is_not_there_is_not_silently_replaced() {
    if lockstep::torch::has_driver() {
        return not_run("this machine has an NVIDIA driver");
    }
    let work = Workspace::new();
    let parts = ["device: cuda", "no NVIDIA driver", "launch/setup --cuda", "--set device=cpu"];
    work.train("run", "--set device=cuda").fails(2, &parts);
    assert!(!work.path("run/config.yaml").exists());
    // A model trained on a GPU can be used anywhere.
    work.train("run", "--set device=auto").ok();
    let config = fs::read_to_string(work.path("run/config.yaml")).unwrap();
    fs::write(work.path("run/config.yaml"), config.replace("device: auto", "device: cuda")).unwrap();
    work.lockstep("eval --run-dir run").ok();
}

#[test]
fn what_is_no_run_or_no_checkpoint_is_named() {
    let work = Workspace::new();
    work.train("run", "--set train.keep_last=2").ok();
    for verb in ["eval", "generate --prompt A"] {
        let named = |run: &str, more: &str, code: i32, parts: &[&str]| {
            work.lockstep(&format!("{verb} --run-dir {run} {more}")).fails(code, parts)
        };
        named("nowhere", "", 2, &["nowhere is not a run directory", "config.yaml", "lockstep train"]);
        named("run", "--checkpoint step-4", 4, &["--checkpoint step-4", "there are step-8, step-12"]);
        named("run", "--checkpoint newest", 2, &["--checkpoint newest", "best, latest or step-N"]);
    }
    for verb in ["list", "verify"] {
        work.lockstep(&format!("checkpoint {verb} --run-dir data")).fails(4, &["data holds no checkpoint", "train"]);
    }
}

#[test]
fn numbers_that_are_no_longer_finite_stop_the_run() {
    let work = Workspace::new();
    let parts = ["step 2", "the loss is NaN", "not finite: transformer.", "samples: [", "lower optim.lr"];
    work.train("run", "--set optim.lr=1e30").fails(5, &parts);
    let (_, rows) = table(&fs::read_to_string(work.path("run/train.csv")).unwrap());
    assert_eq!(rows.len(), 1);
}

#[test]
fn a_model_beyond_the_memory_is_said_in_one_line() {
    let work = Workspace::new();
    // Some 10^13 weights: beyond any machine's address space that allows a refusal.
    let said = work.train("run", "--set model.n_layer=1024 --set model.n_embd=65536");
    let said = said.fails(2, &["not enough memory", "bytes", "smaller data.micro_batch or model"]);
    assert_eq!(said.stderr.trim_end().lines().count(), 1, "{}", said.stderr);
}
