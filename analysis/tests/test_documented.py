"""Every command in the documents can be given as it is written, and leaves nothing that git sees.

tests/full/documents.rs runs those that train; here are the ones of analysis/, on runs written here.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from test_peer import write_shard
from test_scaling import FITTED, HELD_OUT, synthetic

ROOT = Path(__file__).resolve().parents[2]
RECORDS = "analysis/records/README.md"
PAGES = [
    str(page.relative_to(ROOT))
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / RECORDS)
]
PYTHON = ".venv/bin/python "
# What a word must be to be the program of a command of ours.
OURS = re.compile(r"(launch|analysis|checks|slurm)/\S+$|\.venv/bin/python$|target/release/\S+$")


def documented():
    """(page, command) of every block of commands, and of code in a sentence that has arguments."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        for block in re.findall(r"\n```(?:sh|bash)\n(.*?)\n```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                yield page, line.partition(" #")[0].strip()
        for code in re.findall(r"(?<!`)`([^`\n]+ [^`\n]+)`(?!`)", text):
            yield page, code


COMMANDS = [(page, line) for page, line in documented() if OURS.match(line.split(" ")[0])]


@pytest.fixture
def clone(tmp_path):
    """A folder like a clone after launch/setup, with git to see what is left in it."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for name in ("analysis", "configs", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    git(tmp_path, "init", "-q")
    # Links to folders are no folders to git.
    (tmp_path / ".git/info/exclude").write_text("/analysis\n/configs\n/.venv\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "-qm", "all")
    return tmp_path


def git(folder, *arguments):
    command = ["git", "-c", "safe.directory=*", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def run(clone, command):
    """Gives a command to a shell that nothing was set up in."""
    environment = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    words = ["bash", "-c", command]
    return subprocess.run(words, cwd=clone, env=environment, capture_output=True, text=True)


def test_there_are_commands_of_each_kind():
    programs = {line.split(" ")[0] for _, line in COMMANDS}
    assert {"launch/local", "launch/gpu-check", "target/release/lockstep"} <= programs
    for tool in (
        "analysis/plot.py",
        "analysis/report.py",
        "analysis/scaling report",
        "analysis/bench/peer.py",
    ):
        assert any(line.startswith(PYTHON + tool) for _, line in COMMANDS), tool


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_its_program_can_be_started_as_it_is_written(page, line):
    program, *words = line.split(" ")
    if program == PYTHON.strip():
        target = words[0] if words[0] != "-m" else ""
        assert (ROOT / target).is_file() or (ROOT / target / "__main__.py").is_file(), line
    elif not program.startswith("target/"):
        assert os.access(ROOT / program, os.X_OK), f"{page}: {line}"


def left_by(line):
    """The files that a command leaves, as far as its words tell, in folders of the clone."""
    words = line.split(" ")
    for place, value in enumerate(words[1:]):
        if words[place] in ("--out", "--run-dir") and not value.isupper():
            yield value
    if "compare" in words:
        yield from ("compare.csv", "compare.csv.run-1/train.csv")


@pytest.mark.parametrize("page", PAGES)
def test_git_ignores_what_commands_leave(clone, page):
    names = {"slurm-train-17.out", "compare-17.csv", "plots/loss.png", "carry/lockstep"}
    for of, line in COMMANDS:
        if of == page:
            # Those of the records are given on another machine, in `carry`.
            names |= {f"carry/{name}" if page == RECORDS else name for name in left_by(line)}
    for name in names:
        path = clone / name
        if not path.suffix:
            path /= "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert git(clone, "status", "--porcelain", "--untracked-files=all") == ""


@pytest.mark.full
def test_plots_reports_and_scaling_run_as_they_are_written(clone):
    """In the order of the documents, since some need what others left."""
    seen = [synthetic(clone / f"runs/seen-{n}", *case) for n, case in enumerate(FITTED)]
    new = [synthetic(clone / f"runs/new-{n}", *case) for n, case in enumerate(HELD_OUT)]
    places = {"OTHER_RUN...": new, "RUN...": seen}
    for _, line in dict.fromkeys((None, line) for _, line in COMMANDS):
        tools = ("analysis/plot.py", "analysis/report.py", "analysis/scaling")
        if not line.startswith(tuple(PYTHON + tool for tool in tools)):
            continue
        for word, runs in places.items():
            names = " ".join(str(folder.relative_to(clone)) for folder in runs)
            line = re.sub(rf"(?<=\s){re.escape(word)}", names, line)
        for number, word in enumerate(re.sub(r"--out \S+", "", line).split(" ")):
            if word.startswith("runs/") and not Path(word).suffix and not (clone / word).exists():
                synthetic(clone / word, 2, 24, 1, True, seed=number)
        done = run(clone, line)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert git(clone, "status", "--porcelain", "--untracked-files=all") == ""


@pytest.mark.full
def test_the_peer_runs_as_it_is_written(clone):
    """On a set-up that has all of PyTorch; on another it says what to do."""
    lines = {line for _, line in COMMANDS if line.startswith(PYTHON + "analysis/bench/peer.py")}
    whole = run(clone, PYTHON + "-c 'import torch'").returncode == 0
    for line in lines:
        words = shlex.split(line)
        config = (ROOT / words[words.index("--config") + 1]).read_text()
        data = clone / re.search(r"dir: ([\w/-]+)", config)[1]
        data.mkdir(parents=True, exist_ok=True)
        meta = {"tokenizer": "bpe:8192", "vocab_size": 8192}
        (data / "meta.json").write_text(json.dumps(meta))
        for split in ("train", "valid"):
            write_shard(data / f"{split}.bin", [[*range(1, 2000)]], n_words=1500)
        done = run(clone, f"{line} --set train.steps=2")
        if whole:
            assert done.returncode == 0, done.stdout + done.stderr
            out = clone / words[words.index("--out") + 1]
            assert len((out / "train.csv").read_text().splitlines()) == 3
        else:
            assert done.returncode == 2, done.stdout + done.stderr
            assert done.stderr.count("\n") == 1
            assert "cannot load PyTorch" in done.stderr and "launch/setup --cuda" in done.stderr
    assert lines
    assert git(clone, "status", "--porcelain", "--untracked-files=all") == ""
