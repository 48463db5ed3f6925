//! `export` and `import` without Python: names and orientation, round trips bit for bit, and what is refused.
//! `tests/full/hugging_face.rs` has the real `transformers` on the other side.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{json, Value};

use crate::common::{snapshot, table, Workspace};

/// fp32 tensors by name: shape and bytes.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap().tensors();
    all.into_iter().map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec()))).collect()
}

fn write(path: &Path, tensors: &Tensors, dtype: Dtype) {
    let views: Vec<(&String, TensorView)> = tensors
        .iter()
        .map(|(name, (shape, bytes))| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()))
        .collect();
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn transposed((shape, bytes): &(Vec<usize>, Vec<u8>)) -> (Vec<usize>, Vec<u8>) {
    let (rows, columns) = (shape[0], shape[1]);
    let element = |row: usize, column: usize| &bytes[4 * (row * columns + column)..][..4];
    let turned = (0..columns).flat_map(|column| (0..rows).flat_map(move |row| element(row, column)).copied());
    (vec![columns, rows], turned.collect())
}

/// `run`, trained, and `hf`, its export.
fn exported() -> Workspace {
    let work = Workspace::new();
    work.trained("run");
    work.lockstep("export --run-dir run --out hf").ok().reports(&[
        "hf: ",
        "parameters, vocabulary 512",
        "step-00000012",
    ]);
    work
}

/// Changes a key of a folder's `config.json`.
fn set(config: &Path, key: &str, value: Value) {
    let mut all: Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    all[key] = value;
    fs::write(config, all.to_string()).unwrap();
}

#[test]
fn an_export_has_gpt2s_names_and_orientation() {
    let work = exported();
    let files: Vec<String> = snapshot(&work.path("hf")).into_keys().collect();
    let expected = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(files, expected);

    let ours = read(&work.path("run/checkpoints/step-00000012/model.safetensors"));
    let theirs = read(&work.path("hf/model.safetensors"));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    let linear = |name: &str| ["c_attn", "c_proj", "c_fc"].iter().any(|part| name.ends_with(&format!("{part}.weight")));
    let mut turned = 0;
    for (name, tensor) in &ours {
        match linear(name) {
            true => assert!(theirs[name] == transposed(tensor), "{name}"),
            false => assert!(theirs[name] == *tensor, "{name}"),
        }
        turned += usize::from(linear(name));
    }
    assert_eq!(turned, 8);
    assert_eq!(theirs["transformer.h.0.attn.c_attn.weight"].0, [32, 96]);

    let config: Value = serde_json::from_slice(&fs::read(work.path("hf/config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("model_type", json!("gpt2")),
        ("n_positions", json!(32)),
        ("vocab_size", json!(512)),
        ("activation_function", json!("gelu_new")),
        ("tie_word_embeddings", json!(true)),
        ("layer_norm_epsilon", json!(1e-5)),
        ("eos_token_id", json!(0)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert!(fs::read(work.path("hf/tokenizer.json")).unwrap() == fs::read(work.path("run/tokenizer.json")).unwrap());

    let card = fs::read_to_string(work.path("hf/README.md")).unwrap();
    let (_, rows) = table(&fs::read_to_string(work.path("run/eval.csv")).unwrap());
    let loss: f64 = rows[2]["loss"].parse().unwrap();
    for part in
        ["| training steps | 12 |", "| training tokens | 3072 |", "bpe:512", &format!("{loss:.4}"), "n_embd: 32"]
    {
        assert!(card.contains(part), "no {part:?} in {card}");
    }
}

#[test]
fn an_export_of_an_import_of_an_export_has_the_same_bits() {
    let work = exported();
    work.lockstep("import --from hf --out again").ok().says(&["--tokenizer again/tokenizer.json --out data/again"]);
    work.lockstep("checkpoint verify --run-dir again").ok();
    work.lockstep("export --run-dir again --checkpoint latest --out hf2").ok();
    let (first, second) = (snapshot(&work.path("hf")), snapshot(&work.path("hf2")));
    for (name, bytes) in first.iter().filter(|(name, _)| *name != "README.md") {
        assert!(second[name] == *bytes, "{name}");
    }
    // In bf16 they are the same once rounded.
    work.lockstep("export --run-dir run --out half --dtype bf16").ok();
    work.lockstep("import --from half --out widened").ok();
    work.lockstep("export --run-dir widened --out half2 --dtype bf16").ok();
    let [half, half2, whole] = ["half", "half2", "hf"].map(|folder| work.path(folder).join("model.safetensors"));
    assert!(fs::read(&half).unwrap() == fs::read(half2).unwrap());
    assert!(half.metadata().unwrap().len() < whole.metadata().unwrap().len() * 6 / 10);
    let left = fs::read_dir(work.path("")).unwrap().flatten();
    let left: Vec<_> = left.filter(|entry| entry.file_name().to_string_lossy().contains("lockstep-partial")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn an_imported_run_evaluates_generates_and_begins_a_training() {
    let work = exported();
    work.lockstep("import --from hf --out again").ok();
    assert!(work.lockstep("runs --csv again").ok().stdout.contains("again,imported,0,,,,,0,"));
    let config = fs::read_to_string(work.path("again/config.yaml")).unwrap();
    fs::write(work.path("again/config.yaml"), config.replace("dir: data/again", "dir: data")).unwrap();
    let loss = |run: &str| {
        let (_, rows) = table(&work.lockstep(&format!("eval --run-dir {run} --split test")).ok().stdout);
        rows[0]["loss"].parse::<f64>().unwrap()
    };
    // Not to the last bit: an imported run chooses its own micro-batch.
    assert!((loss("again") / loss("run") - 1.0).abs() < 1e-9);
    let text =
        |run| work.run(&["generate", "--run-dir", run, "--prompt", " The river", "--temperature", "0"]).ok().stdout;
    assert_eq!(text("again"), text("run"));

    let begin =
        |run: &str, more: &str| work.train(run, &format!("--set train.init_from=again --set train.steps=1 {more}"));
    begin("tuned", "").ok().says(&["beginning with the weights of again"]);
    begin("short", "--set data.block_size=16").ok().says(&["of its 32 positions, the first 16 are used"]);
    begin("long", "--set data.block_size=64").fails(4, &["has 32 positions", "data.block_size is 64", "at most 32"]);
    let parts = ["imported weights", "--set train.init_from=again/checkpoints/step-00000000"];
    work.train("again", "").fails(2, &parts);
    work.train("other", "--resume again").fails(2, &parts);
}

#[test]
fn an_import_reads_shards_bare_names_masks_and_a_tied_head() {
    let work = exported();
    let expected = read(&work.path("hf/model.safetensors"));
    let mut bare: Tensors =
        expected.iter().map(|(name, x)| (name.trim_start_matches("transformer.").to_owned(), x.clone())).collect();
    bare.insert("lm_head.weight".into(), expected["transformer.wte.weight"].clone());
    bare.insert("h.0.attn.bias".into(), (vec![1, 1, 2, 2], vec![0; 16]));
    bare.insert("h.1.attn.masked_bias".into(), (vec![], vec![0; 4]));
    fs::remove_file(work.path("hf/model.safetensors")).unwrap();
    let mut map = HashMap::new();
    for part in 0..3 {
        let file = format!("model-0000{}-of-00003.safetensors", part + 1);
        let some = bare.iter().enumerate().filter(|(at, _)| at % 3 == part);
        let some: Tensors = some.map(|(_, (name, x))| (name.clone(), x.clone())).collect();
        map.extend(some.keys().map(|name| (name.clone(), file.clone())));
        write(&work.path("hf").join(&file), &some, Dtype::F32);
    }
    let index = work.path("hf/model.safetensors.index.json");
    fs::write(&index, json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    // The older pair of files.
    let tokenizer: Value = serde_json::from_slice(&fs::read(work.path("hf/tokenizer.json")).unwrap()).unwrap();
    let merges: Vec<&str> = tokenizer["model"]["merges"].as_array().unwrap().iter().flat_map(Value::as_str).collect();
    fs::write(work.path("hf/merges.txt"), format!("#version: 0.2\n{}\n", merges.join("\n"))).unwrap();
    fs::write(work.path("hf/vocab.json"), tokenizer["model"]["vocab"].to_string()).unwrap();
    fs::remove_file(work.path("hf/tokenizer.json")).unwrap();

    work.lockstep("import --from hf --out again").ok();
    work.lockstep("export --run-dir again --out hf2").ok();
    assert!(read(&work.path("hf2/model.safetensors")) == expected);
    let same = |name: &str| fs::read(work.path(name)).unwrap() == fs::read(work.path("run/tokenizer.json")).unwrap();
    assert!(same("again/tokenizer.json") && same("hf2/tokenizer.json"));

    fs::remove_file(work.path("hf/model-00002-of-00003.safetensors")).unwrap();
    work.lockstep("import --from hf --out more").fails(4, &["cannot read hf/model-00002-of-00003.safetensors"]);
    fs::write(&index, json!({"weight_map": {"wte.weight": "../run/x.safetensors"}}).to_string()).unwrap();
    work.lockstep("import --from hf --out more").fails(4, &["index.json names", "beside it"]);
    assert!(!work.path("more").exists());
}

#[test]
fn an_import_is_refused_if_the_model_would_be_another() {
    let work = exported();
    let config = work.path("hf/config.json");
    let whole = fs::read(&config).unwrap();
    let refused = |code: i32, parts: &[&str]| {
        work.lockstep("import --from hf --out again").fails(code, parts);
        assert!(!work.path("again").exists());
        fs::write(&config, &whole).unwrap();
    };
    for (key, value, expected) in [
        ("model_type", json!("llama"), "only \"gpt2\""),
        ("n_inner", json!(100), "128, four times n_embd"),
        ("activation_function", json!("gelu"), "gelu_new"),
        ("layer_norm_epsilon", json!(1e-6), "0.00001"),
        ("scale_attn_weights", json!(false), "scaled"),
        ("scale_attn_by_inverse_layer_idx", json!(true), "each layer"),
        ("add_cross_attention", json!(true), "no cross attention"),
        ("vocab_size", json!(600), "the tokenizer beside it has 512 tokens"),
        ("n_head", json!(3), "a multiple of model.n_head"),
    ] {
        set(&config, key, value);
        refused(2, &["hf/config.json", key, expected]);
    }
    for (key, value, parts) in [
        ("n_layer", json!(3), ["lacks `transformer.h.2.", "has"]),
        ("n_layer", json!(1), ["holds `transformer.h.1.", "does not have"]),
        ("n_embd", json!(1 << 16), ["holds `", "65536"]),
        ("n_positions", json!(64), ["`transformer.wpe.weight`", "[64, 32]"]),
        ("tie_word_embeddings", json!(false), ["lacks `lm_head.weight`", "has"]),
    ] {
        set(&config, key, value);
        refused(4, &parts);
    }
    let path = work.path("hf/model.safetensors");
    let mut tensors = read(&path);
    tensors.insert("lm_head.weight".into(), tensors["transformer.wpe.weight"].clone());
    write(&path, &tensors, Dtype::F32);
    refused(4, &["holds `lm_head.weight`, which is not `transformer.wte.weight`"]);
    tensors.remove("lm_head.weight");
    write(&path, &tensors, Dtype::I32);
    refused(4, &["as I32", "F32, BF16 or F16"]);

    fs::rename(&path, work.path("hf/pytorch_model.bin")).unwrap();
    refused(2, &["pytorch_model.bin, a pickle", "python -c", "GPT2LMHeadModel", "from_pretrained('hf')"]);
    fs::remove_file(work.path("hf/pytorch_model.bin")).unwrap();
    refused(2, &["hf has no model.safetensors"]);
    fs::remove_file(work.path("hf/tokenizer.json")).unwrap();
    refused(2, &["has no tokenizer.json, nor vocab.json and merges.txt"]);
    work.lockstep("import --from nowhere --out again").fails(2, &["nowhere/config.json", "name a Hugging Face folder"]);
    work.lockstep("import --from hf --out run").fails(2, &["--out run", "exists already"]);
}

#[test]
fn an_export_is_refused_if_gpt2_cannot_say_it_or_something_is_there() {
    let work = exported();
    let before = snapshot(&work.path("hf"));
    work.lockstep("export --run-dir run --out hf").fails(2, &["--out hf", "exists already", "name a new folder"]);
    assert!(snapshot(&work.path("hf")) == before);
    work.train("post", "--set model.norm=post --set train.steps=1").ok();
    work.lockstep("export --run-dir post --out hf2").fails(2, &["model.norm: post", "only a run with model.norm: pre"]);
    work.lockstep("export --run-dir run --checkpoint step-5 --out hf2").fails(4, &["step-5", "there are step-4"]);
    work.lockstep("export --run-dir nowhere --out hf2").fails(2, &["nowhere is not a run directory"]);
    assert!(!work.path("hf2").exists());

    // What GPT-2 has and the model lacks is zero.
    let more = "--set model.bias=false --set model.tied_head=false --set model.activation=relu --set train.steps=1";
    work.train("bare", more).ok();
    work.lockstep("export --run-dir bare --out hf3").ok();
    let tensors = read(&work.path("hf3/model.safetensors"));
    let zero = |name: &str, width: usize| tensors[name] == (vec![width], vec![0; 4 * width]);
    assert!(zero("transformer.h.1.attn.c_attn.bias", 96) && zero("transformer.h.0.mlp.c_fc.bias", 128));
    assert!(zero("transformer.ln_f.bias", 32) && tensors["lm_head.weight"].0 == [512, 32]);
    assert_eq!(tensors.len(), 2 * 12 + 2 + 3);
    let config = fs::read_to_string(work.path("hf3/config.json")).unwrap();
    assert!(config.contains("\"activation_function\": \"relu\"") && config.contains("\"tie_word_embeddings\": false"));
}
