//! `export` and `import` against the real `transformers`: logits, greedy text and ids are the same on both sides.
//!
//! The tests install `transformers` for themselves. PyTorch is the one of `.venv`, whose Python part `launch/setup --cpu`
//! leaves without the libraries of CUDA that it is linked with: empty ones take their place, since nothing calls them.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use lockstep::model::generate::{generate, Sampling};
use lockstep::model::Gpt;
use lockstep::run::{checkpoint, find_checkpoint, RunDir};
use lockstep::tokenizer::Tokenizer;
use safetensors::SafeTensors;
use serde_json::{json, Value};
use tch::{Device, Kind, Tensor};

use crate::common::documents::root;
use crate::common::{not_run, Workspace};

const TRANSFORMERS: &str = "4.57.1";
/// What the Python part of PyTorch imports besides.
const OF_TORCH: [&str; 4] = ["typing-extensions>=4.10", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2"];

/// Python with `transformers`.
struct Python {
    packages: PathBuf,
    /// Stand-ins for libraries.
    empty: PathBuf,
}

impl Python {
    /// Installed once; `None` if that is impossible here, which is said.
    fn get() -> Option<&'static Self> {
        static MADE: OnceLock<Result<Python, String>> = OnceLock::new();
        MADE.get_or_init(Self::install).as_ref().map_err(|reason| not_run(reason)).ok()
    }

    fn install() -> Result<Self, String> {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("transformers-{TRANSFORMERS}"));
        let made = Self { packages: folder.join("packages"), empty: folder.join("empty") };
        if !folder.exists() {
            let partial = folder.with_extension("part");
            let _ = fs::remove_dir_all(&partial);
            let mut pip = plain_python();
            pip.args(["-m", "pip", "install", "--quiet", "--retries", "1", "--target"]).arg(partial.join("packages"));
            pip.arg(format!("transformers=={TRANSFORMERS}")).args(OF_TORCH);
            said(pip).map_err(|e| format!("transformers {TRANSFORMERS} cannot be installed: {e}"))?;
            make_empty_libraries(&partial.join("empty"))?;
            fs::rename(&partial, &folder).map_err(|e| e.to_string())?;
        }
        let mut first = made.command();
        first.args(["-c", "import sys, os; sys.setdlopenflags(os.RTLD_LAZY); import torch, transformers"]);
        said(first).map_err(|e| format!("PyTorch or transformers cannot be imported: {e}"))?;
        Ok(made)
    }

    fn command(&self) -> Command {
        let mut libraries = self.empty.clone().into_os_string();
        if let Some(others) = env::var_os("LD_LIBRARY_PATH") {
            libraries.push(":");
            libraries.push(others);
        }
        let mut command = plain_python();
        command.env("PYTHONPATH", &self.packages).env("LD_LIBRARY_PATH", libraries).env("HF_HUB_OFFLINE", "1");
        command
    }

    /// Lets `hugging_face.py` carry out orders.
    fn carry_out(&self, verb: &str, work: &Workspace, orders: &[Value]) {
        let path = work.path("orders.json");
        fs::write(&path, json!(orders).to_string()).unwrap();
        let mut command = self.command();
        command.arg(root().join("tests/full/hugging_face.py")).arg(verb).arg(path);
        said(command).unwrap();
    }
}

fn plain_python() -> Command {
    let mut command = Command::new("timeout");
    command.arg("600").arg(root().join(".venv/bin/python")).env("OMP_NUM_THREADS", "1");
    command
}

/// What a command prints; the end of its complaint, if it fails.
fn said(mut command: Command) -> Result<String, String> {
    let output = command.output().map_err(|e| e.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stderr).lines().rev().take(20).collect::<Vec<_>>().join(" < ")),
    }
}

/// A library of nothing for each that PyTorch's Python part is linked with and that is not there.
fn make_empty_libraries(folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|e| e.to_string())?;
    let mut find = plain_python();
    find.args(["-c", "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"]);
    let torch = said(find).map_err(|e| format!("there is no PyTorch in .venv: {e}"))?;
    let mut ldd = Command::new("ldd");
    ldd.arg(Path::new(torch.trim()).join("lib/libtorch_python.so"));
    for name in said(ldd)?.lines().filter_map(|line| line.trim().strip_suffix(" => not found")) {
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-x", "c", "/dev/null", "-o"]).arg(folder.join(name)).arg(format!("-Wl,-soname,{name}"));
        said(cc)?;
    }
    Ok(())
}

/// A run's newest model, and its tokenizer.
fn load(run: &Path) -> (Gpt, Tokenizer) {
    let dir = RunDir(run.to_path_buf());
    let tokenizer = Tokenizer::from_file(&dir.tokenizer()).unwrap();
    let plan = dir.load_config().unwrap().validate(1).unwrap();
    let mut model = Gpt::new(plan.shape(tokenizer.vocab_size()), Device::Cpu, Kind::Float);
    checkpoint::load_model(&find_checkpoint(run).unwrap(), &mut model.parameters).unwrap();
    (model, tokenizer)
}

/// Texts of one line, as training reads them, and of several; what is no letter; and nothing.
const TEXTS: [&str; 6] = [
    " The river is wide .\n",
    " = Title =\n\n The old mill , 1901 – 1902 ,\n \n\n  two spaces\tand a tab\n",
    "Smörgåsbord, 東京, 🦀!",
    "it's they'll WE'RE",
    "   \n",
    "",
];
const LENGTH: i64 = 20;

/// A run and a folder that must be the same model, but for the rounding of bf16.
struct Pair {
    run: String,
    folder: String,
    is_rounded: bool,
}

impl Pair {
    fn new(run: &str, folder: &str) -> Self {
        Self { run: run.into(), folder: folder.into(), is_rounded: false }
    }
}

/// Asserts that each folder computes and reads what its run does.
fn assert_alike(python: &Python, work: &Workspace, pairs: &[Pair]) {
    let (mut orders, mut expected) = (Vec::new(), Vec::new());
    for (number, Pair { run, folder, .. }) in pairs.iter().enumerate() {
        let (model, tokenizer) = load(&work.path(run));
        let id = |place: i64| place * 7919 % model.shape.vocab_size;
        let inputs: Vec<Vec<i64>> = (0..3).map(|row| (0..LENGTH).map(|t| id(row * LENGTH + t)).collect()).collect();
        let (prompt, answer) = (tokenizer.encode(" The river"), work.path(&format!("answer-{number}.json")));
        orders.push(json!({"folder": work.path(folder), "inputs": inputs, "texts": TEXTS, "prompt": prompt,
            "tokens": 64, "answer": answer}));
        expected.push((model, tokenizer, Tensor::from_slice2(&inputs), prompt, answer));
    }
    python.carry_out("read", work, &orders);
    for (Pair { folder, is_rounded, .. }, (model, tokenizer, inputs, prompt, answer)) in pairs.iter().zip(expected) {
        let logits = model.logits(&model.hidden(&inputs, None));
        let bytes = fs::read(answer.with_extension("safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let theirs = Tensor::from_data_size(file.tensor("logits").unwrap().data(), &logits.size(), Kind::Float);
        let norm = |tensor: &Tensor| tensor.to_kind(Kind::Double).norm().double_value(&[]);
        let distance = norm(&(&logits - &theirs)) / norm(&theirs);
        println!("{folder}: logits differ by {distance:.1e} of their norm");
        assert!(distance < if *is_rounded { 1e-2 } else { 1e-5 }, "{folder}: {distance:e}");

        let said: Value = serde_json::from_slice(&fs::read(&answer).unwrap()).unwrap();
        let ids: Vec<Vec<u32>> = TEXTS.iter().map(|text| tokenizer.encode(text)).collect();
        assert_eq!(said["ids"], json!(ids), "{folder}");
        assert_eq!(said["texts"], json!(TEXTS), "{folder}");
        let end = tokenizer.end_of_text();
        assert_eq!(said["special"], json!([end, end, end]), "{folder}");
        if !is_rounded {
            let greedy = Sampling { temperature: 0.0, top_k: None, top_p: None, seed: 0 };
            assert_eq!(
                said["greedy"],
                json!(generate(&model, &[prompt], 64, &greedy, end, Kind::Float)[0]),
                "{folder}"
            );
        }
    }
}

/// Every tensor of a folder's safetensors files, by its name.
fn tensors(folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "safetensors") {
            let bytes = fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                all.insert(name, (view.shape().to_vec(), view.data().to_vec()));
            }
        }
    }
    all
}

#[test]
fn an_exported_run_is_the_same_model_in_transformers() {
    let Some(python) = Python::get() else { return };
    let work = Workspace::new();
    let cases = [
        ("one-head", "{n_layer: 1, n_head: 1, n_embd: 36}"),
        ("square", "{n_layer: 3, n_head: 3, n_embd: 48, dropout: 0.1}"),
        ("untied", "{n_layer: 2, n_head: 5, n_embd: 40, tied_head: false}"),
        ("relu-nobias", "{n_layer: 2, n_head: 2, n_embd: 34, activation: relu, bias: false}"),
    ];
    let mut pairs = Vec::new();
    for (name, model) in cases {
        // Steps so long that norms and biases move, too.
        let text = format!(
            "name: {name}\ndevice: cpu\ndata: {{dir: data, block_size: 96, batch_size: 4}}\nmodel: {model}\n\
             optim: {{lr: 0.02}}\ntrain: {{steps: 12, eval_every: 0}}\n"
        );
        fs::write(work.path("case.yaml"), text).unwrap();
        work.lockstep(&format!("-q train --config case.yaml --run-dir {name}")).ok();
        work.lockstep(&format!("export --run-dir {name} --out hf-{name}")).ok();
        pairs.push(Pair::new(name, &format!("hf-{name}")));
    }
    work.lockstep("export --run-dir square --out hf-bf16 --dtype bf16").ok();
    pairs.push(Pair { is_rounded: true, ..Pair::new("square", "hf-bf16") });
    assert_alike(python, &work, &pairs);
}

#[test]
fn a_gpt2_that_transformers_wrote_is_the_same_model_here() {
    let Some(python) = Python::get() else { return };
    let work = Workspace::new();
    work.trained("run");
    work.lockstep("export --run-dir run --out tokenizer").ok();
    let small = json!({"n_layer": 2, "n_head": 3, "n_embd": 42, "n_positions": 100});
    let one_head = json!({"n_layer": 1, "n_head": 1, "n_embd": 36, "n_positions": 90, "activation_function": "relu",
        "tie_word_embeddings": false});
    let cases = [
        ("single", &small, "1GB", "float32", false),
        ("one-head", &one_head, "1GB", "float32", false),
        ("sharded", &small, "60KB", "float32", false),
        ("half", &small, "1GB", "float16", false),
        ("bf16", &small, "1GB", "bfloat16", false),
        ("old", &small, "1GB", "float32", true),
    ];
    let recipes = cases.map(|(name, config, shard, dtype, old)| {
        json!({"folder": work.path(&format!("hf-{name}")), "config": config, "shard": shard, "dtype": dtype, "old": old,
            "tokenizer": work.path("tokenizer")})
    });
    python.carry_out("make", &work, &recipes);
    let mut pairs = Vec::new();
    for (name, _, _, dtype, _) in cases {
        let (theirs, ours, again) = (format!("hf-{name}"), format!("run-{name}"), format!("again-{name}"));
        assert_eq!(work.path(&theirs).join("model.safetensors.index.json").exists(), name == "sharded");
        work.lockstep(&format!("import --from {theirs} --out {ours}")).ok();
        let precision = if dtype == "bfloat16" { "bf16" } else { "fp32" };
        work.lockstep(&format!("export --run-dir {ours} --out {again} --dtype {precision}")).ok();
        // fp16 was widened, and the oldest form has other names.
        if !["half", "old"].contains(&name) {
            assert!(tensors(&work.path(&theirs)) == tensors(&work.path(&again)), "{name}");
        }
        pairs.extend([Pair::new(&ours, &theirs), Pair::new(&ours, &again)]);
    }
    assert_alike(python, &work, &pairs);
}
