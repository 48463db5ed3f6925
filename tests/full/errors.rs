//! Mistakes of so many kinds that trying them all takes long. `quick/errors.rs` and `quick/faults.rs` have others.

use std::fs;
use std::process::Stdio;

use crate::common::{finish, numbers, snapshot, table, Workspace};

/// A folder `text` of three splits.
fn corpus(work: &Workspace, splits: [&[u8]; 3]) {
    fs::create_dir_all(work.path("text")).unwrap();
    for (name, text) in ["train", "valid", "test"].into_iter().zip(splits) {
        fs::write(work.path("text").join(format!("wiki.{name}.raw")), text).unwrap();
    }
}

#[test]
fn text_that_cannot_be_prepared_is_refused() {
    let work = Workspace::new();
    let good: &[u8] = b" = Title = \n Some words and more words .\n";
    let refused = |splits: [&[u8]; 3], tokenizer: &str, code: i32, parts: &[&str]| {
        corpus(&work, splits);
        let command = format!("prepare --source text --tokenizer {tokenizer} --out made");
        work.lockstep(&command).fails(code, parts);
        assert!(!work.path("made").exists());
    };
    let bad = [good, b"caf\xe9\n"].concat();
    let place = format!("byte offset {}", good.len() + 3);
    refused([&bad, good, good], "bpe:258", 3, &["text/wiki.train.raw", "UTF-8", &place, "convert"]);
    refused([good, good, &bad], "bpe:258", 3, &["text/wiki.test.raw", "UTF-8", &place, "convert"]);
    refused([good, b"", good], "bpe:258", 3, &["text/wiki.valid.raw", "not a single word"]);
    refused([good, good, good], "bpe:100", 2, &["100", "257"]);
    refused([good, good, good], "bpe:5000", 3, &["at most 28", "5000 were asked for", "fewer"]);
    refused([good, good, good], "gpt3", 2, &["--tokenizer gpt3", "gpt2, bpe:N", "tokenizer.json"]);
    let command = "prepare --tokenizer gpt2 --out made --source";
    work.lockstep(&format!("{command} wikitext-9")).fails(2, &["wikitext-9", "wikitext-103-raw"]);
    fs::remove_file(work.path("text/wiki.test.raw")).unwrap();
    let parts = ["text", "wiki.*.raw", "found wiki.train.raw and wiki.valid.raw without wiki.test.raw"];
    work.lockstep(&format!("{command} text")).fails(3, &parts);
    fs::create_dir(work.path("one")).unwrap();
    work.lockstep(&format!("{command} one")).fails(3, &["one: expected", "*.txt", "found none of them"]);
    fs::write(work.path("one/train.txt"), good).unwrap();
    let parts = ["found train.txt without valid.txt and test.txt", "a single file", "--valid 5%"];
    work.lockstep(&format!("{command} one")).fails(3, &parts);
    let refused = |more: &str, parts: &[&str]| work.lockstep(&format!("{command} {more}")).fails(2, parts);
    refused("one/train.txt", &["--source one/train.txt: nothing is set aside for validation", "--valid 5%"]);
    refused("one/train.txt --valid 60% --test 40%", &["--valid and --test leave nothing to train on"]);
    refused("one/train.txt --valid 5", &["--valid", "a percentage, for example 5%"]);
    refused("text --valid 5%", &["--valid and --test split a file; text has splits of its own"]);
    refused("tiny.yaml --valid 5%", &["--source tiny.yaml", "ends with .txt", "this name says nothing"]);
    refused("none.txt --valid 5%", &["--source none.txt", "there is no such file or folder"]);
    fs::write(work.path("text/wiki.test.raw"), good).unwrap();
    let said = work.lockstep("prepare --tokenizer gpt2 --source text --out text");
    said.fails(2, &["--out ", "/text: expected a new folder", "nothing was touched", "another folder"]);

    // One line of a split is enough for one evaluation, but a text of one token has nothing to predict.
    corpus(&work, [&good.repeat(40), b"a", good]);
    work.lockstep("prepare --source text --tokenizer bpe:258 --out made").ok();
    let said = work.train("run", "--set data.dir=made");
    said.fails(3, &["the validation split", "the split has 1", "more text"]);

    // A byte order mark is not text.
    fs::write(work.path("marked"), "\u{feff}one\n").unwrap();
    let said = work.lockstep("tokenize --tokenizer gpt2 marked").ok().says(&["marked begins with a byte order mark"]);
    assert_eq!(said.stdout, "505\n");
    fs::write(work.path("latin1"), b"one\ntwo\ncaf\xe9\n").unwrap();
    work.lockstep("tokenize --tokenizer gpt2 latin1").fails(3, &["latin1", "UTF-8", "byte 11", "convert"]);
    fs::write(work.path("ids"), "464 2068\n464 x7\n").unwrap();
    work.lockstep("tokenize --tokenizer gpt2 --decode ids").fails(3, &["ids, line 2", "`x7`", "token ids"]);
    fs::write(work.path("ids"), "464 50257\n").unwrap();
    work.lockstep("tokenize --tokenizer gpt2 --decode ids").fails(3, &["ids, line 1", "50257", "0 to 50256"]);
    work.lockstep("tokenize --tokenizer gpt2 none").fails(3, &["none", "No such file"]);
    work.lockstep("tokenize --tokenizer bpe:512 latin1").fails(2, &["--tokenizer bpe:512", "tokenizer.json"]);
}

#[test]
fn a_model_meets_only_the_vocabulary_it_was_trained_with() {
    let work = Workspace::new();
    work.own_data("mine");
    work.train("run", "--set data.dir=mine").ok();
    let before = snapshot(&work.path("run"));
    work.lockstep("-q prepare --source sample --tokenizer bpe:300 --out mine").ok();

    let parts = ["mine", "vocabulary 300", "run", "vocabulary 512", "--tokenizer run/tokenizer.json"];
    work.lockstep("eval --run-dir run").fails(3, &parts);
    let resume = "--set data.dir=mine --set train.steps=14";
    let allowed = format!("{resume} --allow-config-change data.dir");
    let parts = ["mine/tokenizer.json is not the tokenizer", "run/tokenizer.json", "--tokenizer run/tokenizer.json"];
    for resume in [resume, &allowed] {
        work.train("run", resume).fails(3, &parts);
    }
    work.train("new", "--set data.dir=mine --resume run").fails(2, &["other data than mine"]);
    work.train("new", "--set data.dir=mine --set train.init_from=run").fails(3, &parts);
    // The same vocabulary, another text.
    corpus(&work, [&b" The tide comes and goes . \n".repeat(200), b" A tide . \n", b" A tide . \n"]);
    work.lockstep("-q prepare --source text --tokenizer run/tokenizer.json --out mine").ok();
    let parts = ["other data than mine", "SHA-256", "--allow-config-change data.dir"];
    work.train("run", resume).fails(2, &parts);
    assert!(snapshot(&work.path("run")) == before, "a refused command changed the run");
    // The run generates text without its data, and accepts the right data if it is tokenized in the same way.
    work.lockstep("generate --run-dir run --prompt A --tokens 2").ok();
    work.lockstep("-q prepare --source sample --tokenizer run/tokenizer.json --out mine").ok();
    work.lockstep("eval --run-dir run").ok();
    work.train("run", resume).ok().says(&["after 12 steps"]);
}

#[test]
fn a_run_directory_of_another_configuration_is_left_alone() {
    let work = Workspace::new();
    work.trained("run");
    let before = snapshot(&work.path("run"));
    let other = "--set optim.lr=1e-3 --set model.dropout=0.5 --set train.steps=14 --set threads=1";
    let parts = ["optim.lr was 0.0005 and is 0.001", "model.dropout was 0.0 and is 0.5", "--run-dir"];
    let said = work.train("run", other).fails(2, &parts);
    let said = said.says(&["allow it with --allow-config-change model.dropout --allow-config-change optim.lr\n"]);
    assert!(!said.stderr.contains("train.steps was") && !said.stderr.contains("threads was"), "{}", said.stderr);
    let half = format!("{other} --allow-config-change optim.lr");
    let said = work.train("run", &half).fails(2, &["model.dropout was"]);
    assert!(!said.stderr.contains("optim.lr was"), "{}", said.stderr);
    // Allowed, but the checkpoint is not of this model.
    let wider = "--set model.n_embd=64 --allow-config-change model.n_embd";
    work.train("run", wider).fails(4, &["model.safetensors", "[32]", "[64]", "another model"]);
    work.train("run", "--resume never").fails(2, &["run holds checkpoints", "--resume never", "--run-dir"]);
    let misspelt = "--set optim.lr=1e-3 --allow-config-change optim.lrr";
    work.train("run", misspelt).fails(2, &["unknown key `optim.lrr`", "did you mean `optim.lr`"]);
    work.train("run", "--resume nowhere").fails(4, &["nowhere", "neither a checkpoint nor a run directory"]);
    work.train("new", "--resume nowhere").fails(4, &["nowhere", "neither a checkpoint nor a run directory"]);
    assert!(snapshot(&work.path("run")) == before, "a refused command changed the run");

    work.train("run", &format!("{half} --allow-config-change model.dropout")).ok();
    let (_, rows) = table(&fs::read_to_string(work.path("run/train.csv")).unwrap());
    let rates: Vec<&str> = rows.iter().map(|row| &row["lr"][..]).collect();
    assert_eq!(rates, [&["0.0005"; 12][..], &["0.001"; 2]].concat());
    let config = fs::read_to_string(work.path("run/config.yaml")).unwrap();
    assert!(config.contains("dropout: 0.5"), "{config}");
}

#[test]
fn output_that_nobody_takes_is_an_error_and_no_panic() {
    let work = Workspace::new();
    work.trained("run");
    let full = || Stdio::from(fs::File::options().write(true).open("/dev/full").unwrap());
    for verb in [
        "eval --run-dir run",
        "generate --run-dir run --prompt A --tokens 1",
        "checkpoint list --run-dir run",
        "checkpoint verify --run-dir run",
        "tokenize --tokenizer gpt2 tiny.yaml",
        "prepare --source sample --tokenizer bpe:300 --out made",
        "completions bash",
    ] {
        let arguments: Vec<&str> = verb.split(' ').collect();
        let mut command = work.command(&arguments);
        command.stdout(full());
        finish(command).fails(4, &["standard output", "No space left"]);
    }
    let mut silent = work.command(&["eval", "--run-dir", "nowhere"]);
    assert_eq!(silent.stderr(full()).status().unwrap().code(), Some(2));
    // A terminal that is gone does not stop a run.
    let mut command = work.command(&["train", "--config", "tiny.yaml", "--run-dir", "alone"]);
    assert!(command.stderr(full()).stdout(full()).status().unwrap().success());
    assert_eq!(numbers(&work.path("alone/train.csv"), "step").len(), 12);
}
