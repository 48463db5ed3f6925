"""report.py through its command line, on runs made here, and its page in a browser."""

import base64
import hashlib
import itertools
import re
import shutil

import browser
import numpy as np
import pytest
from command_line import call, started
from made_runs import (
    RANKS_HEADER,
    TRAIN_HEADER,
    make_long_run,
    make_run,
    make_whole_run,
    train_row,
    write_csv,
)

import report

# What would make a browser ask for something that is not in the file.
LOADS = re.compile(
    r"(?:src|srcset|action)\s*=|\burl\(|@import|<link|<iframe|\bfetch\(|XMLHttpRequest"
)


def write(*arguments):
    return call(report.main, *arguments)


def page_of(*runs, out=None):
    """The report's text, of runs that can be reported."""
    result = write(*runs, *(("--out", out) if out else ()))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return open(result.stdout.strip(), encoding="utf-8").read()


def refused(*arguments):
    """What report.py says of CSVs that it cannot use: one line, and exit code 3."""
    result = write(*arguments)
    assert result.returncode == 3, result.stderr
    assert result.stderr.startswith("report: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def row(page, name):
    """The cells of a table's row."""
    found = re.search(rf'<th scope="row">{re.escape(name)}</th>(.*?)</tr>', page)
    assert found, f"no row {name}"
    return re.findall("<td>(.*?)</td>", found[1])


@pytest.fixture
def run(tmp_path):
    return make_whole_run(tmp_path / "sample")


def test_a_run_is_reported_in_its_own_folder(run):
    page = page_of(run)
    assert (run / "plots/report.html").read_text() == page
    assert "<title>Report: sample</title>" in page
    assert row(page, "Best validation loss") == ["4.3000"]
    assert row(page, "Its step") == ["200"]
    assert row(page, "Test loss") == ["1.0000"]
    assert row(page, "Restarts") == ["1"]
    assert row(page, "forward and backward pass") == ["6.00 ms, 66.7%"]
    assert row(page, "optim.lr") == ["0.001"]
    assert row(page, "hardware") == ["AMD EPYC"]
    assert " The river runs ." in page
    assert "<h2>Differences</h2>" not in page


def test_ends_restarts_and_slow_ranks_have_their_steps(run):
    found = [(event["kind"], event["step"]) for event in report.events(report.read_runs([run])[0])]
    assert found == [("end", 100), ("restart", 100), ("slow rank", 120)]
    page = page_of(run)
    assert "rank 1 on node-b took 3 times the median&#x27;s time" in page
    assert '"events":[["end",100],["restart",100],["slow rank",120]]' in page


def test_changes_of_the_configuration_have_their_steps(run):
    now = (run / "config.yaml").read_text()
    (run / "config.step-00000050.yaml").write_text(now.replace("lr: 0.001", "lr: 0.004"))
    (run / "config.step-00000100.yaml").write_text(now.replace("lr: 0.001", "lr: 0.002"))
    found = report.events(report.read_runs([run])[0])
    changed = [(event["step"], event["text"]) for event in found if event["kind"] == "change"]
    assert changed == [(50, "optim.lr 0.004 -> 0.002"), (100, "optim.lr 0.002 -> 0.001")]
    assert "optim.lr 0.002 -&gt; 0.001" in page_of(run)
    # One that cannot be read says nothing.
    (run / "config.step-00000100.yaml").write_text("[")
    assert [event["step"] for event in report.changes(run)] == []


def test_several_runs_are_told_apart_by_what_differs(run, tmp_path, monkeypatch):
    other = make_whole_run(tmp_path / "high", lr=0.003)
    monkeypatch.chdir(tmp_path)
    page = page_of(run, other)
    assert (tmp_path / "plots/report.html").is_file()
    between = page[page.index("<h2>Differences</h2>") : page.index("<h2>Curves</h2>")]
    assert row(between, "optim.lr") == ["0.001", "0.003"]
    assert "seed" not in between
    assert row(page, "Steps") == ["200", "200"]


def test_a_run_that_has_only_begun_is_reported(tmp_path):
    run = make_run(tmp_path / "begun")
    (run / "eval.csv").unlink()
    write_csv(run / "train.csv", TRAIN_HEADER, [train_row(1, 7.6)])
    page = page_of(run)
    assert row(page, "Steps") == ["1"]
    assert "Best validation loss" not in page
    assert "No restart, no change and no slow rank is on record." in page
    assert "There is no config.yaml that can be read of begun." in page


def test_a_run_without_optional_columns_is_reported(tmp_path):
    run = tmp_path / "old"
    run.mkdir()
    write_csv(run / "train.csv", "step,loss,ppl", ["1,7,1096", "2,6,403"])
    page = page_of(run)
    assert '"parts":null' in page and '"axes":{"step":[1.0,2.0]}' in page


def test_csvs_that_cannot_be_used_are_told(run):
    (run / "ranks.csv").write_text(f"{RANKS_HEADER}\nmany,1,a,1,1,1\n")
    assert f"{run}/ranks.csv, line 2: expected a number in column step" in refused(run)
    (run / "eval.csv").write_text("")
    assert f"{run}/eval.csv is empty" in refused(run)
    (run / "train.csv").write_text(TRAIN_HEADER + "\n" + train_row(1, 7.0).replace("0.001", "x"))
    assert "line 2: expected a number in column lr, found 'x'" in refused(run)
    (run / "train.csv").unlink()
    assert f"{run}/train.csv is not there" in refused(run)
    assert not (run / "plots").exists()


def test_other_files_that_are_damaged_do_not_matter(run):
    (run / "config.yaml").write_bytes(b"\xff: [")
    (run / "checkpoints/step-00000200/state.json").write_text("{")
    (run / "samples/step-00000200.txt").write_bytes(b"a \xff b")
    page = page_of(run)
    assert "There is no config.yaml that can be read of sample." in page
    assert "a \ufffd b" in page
    assert "Machine and versions" not in page


def test_a_report_that_cannot_be_written_is_told(run, tmp_path):
    (tmp_path / "file").write_text("")
    result = write(run, "--out", tmp_path / "file/report.html")
    assert result.returncode == 4
    assert f"cannot write {tmp_path}/file/report.html" in result.stderr


def test_texts_of_a_run_are_no_html(tmp_path):
    evil = "</pre></script><img src=x onerror=alert(1)>{{data}}"
    run = make_whole_run(tmp_path / evil.replace("/", "|"))
    (run / "samples/step-00000200.txt").write_text(evil)
    (run / "logs/rank-0000.log").write_text(f"x ERROR {evil}\n")
    (run / "config.yaml").write_text(f"'{evil}': '{evil}'\n")
    write_csv(run / "ranks.csv", RANKS_HEADER, [f"120,1,{evil},30,10,3"])
    (run / "checkpoints/step-00000200/state.json").write_text(
        '{"conditions": {"%s": "%s"}}' % (evil, evil)  # noqa: UP031
    )
    page = page_of(run, out=tmp_path / "report.html")
    assert "<img" not in page
    assert page.count("</script>") == page.count("<script") == 3
    # Of the sample, the log, the slow rank, and the key and value of config.yaml and state.json.
    assert page.count("&lt;/pre&gt;&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;{{data}}") == 7


def test_a_report_loads_nothing(run):
    page = page_of(run)
    assert LOADS.findall(page) == []
    assert all(link.startswith("#") for link in re.findall(r'href="(.*?)"', page))
    policy = re.search(r'Security-Policy" content="(.*?)">', page)[1]
    assert policy.startswith("default-src 'none'; ")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    assert policy.endswith("script-src " + " ".join(allowed))
    assert "Copyright (c) 2022 Leon Sorokin" in page


def test_ten_runs_of_20000_steps_are_less_than_5_mb(tmp_path):
    first = make_long_run(tmp_path / "run-0", 20_000, seed=0)
    runs = [first, *(shutil.copytree(first, tmp_path / f"run-{n}") for n in range(1, 10))]
    page = page_of(*runs, out=tmp_path / "report.html")
    assert len(page.encode()) < 5e6
    # The highest loss is in each of them, and the longest step.
    assert len(re.findall(r'"loss":\{"each":\[\[[^\]]*\],\[[^\]]*\b25\.0\b', page)) == 10


def test_thin_curves_keep_their_spikes():
    values = np.sin(np.arange(100_000) / 7)
    values[[0, 777, 50_001, 99_999]] = [5, 40, -40, 6]
    values[60_000:60_003] = np.nan
    kept = report.thin(values, 1000)
    assert len(kept) <= 1004
    assert {0, 777, 50_001, 60_000, 99_999} <= set(kept)
    assert (np.diff(kept) > 0).all()
    assert report.thin(values[:1000], 1000).tolist() == [*range(1000)]


def test_the_command_line_is_explained():
    assert write().returncode == 2
    result = started(report.__file__, "--help")
    assert result.returncode == 0
    assert "example: .venv/bin/python analysis/report.py" in result.stdout


# Siblings, or boxes of one kind, that cover each other.
OVERLAPS = """(() => {
  const places = "body, header, main, section, nav ul, figcaption, #controls, #runs";
  const groups = [...document.querySelectorAll(places)]
    .map((place) => [...place.children]).concat([[...document.querySelectorAll("figure")]]);
  const found = [];
  for (const group of groups)
    for (const [at, one] of group.entries())
      for (const other of group.slice(at + 1)) {
        const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
        if (!a.width || !a.height || !b.width || !b.height) continue;
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1)
          found.push(one.outerHTML.slice(0, 80) + " / " + other.outerHTML.slice(0, 80));
      }
  return found;
})()"""

NAMELESS = """[...document.querySelectorAll("a, button, input, select, summary, [tabindex]")]
  .filter((one) => !(one.getAttribute("aria-label") || one.textContent.trim()
    || [...(one.labels || [])].some((label) => label.textContent.trim())))
  .map((one) => one.outerHTML.slice(0, 80))"""


@pytest.fixture
def page(tmp_path):
    if browser.PROGRAM is None:
        pytest.skip("NOT RUN: no Chromium on PATH")
    with browser.browser(tmp_path / "browser") as opened:
        yield opened


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 10])
def test_a_page_is_whole_at_each_width_in_light_and_dark(page, tmp_path, count):
    runs = [make_whole_run(tmp_path / f"a-run-with-a-rather-long-name-{n}") for n in range(count)]
    out = tmp_path / "report.html"
    page_of(*runs, out=out)
    for width, scheme in itertools.product((1280, 390), ("light", "dark")):
        page.open(out, width, scheme)
        # Six curves, since no mfu is known, and each run's parts.
        assert page.value("document.documentElement.dataset.charts") == str(6 + count)
        assert page.value("document.documentElement.scrollWidth") == width
        assert page.value(OVERLAPS) == []
        assert page.value(NAMELESS) == []
        paper = page.value("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert set(page.requests) == {out.as_uri()}
    assert page.errors == []


@pytest.mark.full
def test_curves_can_be_used_with_the_keyboard_alone(page, run):
    page_of(run)
    page.open(run / "plots/report.html")
    for _ in range(100):
        page.press("Tab")
        if page.value("document.activeElement.classList.contains('plot')"):
            break
    canvas = "document.querySelector('canvas').toDataURL()"
    whole = page.value(canvas)
    page.press("ArrowRight")
    told = page.value("document.activeElement.querySelector('.tip').textContent")
    assert re.fullmatch(
        r"optimizer step 10\dsample: 4\.\d+, smoothed 4\.\d+, validation 4\.4", told
    )
    # A redraw comes with the browser's next frame.
    frame = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    page.press("+")
    page.value(frame)
    assert page.value(canvas) != whole
    page.press("0")
    page.value(frame)
    assert page.value(canvas) == whole
    for axis in ("tokens", "hours"):
        select = "const axis = document.getElementById('x')"
        page.value(
            f"{{{select}; axis.value = '{axis}'; axis.dispatchEvent(new Event('change')); }}"
        )
        page.value(frame)
        assert page.value(canvas) != whole
    assert page.errors == []
