//! `eval` against plain arithmetic: each token's probability from a whole row of logits, one context at a time, in fp64.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;

use lockstep::config::Config;
use lockstep::model::Gpt;
use lockstep::run::checkpoint;
use lockstep::tokenizer::Tokenizer;
use tch::{Device, Kind, Tensor};

use crate::common::{table, Workspace};

/// `data.block_size` of `tiny.yaml`.
const BLOCK: usize = 32;

const TEXT: &str = " A short line before the first article , with a comma .\n \n = The river = \n \n The river was wide , and \
    the town on its banks was old . In the spring of 1905 the water rose above the bridge , and the people who lived near \
    the mill left their houses for the hills .\n \n = = Caf\u{e9} = = \n \n Nobody came .\n \n = A lamp , and \u{65e5}\u{672c} \
    = \n \n It was lit every evening by the same old man , who knew the way to the harbour better than anybody else did .\n";

/// The sums over some targets: negative log-likelihood, targets, targets that were likeliest.
type Sums = (f64, f64, f64);

struct Plain {
    model: Gpt,
    tokenizer: Tokenizer,
}

impl Plain {
    fn of(work: &Workspace, run: &str) -> Self {
        let config = Config::load(&work.path(run).join("config.yaml"), &[]).unwrap();
        let tokenizer = Tokenizer::from_file(&work.path(run).join("tokenizer.json")).unwrap();
        let shape = config.validate(1).unwrap().shape(tokenizer.vocab_size());
        let mut model = Gpt::new(shape, Device::Cpu, Kind::Float);
        let path = work.path(run).join("checkpoints/step-00000012");
        checkpoint::load_model(&path, &mut model.parameters).unwrap();
        Self { model, tokenizer }
    }

    fn add(&self, sums: &mut Sums, ids: &[u32], context: Range<usize>) {
        let target = i64::from(ids[context.end]);
        let context: Vec<i64> = ids[context].iter().map(|&id| i64::from(id)).collect();
        let hidden = self.model.hidden(&Tensor::from_slice(&context).unsqueeze(0), None);
        let logits = self.model.logits(&hidden).get(0).get(context.len() as i64 - 1).to_kind(Kind::Double);
        sums.0 -= logits.log_softmax(0, Kind::Double).double_value(&[target]);
        sums.1 += 1.0;
        sums.2 += f64::from(u8::from(logits.argmax(None, false).int64_value(&[]) == target));
    }

    /// One stream under a window that slides by `stride`: the sums over the targets among these tokens.
    fn sliding(&self, ids: &[u32], stride: usize, targets: Range<usize>) -> Sums {
        let mut sums = Sums::default();
        for target in targets.start.max(1)..targets.end {
            // The first window that reaches the target.
            let window = target.saturating_sub(BLOCK).div_ceil(stride);
            self.add(&mut sums, ids, window * stride..target);
        }
        sums
    }

    fn lines(&self, text: &str) -> Sums {
        let mut sums = Sums::default();
        for line in text.split_inclusive('\n') {
            for piece in self.tokenizer.encode(line).chunks(BLOCK) {
                (1..piece.len()).for_each(|target| self.add(&mut sums, piece, 0..target));
            }
        }
        sums
    }
}

fn evaluate(work: &Workspace, more: &str) -> BTreeMap<String, String> {
    let (columns, mut rows) = table(&work.lockstep(&format!("eval --checkpoint latest {more}")).ok().stdout);
    let expected = "step,split,loss,ppl,word_ppl,tokens,eval_s,bits_per_byte,accuracy";
    assert_eq!((columns.join(","), rows.len()), (expected.into(), 1));
    rows.remove(0)
}

fn number(row: &BTreeMap<String, String>, column: &str) -> f64 {
    row[column].parse().unwrap_or_else(|_| panic!("{column} is {:?}", row[column]))
}

#[track_caller]
fn agrees(row: &BTreeMap<String, String>, (nll, tokens, hits): Sums, text: &str, has_words: bool) {
    let close = |column: &str, expected: f64| {
        let found = number(row, column);
        assert!((found / expected - 1.0).abs() < 1e-5, "{column}: {found}, expected {expected}");
    };
    assert_eq!(number(row, "tokens"), tokens);
    close("loss", nll / tokens);
    close("ppl", (nll / tokens).exp());
    close("bits_per_byte", nll / 2f64.ln() / text.len() as f64);
    assert_eq!(number(row, "accuracy"), hits / tokens);
    if has_words {
        let words = text.split_whitespace().count() + text.lines().count();
        close("word_ppl", (nll / words as f64).exp());
    }
}

#[test]
fn a_file_in_blocks_and_under_a_sliding_window() {
    let work = Workspace::new();
    work.trained("run");
    fs::write(work.path("text"), TEXT).unwrap();
    let plain = Plain::of(&work, "run");
    let ids = plain.tokenizer.encode(TEXT);
    assert!(ids.len() > 5 * BLOCK, "{}", ids.len());
    let mut packed = evaluate(&work, "--run-dir run --file text");
    agrees(&packed, plain.sliding(&ids, BLOCK, 0..ids.len()), TEXT, true);
    assert_eq!((&packed["split"][..], &packed["step"][..]), ("text", "12"));
    assert!(number(&packed, "accuracy") > 0.0, "no hit proves nothing");
    let mut losses = vec![number(&packed, "loss")];
    for stride in [BLOCK, 7, 1] {
        let mut slid = evaluate(&work, &format!("--run-dir run --file text --stride {stride}"));
        agrees(&slid, plain.sliding(&ids, stride, 0..ids.len()), TEXT, true);
        if stride == BLOCK {
            // Blocks side by side are a window that slides by its own length.
            slid.remove("eval_s");
            packed.remove("eval_s");
            assert_eq!(slid, packed);
        } else {
            losses.push(number(&slid, "loss"));
        }
    }
    assert!(losses[0] != losses[1] && losses[1] != losses[2], "{losses:?}");
    // A split is read as a file would be.
    let of_split = evaluate(&work, "--run-dir run --split test --stride 16");
    let meta: serde_json::Value = serde_json::from_slice(&fs::read(work.path("data/meta.json")).unwrap()).unwrap();
    assert_eq!(number(&of_split, "tokens"), meta["test"]["tokens"].as_f64().unwrap() - 1.0);
    let bits = number(&of_split, "loss") * number(&of_split, "tokens") / 2f64.ln();
    assert!((bits / meta["test"]["bytes"].as_f64().unwrap() / number(&of_split, "bits_per_byte") - 1.0).abs() < 1e-9);
}

#[test]
fn each_line_alone() {
    let work = Workspace::new();
    work.train("run", "--set data.layout=paragraphs --set train.loss=sequence_mean").ok();
    fs::write(work.path("text"), TEXT).unwrap();
    let plain = Plain::of(&work, "run");
    let row = evaluate(&work, "--run-dir run --file text");
    agrees(&row, plain.lines(TEXT), TEXT, false);
    assert_eq!(row["word_ppl"], "");
    work.lockstep("eval --run-dir run --stride 8").fails(2, &["--stride 8", "data.layout: packed"]);
}

#[test]
fn documents_share_the_sums_of_the_text() {
    let work = Workspace::new();
    work.trained("run");
    fs::write(work.path("text"), TEXT).unwrap();
    let plain = Plain::of(&work, "run");
    let ids = plain.tokenizer.encode(TEXT);
    evaluate(&work, "--run-dir run --file text --stride 9 --by-document documents.csv");
    let (columns, rows) = table(&fs::read_to_string(work.path("documents.csv")).unwrap());
    let expected = "document,title,first_line,lines,words,bytes,tokens,loss,ppl,bits_per_byte,accuracy";
    assert_eq!(columns.join(","), expected);
    let starts = ["", " = The river", " = A lamp"].map(|start| TEXT.find(start).unwrap());
    let titles = ["", "The river", "A lamp , and \u{65e5}\u{672c}"];
    let ends = [&starts[1..], &[TEXT.len()]].concat();
    assert_eq!(rows.len(), 3);
    for (number_of, (row, (start, end))) in rows.iter().zip(starts.into_iter().zip(ends)).enumerate() {
        let tokens = |end: usize| plain.tokenizer.encode(&TEXT[..end]).len();
        agrees(row, plain.sliding(&ids, 9, tokens(start)..tokens(end)), &TEXT[start..end], false);
        assert_eq!((number(row, "document"), &row["title"][..]), (number_of as f64 + 1.0, titles[number_of]));
        assert_eq!(number(row, "first_line"), TEXT[..start].lines().count() as f64 + 1.0);
        assert_eq!(number(row, "lines"), TEXT[start..end].lines().count() as f64);
        assert_eq!(number(row, "words"), TEXT[start..end].split_whitespace().count() as f64);
        assert_eq!(number(row, "bytes"), (end - start) as f64);
    }
}

#[test]
fn what_cannot_be_evaluated_is_refused() {
    let work = Workspace::new();
    work.trained("run");
    fs::write(work.path("empty"), " \n\n").unwrap();
    fs::write(work.path("latin1"), b"caf\xe9\n").unwrap();
    for (more, code, parts) in [
        ("--stride 0", 2, &["--stride 0", "1 to the run's data.block_size, 32"][..]),
        ("--stride 33", 2, &["--stride 33", "1 to the run's data.block_size, 32"]),
        ("--file text --split test", 2, &["--file", "--split"]),
        ("--file nowhere", 3, &["nowhere", "No such file"]),
        ("--file empty", 3, &["empty", "not a single word"]),
        ("--file latin1", 3, &["latin1", "UTF-8", "0xe9"]),
        ("--by-document nowhere/documents.csv", 2, &["nowhere/documents.csv", "there is no folder nowhere"]),
    ] {
        work.lockstep(&format!("eval --run-dir run {more}")).fails(code, parts);
    }
}
