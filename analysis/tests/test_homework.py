"""homework.py through its command line, on a folder as launch/homework leaves it."""

import itertools
import json

import browser
import pytest
import yaml
from command_line import call
from made_runs import TRAIN_HEADER, make_whole_run, train_row, write_csv

import homework
import plot
from presets import presets

COMPARE_HEADER = "device,world_size,steps,total_s,step_ms_median,tokens_per_s,final_loss,speedup"
CPU = "cpu,1,50,25.0,500.0,12000.0,9.5,1.0"
CUDA = "cuda,1,50,2.5,50.0,120000.0,9.5,10.0"
PROMPTS = ["The best perks", "It is a truth", "The best way", "According to"]


@pytest.fixture
def folder(tmp_path):
    """The homework, done whole, with a GPU."""
    out = tmp_path / "homework"
    run = make_whole_run(out / "gpt-nano")
    write_csv(run / "train.csv", TRAIN_HEADER, [train_row(step, 5.0) for step in (1, 20_000)])
    write_csv(run / "eval.csv", "step,split,loss,ppl", ["20000,valid,4.8,121.5"])
    change(out)
    assert call(plot.main, run).returncode == 0
    write_csv(out / "compare.csv", COMPARE_HEADER, [CPU, CUDA])
    (out / "sentences").mkdir()
    (out / "sentences/train.txt").write_text("aa baa\naa aaa\n")
    for name in ("tokenizer", "data"):
        (out / name).mkdir()
    model = {"merges": ["a a", "Ġ b"]}
    (out / "tokenizer/tokenizer.json").write_text(json.dumps({"model": model}))
    meta = {"source": "wikitext-103-raw", "train": {"tokens": 118_000_000}}
    (out / "data/meta.json").write_text(json.dumps(meta))
    (out / "completions.txt").write_text("\n---\n".join(f" {each} <b>" for each in PROMPTS))
    return out


def change(out, **batch):
    """Writes the run's configuration: the course's, but for these keys of its data."""
    config = yaml.safe_load((homework.ROOT / "configs/homework.yaml").read_text())
    config["model"] |= presets()[config["model"].pop("preset")]
    config["data"] |= {"dir": "elsewhere", **batch}
    (out / "gpt-nano/config.yaml").write_text(yaml.safe_dump(config))


def page_of(folder, *arguments):
    result = call(homework.main, "report", folder, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{folder / 'homework.html'}\n"
    return (folder / "homework.html").read_text()


def test_merges_are_counted_and_shorten_the_first_sentence(folder):
    said = call(homework.main, "merges", folder).stdout.splitlines()
    rows = [line.split() for line in said[-3:]]
    # No merge joins two words, and "aaa" has two pairs of which only one can be joined.
    assert rows[0] == ["none", "6"]
    assert rows[1] == ["1", "a", "+", "a", "aa", "5", "4"]
    assert rows[2] == ["2", "␣", "+", "b", "␣b", "1", "3"]


def test_the_whole_homework_is_compared_with_the_course(folder):
    page = page_of(folder)
    assert page.count('src="data:image/png;base64,') == 2
    assert "CPU</th><td>25.00 s</td><td>137.67 s</td><td>500.0 ms</td>" in page
    assert "GPU</th><td>2.50 s</td><td>11.85 s</td><td>50.0 ms</td>" in page
    assert "The CPU here took 0.18 times as long as the course&#x27;s." in page
    assert "Here the GPU was 10.0 times as fast" in page
    assert "The loss is 0.05 below the course&#x27;s." in page
    assert "not comparable" not in page and "rehearsal" not in page
    for prompt in PROMPTS:
        assert f"<pre> {prompt} &lt;b&gt;</pre>" in page


def test_what_is_not_the_courses_is_said(folder):
    write_csv(folder / "compare.csv", COMPARE_HEADER, [CPU])
    change(folder, batch_size=8)
    meta = {"source": "sample", "train": {"tokens": 9}}
    (folder / "data/meta.json").write_text(json.dumps(meta))
    rows = [train_row(step, 5.0) for step in range(1, 41)]
    write_csv(folder / "gpt-nano/train.csv", TRAIN_HEADER, rows)
    page = page_of(folder, "--minutes", 3)
    assert "GPU</th><td>not measured</td>" in page
    assert "There was no GPU to measure" in page and "the GPU was 10" not in page
    assert "a rehearsal of 3 minutes: 40 steps are what fits" in page
    assert "the text is sample; it is 40 steps long, not 20,000; data.batch_size is 8" in page


@pytest.mark.parametrize(
    "lost", ["gpt-nano/plots/ppl.png", "tokenizer/tokenizer.json", "data/meta.json", "compare.csv"]
)
def test_a_part_that_is_missing_is_named(folder, lost):
    (folder / lost).unlink()
    result = call(homework.main, "report", folder)
    assert result.returncode == 3
    assert result.stderr.startswith("homework: ") and lost in result.stderr
    assert not (folder / "homework.html").exists()


@pytest.mark.full
def test_the_page_is_whole_at_each_width(folder, tmp_path):
    if browser.PROGRAM is None:
        pytest.skip("NOT RUN: no Chromium on PATH")
    page_of(folder)
    with browser.browser(tmp_path / "browser") as page:
        for width, scheme in itertools.product((1280, 390), ("light", "dark")):
            page.open(folder / "homework.html", width, scheme)
            assert page.value("document.documentElement.scrollWidth") == width
            shown = "[...document.images].filter((one) => one.complete && one.naturalWidth).length"
            assert page.value(shown) == 2
        assert {url for url in page.requests if not url.startswith("data:")} == {
            (folder / "homework.html").as_uri()
        }
        assert page.errors == []
