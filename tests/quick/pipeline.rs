//! The whole path through the binary: text, tokens, training, evaluation, generated text, checkpoints.

use std::fs;
use std::process::Stdio;
use std::time::Instant;

use lockstep::run::checkpoint;

use crate::common::alike::assert_learnt_alike;
use crate::common::{flip, numbers, snapshot, table, Workspace};

const TRAIN_COLUMNS: &str =
    "step,tokens,loss,ppl,lr,grad_norm,step_ms,data_ms,compute_ms,comm_exposed_ms,optimizer_ms,\
    tokens_per_s,mfu,memory_mib,world_size,elapsed_s";
const EVAL_COLUMNS: &str = "step,split,loss,ppl,word_ppl,tokens,eval_s,bits_per_byte";

#[test]
fn a_run_directory_holds_what_is_documented() {
    let work = Workspace::new();
    let data: Vec<_> = snapshot(&work.path("data")).into_keys().collect();
    assert_eq!(data, ["meta.json", "test.bin", "tokenizer.json", "train.bin", "valid.bin"]);

    let start = Instant::now();
    let said = work.train("run", "").ok();
    let wall_s = start.elapsed().as_secs_f64();
    assert_eq!(said.stdout, "");
    let run = work.path("run");
    let mut expected: Vec<String> =
        ["best.json", "config.yaml", "eval.csv", "ranks.csv", "tokenizer.json", "train.csv"]
            .into_iter()
            .map(String::from)
            .chain([1, 6, 12].map(|step| format!("samples/step-{step:08}.txt")))
            .collect();
    for step in [4, 8, 12] {
        for file in ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"] {
            expected.push(format!("checkpoints/step-{step:08}/{file}"));
        }
    }
    expected.sort();
    assert_eq!(snapshot(&run).into_keys().collect::<Vec<_>>(), expected);
    assert!(run.join("logs/rank-0000.log").is_file());
    assert!(run.join("heartbeats/node-0000.txt").is_file());

    let (columns, rows) = table(&fs::read_to_string(run.join("train.csv")).unwrap());
    assert_eq!(columns.join(","), TRAIN_COLUMNS);
    assert_eq!(rows.len(), 12);
    let mut elapsed = 0.0;
    for (step, row) in (1..).zip(&rows) {
        assert_eq!(row["step"], step.to_string());
        assert_eq!(row["tokens"], (256 * step).to_string());
        let number = |column: &str| -> f64 {
            row[column].parse().unwrap_or_else(|_| panic!("{column} of step {step} is {:?}", row[column]))
        };
        let parts = ["data_ms", "compute_ms", "comm_exposed_ms", "optimizer_ms"].map(number);
        assert!(parts.iter().all(|&ms| ms >= 0.0) && parts[1] > 0.0, "{parts:?}");
        assert!((parts.iter().sum::<f64>() - number("step_ms")).abs() < 1e-6, "{row:?}");
        // tokens_per_s uses another clock, which includes the time between steps.
        assert!(256e3 / number("tokens_per_s") > number("step_ms") - 0.01, "{row:?}");
        assert!((number("loss").exp() / number("ppl") - 1.0).abs() < 1e-12);
        assert_eq!((number("lr"), number("world_size")), (5e-4, 1.0));
        assert!(number("grad_norm") > 0.0 && number("tokens_per_s") > 0.0 && number("mfu") > 0.0);
        // A process with LibTorch has tens of MiB, and this one far less than a GiB.
        assert!((10.0..1024.0).contains(&number("memory_mib")), "{row:?}");
        assert!(number("elapsed_s") >= elapsed, "{row:?}");
        elapsed = number("elapsed_s");
    }
    let steps_s = numbers(&run.join("train.csv"), "step_ms").iter().sum::<f64>() / 1000.0;
    assert!(elapsed < wall_s && (elapsed - steps_s).abs() < 0.002, "{elapsed} s, steps {steps_s} s, wall {wall_s} s");
    assert!(numbers(&run.join("train.csv"), "loss")[11] < numbers(&run.join("train.csv"), "loss")[0] - 0.05);

    let (columns, rows) = table(&fs::read_to_string(run.join("eval.csv")).unwrap());
    assert_eq!(columns.join(","), EVAL_COLUMNS);
    assert_eq!(rows.iter().map(|row| &row["step"][..]).collect::<Vec<_>>(), ["4", "8", "12"]);
    let meta: serde_json::Value = serde_json::from_slice(&fs::read(work.path("data/meta.json")).unwrap()).unwrap();
    let valid = |field: &str| meta["valid"][field].as_f64().unwrap();
    for row in &rows {
        let number = |column: &str| -> f64 { row[column].parse().unwrap() };
        assert_eq!((&row["split"][..], number("tokens")), ("valid", valid("tokens") - 1.0));
        assert!((number("loss").exp() / number("ppl") - 1.0).abs() < 1e-12);
        let per_word = number("loss") * number("tokens") / (valid("words") + valid("lines"));
        assert!((per_word.exp() / number("word_ppl") - 1.0).abs() < 1e-9);
        assert!(number("eval_s") > 0.0);
        let bits = number("loss") * number("tokens") / 2f64.ln();
        assert!((bits / valid("bytes") / number("bits_per_byte") - 1.0).abs() < 1e-9);
    }
    let best: serde_json::Value = serde_json::from_slice(&fs::read(run.join("best.json")).unwrap()).unwrap();
    assert_eq!((best["step"].as_u64(), best["loss"].to_string()), (Some(12), rows[2]["loss"].clone()));

    let sample = fs::read_to_string(run.join("samples/step-00000012.txt")).unwrap();
    assert!(sample.starts_with(" The river") && sample.len() > 100, "{sample:?}");
    // The resolved configuration gives the same run.
    work.lockstep("train --config run/config.yaml --run-dir again").ok();
    let losses = |run: &str| numbers(&work.path(run).join("train.csv"), "loss");
    assert_eq!(losses("again"), losses("run"));
}

#[test]
fn unknown_is_an_empty_cell_and_rows_follow_log_every() {
    let work = Workspace::new();
    let more = "--set data.layout=paragraphs --set train.loss=sequence_mean --set train.log_every=5";
    work.train("run", more).ok();
    assert_eq!(numbers(&work.path("run/train.csv"), "step"), [5.0, 10.0]);
    let (_, rows) = table(&fs::read_to_string(work.path("run/eval.csv")).unwrap());
    assert_eq!(rows.len(), 3);
    assert!(rows.iter().all(|row| row["word_ppl"].is_empty() && !row["ppl"].is_empty()));
    assert!(rows.iter().all(|row| row["bits_per_byte"].parse::<f64>().unwrap() > 0.0));
}

#[test]
fn eval_prints_the_row_that_the_run_wrote() {
    let work = Workspace::new();
    // After the first evaluation, a rate that ruins the weights, so that evaluation stays the best.
    work.train("run", "--set train.steps=4").ok();
    work.train("run", "--set optim.lr=30 --allow-config-change optim.lr --set train.keep_last=2").ok();
    let (_, written) = table(&fs::read_to_string(work.path("run/eval.csv")).unwrap());
    let evaluate = |more: &str| {
        let (columns, mut rows) = table(&work.lockstep(&format!("eval --run-dir run {more}")).ok().stdout);
        assert_eq!((columns.join(","), rows.len()), (format!("{EVAL_COLUMNS},accuracy"), 1));
        assert!((0.0..1.0).contains(&rows[0].remove("accuracy").unwrap().parse::<f64>().unwrap()));
        assert!(rows[0].remove("eval_s").unwrap().parse::<f64>().unwrap() > 0.0);
        rows.remove(0)
    };
    let row = |number: usize| {
        let mut row = written[number].clone();
        row.remove("eval_s");
        row
    };
    let loss = |number: usize| -> f64 { written[number]["loss"].parse().unwrap() };
    let best = (0..3).min_by(|&a, &b| loss(a).total_cmp(&loss(b))).unwrap();
    assert_ne!(best, 2, "the latest is the best: `latest` and `best` cannot be told apart");
    assert_eq!(evaluate(""), row(best));
    assert_eq!(evaluate("--checkpoint latest"), row(2));
    assert_eq!(evaluate("--checkpoint step-8"), row(1));
    let test = evaluate("--split test");
    assert_eq!((&test["split"], &test["step"]), (&"test".to_string(), &written[best]["step"]));
    assert_ne!(test["tokens"], written[best]["tokens"]);
}

#[test]
fn a_run_begun_by_an_older_version_keeps_its_header() {
    let work = Workspace::new();
    work.train("run", "--set train.steps=4").ok();
    let path = work.path("run/eval.csv");
    let older = fs::read_to_string(&path).unwrap();
    let without_last = |line: &str| line.rsplit_once(',').unwrap().0.to_owned() + "\n";
    let older: String = older.lines().map(without_last).collect();
    fs::write(&path, &older).unwrap();
    work.train("run", "--set train.steps=8").ok();
    let now = fs::read_to_string(&path).unwrap();
    let (columns, rows) = table(&now);
    assert!(now.starts_with(&older), "{now}");
    assert_eq!((columns.join(",") + ",bits_per_byte", rows.len()), (EVAL_COLUMNS.into(), 2));
}

#[test]
fn generated_text_follows_prompt_seed_and_options() {
    let work = Workspace::new();
    work.trained("run");
    let say = |prompts: &[&str], more: &str| {
        let mut arguments = vec!["generate", "--run-dir", "run", "--prompt"];
        arguments.extend(prompts);
        arguments.extend(more.split_whitespace());
        work.run(&arguments).ok().stdout
    };
    let river = say(&[" The river"], "--tokens 20");
    assert!(river.starts_with(" The river") && river.ends_with('\n') && river.len() > 30, "{river:?}");
    assert_eq!(river, say(&[" The river"], "--tokens 20"));
    assert_ne!(river, say(&[" The river"], "--tokens 20 --seed 1"));
    assert_eq!(say(&[" The river"], "--tokens 0"), " The river\n");

    // The likeliest token needs no seed.
    let greedy = say(&[" The river"], "--tokens 20 --temperature 0");
    assert_eq!(greedy, say(&[" The river"], "--tokens 20 --temperature 0 --seed 9"));
    assert_eq!(greedy, say(&[" The river"], "--tokens 20 --top-k 1 --seed 9"));
    assert_eq!(greedy, say(&[" The river"], "--tokens 20 --top-p 1e-9 --seed 9"));

    // Several prompts and samples, grouped by prompt; an empty prompt is allowed too.
    let many = say(&[" The river", ""], "--tokens 20 --samples 2");
    let parts: Vec<&str> = many.trim_end_matches('\n').split("\n---\n").collect();
    assert_eq!(parts.len(), 4, "{many:?}");
    assert_eq!(parts.iter().filter(|part| part.starts_with(" The river")).count(), 2);
    assert!(parts[0] != parts[1] && parts[2] != parts[3] && !parts[2].is_empty());
    assert_eq!(format!("{}\n", parts[0]), river);

    // If a prompt is longer than the block of 32 tokens, only its end counts, but all of it is printed.
    let end = "\n In the valley below the town , the mill turned until the last miller left for the coast .";
    let [one, other] = [" A lamp was lit .", " Nobody knew the way to the harbour ."].map(|start| {
        let prompt = format!("{start}{end}");
        let said = say(&[&prompt], "--tokens 40 --temperature 0");
        said.strip_prefix(&prompt).unwrap_or_else(|| panic!("{said:?}")).to_string()
    });
    assert_eq!(one, other);
    assert_ne!(one, say(&[end], "--tokens 1 --temperature 0"));
}

#[test]
fn text_to_ids_and_back() {
    let work = Workspace::new();
    let text = "Caf\u{e9} \u{65e5}\u{672c} \u{1f680}\t  tabs\r\n\n <unk> @-@ 1,000 <|endoftext|> .\n x\n";
    fs::write(work.path("text"), text).unwrap();
    for tokenizer in ["gpt2", "data/tokenizer.json"] {
        let ids = work.lockstep(&format!("tokenize --tokenizer {tokenizer} text")).ok().stdout;
        assert_eq!(ids.lines().count(), text.lines().count(), "{ids:?}");
        assert_eq!(ids.lines().nth(1), Some(""));
        let numbers = |line: &str| line.split(' ').all(|id| id.parse::<u32>().is_ok());
        assert!(ids.lines().filter(|line| !line.is_empty()).all(numbers), "{ids:?}");
        fs::write(work.path("ids"), &ids).unwrap();
        assert_eq!(work.lockstep(&format!("tokenize --tokenizer {tokenizer} --decode ids")).ok().stdout, text);
        // Standard input, if no file is named.
        let mut command = work.command(&["tokenize", "--tokenizer", tokenizer]);
        command.stdin(Stdio::from(fs::File::open(work.path("text")).unwrap()));
        assert_eq!(crate::common::finish(command).ok().stdout, ids);
    }
    let known = "The quick brown fox jumps over the lazy dog";
    fs::write(work.path("text"), known).unwrap();
    let ids = work.lockstep("tokenize --tokenizer gpt2 text").ok().stdout;
    assert_eq!(ids, "464 2068 7586 21831 18045 625 262 16931 3290\n");
}

#[test]
fn checkpoints_are_listed_and_every_byte_of_them_is_verified() {
    let work = Workspace::new();
    // Small files, since they are read some thousand times.
    work.train("run", "--set model.n_layer=1 --set model.n_embd=4").ok();
    let listed = work.lockstep("checkpoint list --run-dir run").ok().stdout;
    let steps: Vec<&str> = listed.lines().map(|line| line.split('\t').next().unwrap()).collect();
    assert_eq!(steps, ["4", "8", "12"]);
    let verified = work.lockstep("checkpoint verify --run-dir run").ok().stdout;
    assert_eq!(verified.lines().filter(|line| line.contains("\tgood\t")).count(), 3, "{verified}");

    let checkpoint = work.path("run/checkpoints/step-00000008");
    for name in ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"] {
        let path = checkpoint.join(name);
        let size = fs::metadata(&path).unwrap().len() as usize;
        // Every byte of the small files; header, middle and end of the large ones.
        let places: Vec<usize> = if size < 1000 { (0..size).collect() } else { vec![0, 9, size / 2, size - 1] };
        for at in places {
            flip(&path, at);
            assert!(checkpoint::verify(&checkpoint).is_err(), "{name}, byte {at}");
            flip(&path, at);
        }
        checkpoint::verify(&checkpoint).unwrap();
    }
    flip(&checkpoint.join("model.safetensors"), 3000);
    let remedy = "`--resume auto` passes over";
    let output = work.lockstep("checkpoint verify --run-dir run");
    let output = output.fails(4, &["1 of 3", "step-00000008/model.safetensors", "SHA-256", "was written", remedy]);
    assert_eq!(output.stdout.lines().count(), 2);
    fs::remove_file(checkpoint.join("optimizer.safetensors")).unwrap();
    flip(&checkpoint.join("model.safetensors"), 3000);
    work.lockstep("checkpoint verify --run-dir run").fails(4, &["step-00000008/optimizer.safetensors", "No such file"]);
}

#[test]
fn a_finished_run_is_extended_and_a_complete_one_left_alone() {
    let work = Workspace::new();
    work.trained("straight");
    work.train("run", "--set train.steps=8").ok();
    work.train("run", "--set train.steps=12").ok().says(&["resuming", "after 8 steps"]);
    // The first end, after 8 steps, has left an additional sample.
    assert_learnt_alike(&work.path("run"), &work.path("straight"));

    let files = snapshot(&work.path("run"));
    let straight = snapshot(&work.path("straight"));
    for name in ["config.yaml", "samples/step-00000012.txt"] {
        assert!(files[name] == straight[name], "{name}");
    }
    work.train("run", "").ok().says(&["complete", "12 steps", "--set train.steps=N"]);
    assert!(snapshot(&work.path("run")) == files);
}

#[test]
fn a_run_goes_on_with_its_own_configuration_and_keeps_the_one_it_leaves() {
    let work = Workspace::new();
    work.trained("straight");
    work.train("run", "--set train.steps=8").ok();
    work.lockstep("train --run-dir run --set train.steps=12").ok().says(&["train.steps 8 -> 12 from step 8"]);
    assert_learnt_alike(&work.path("run"), &work.path("straight"));
    // That changes how long the run learns, but not what.
    assert!(!work.path("run/config.step-00000008.yaml").exists());

    let until = fs::read(work.path("run/config.yaml")).unwrap();
    let more = "train --run-dir run --set train.steps=14 --set optim.lr=1e-4";
    work.lockstep(more).fails(2, &["optim.lr was", "--allow-config-change optim.lr"]);
    assert!(fs::read(work.path("run/config.yaml")).unwrap() == until);
    let said = work.lockstep(&format!("{more} --allow-config-change optim.lr")).ok();
    said.says(&["-> 0.0001 from step 12", "train.steps 12 -> 14 from step 12"]);
    assert!(fs::read(work.path("run/config.step-00000012.yaml")).unwrap() == until);
    let lr = work.lockstep("config --run-dir run --print optim.lr").ok().stdout;
    assert_eq!(lr, "0.0001\n");

    work.lockstep("train").fails(2, &["--config <CONFIG>"]);
    work.lockstep("train --run-dir none").fails(2, &["--run-dir none: expected a run to go on with", "--config FILE"]);
    let whole = fs::read_to_string(work.path("run/config.yaml")).unwrap();
    fs::write(work.path("run/config.yaml"), &whole[..whole.len() - 5]).unwrap();
    work.lockstep("train --run-dir run").fails(4, &["run/config.yaml is cut short"]);
}

#[test]
fn a_length_in_tokens_or_epochs_becomes_steps_that_a_resumed_run_keeps() {
    let work = Workspace::new();
    let sizes = |run: &str| {
        let config = fs::read_to_string(work.path(run).join("config.yaml")).unwrap();
        let line = config.lines().find_map(|line| line.strip_prefix("  steps: ")).unwrap().to_owned();
        assert!(config.contains("\n  tokens: null\n  epochs: null\n"), "{config}");
        let tokens = numbers(&work.path(run).join("train.csv"), "tokens");
        (line, tokens.len(), tokens.last().copied().unwrap())
    };
    // 256 targets a step.
    work.train("run", "--set train.tokens=2K").ok().says(&["train.tokens 2000", "8 steps"]);
    assert_eq!(sizes("run"), ("8".into(), 8, 2048.0));
    // The same length is complete, a longer one goes on, whatever it is given in.
    work.train("run", "--set train.tokens=2_048").ok().says(&["complete", "8 steps"]);
    work.train("run", "--set train.tokens=2049").ok().says(&["resuming", "after 8 steps"]);
    assert_eq!(sizes("run"), ("9".into(), 9, 2304.0));
    work.train("run", "").ok().says(&["resuming", "after 9 steps"]);
    assert_eq!(sizes("run"), ("12".into(), 12, 3072.0));
    work.trained("straight");
    let losses = |run: &str| numbers(&work.path(run).join("train.csv"), "loss");
    assert_eq!(losses("run"), losses("straight"));

    // Lines alone have as many targets as they have.
    let lines = "--set data.layout=paragraphs --set data.batch_size=64 --set train.eval_every=0 --set model.n_embd=4";
    work.train("lines", &format!("{lines} --set train.tokens=9K")).ok();
    let counted = numbers(&work.path("lines/train.csv"), "tokens");
    assert!(
        counted.len() > 2 && counted[counted.len() - 1] >= 9000.0 && counted[counted.len() - 2] < 9000.0,
        "{counted:?}"
    );
    work.train("epoch", &format!("{lines} --set train.epochs=1")).ok().says(&["train.epochs 1"]);
    let (steps, ..) = sizes("epoch");
    let read = numbers(&work.path("epoch/train.csv"), "tokens");
    assert_eq!(steps, read.len().to_string());
}

#[test]
fn a_run_may_begin_with_the_weights_of_another() {
    let work = Workspace::new();
    work.trained("first");
    let (_, rows) = table(&fs::read_to_string(work.path("first/eval.csv")).unwrap());
    // The steps are too small to change any weight, so the evaluation shows what the run began with.
    for (run, from, row) in [("second", "first", 2), ("third", "first/checkpoints/step-00000004", 0)] {
        let more = "--set optim.lr=1e-30 --set train.steps=1 --set train.eval_every=1";
        let said = work.train(run, &format!("{more} --set train.init_from={from}")).ok();
        let (_, evaluated) = table(&fs::read_to_string(work.path(run).join("eval.csv")).unwrap());
        assert_eq!((&evaluated[0]["step"][..], &evaluated[0]["loss"]), ("1", &rows[row]["loss"]));
        assert_eq!(numbers(&work.path(run).join("train.csv"), "tokens"), [256.0]);
        said.says(&["beginning with the weights of first"]);
    }
    work.train("fourth", "--set train.init_from=nowhere").fails(4, &["train.init_from", "nowhere", "neither"]);
    let more = "--set train.init_from=first --set model.n_embd=64";
    work.train("fifth", more).fails(4, &["transformer.", "[32]", "[64]", "another model"]);
    for refused in ["fourth", "fifth"] {
        assert!(!work.path(refused).join("config.yaml").exists(), "{refused}");
    }
}
