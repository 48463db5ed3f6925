"""plot.py through its command line, on small CSVs written here."""

from pathlib import Path

import pandas as pd
import pytest
from command_line import call, started
from made_runs import EVAL_HEADER, TRAIN_HEADER, make_run, train_row

import plot
from measurements import read_run, trend

PLOT = Path(__file__).resolve().parent.parent / "plot.py"


@pytest.fixture
def run(tmp_path):
    """A run of 200 steps with an evaluation every 50."""
    return make_run(tmp_path / "sample")


def draw(*arguments):
    return call(plot.main, *arguments)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def refused(*arguments):
    """What plot.py prints about CSVs that it cannot draw: one line, with exit code 3."""
    result = draw(*arguments)
    assert result.returncode == 3, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_one_run_is_drawn_into_its_own_folder(run):
    result = draw(run)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for name in ("loss.png", "ppl.png"):
        assert str(run / "plots" / name) in result.stdout
        assert is_png(run / "plots" / name)


def test_several_runs_are_drawn_into_the_working_folder(run, tmp_path, monkeypatch):
    # The same name in another folder.
    other = make_run(tmp_path / "other/sample")
    monkeypatch.chdir(tmp_path)
    result = draw(run, other)
    assert result.returncode == 0, result.stderr
    assert is_png(tmp_path / "plots/loss.png")
    assert not (run / "plots").exists()


def test_out_names_the_folder(run, tmp_path):
    assert draw(run, "--out", tmp_path / "a/b").returncode == 0
    assert is_png(tmp_path / "a/b/ppl.png")
    assert not (run / "plots").exists()


def test_a_run_of_one_step_without_evaluations_is_drawn(run):
    (run / "train.csv").write_text(f"{TRAIN_HEADER}\n{train_row(1, 7.6)}\n")
    (run / "eval.csv").unlink()
    result = draw(run)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_unknown_and_infinite_measurements_are_left_out(run):
    rows = ["1,512,7.6,inf,,,,,,,,,,,2,1", "2,1024,,,,,,,,,,,,,2,2", train_row(3, 7.0)]
    (run / "train.csv").write_text("\n".join([TRAIN_HEADER, *rows, ""]))
    result = draw(run)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_only_the_validation_split_is_drawn(run):
    assert read_run(run).valid["step"].tolist() == [50, 100, 150, 200]
    assert plot.best(read_run(run), "loss") == "best validation 4.300 at step 200"


def test_the_trend_is_centred(run):
    values = pd.Series(range(1000), dtype=float)
    smooth = trend(values)
    assert (smooth[100:900] - values[100:900]).abs().max() <= 0.5
    assert len(smooth) == len(values)


def test_a_missing_folder_is_named(tmp_path):
    assert f"{tmp_path}/no is not a folder" in refused(tmp_path / "no")


def test_a_missing_csv_is_named(run):
    (run / "train.csv").unlink()
    assert f"{run}/train.csv is not there" in refused(run)


def test_an_empty_csv_is_named(run):
    (run / "train.csv").write_text("")
    assert f"{run}/train.csv is empty" in refused(run)


def test_a_csv_without_rows_is_named(run):
    (run / "train.csv").write_text(TRAIN_HEADER + "\n")
    assert "has no rows yet" in refused(run)


def test_a_csv_of_something_else_is_told_by_its_columns(run):
    (run / "train.csv").write_text("name,size\na,1\n")
    assert "has no column step, loss, ppl" in refused(run)


def test_a_cell_that_is_no_number_is_told_with_its_line(run):
    rows = [train_row(1, 7.0), train_row(2, 6.5).replace("6.5", "six", 1)]
    (run / "train.csv").write_text("\n".join([TRAIN_HEADER, *rows, ""]))
    message = refused(run)
    assert f"{run}/train.csv, line 3: expected a number in column loss, found 'six'" in message


def test_a_row_of_too_many_cells_is_told(run):
    (run / "eval.csv").write_text(f"{EVAL_HEADER}\n50,valid,4,55,,9,1\n60,valid,4,55,,9,1,7,7\n")
    message = refused(run)
    assert f"cannot read {run}/eval.csv" in message
    assert "line 3" in message


def test_bytes_that_are_no_text_are_told(run):
    (run / "train.csv").write_bytes(TRAIN_HEADER.encode() + b"\n\xff\xfe\x00")
    assert f"{run}/train.csv" in refused(run)


def test_a_run_without_a_finite_loss_is_told(run):
    (run / "train.csv").write_text(f"{TRAIN_HEADER}\n1,512,NaN,NaN,,,,,,,,,,,2,1\n")
    assert "has no finite loss" in refused(run)


KINDS = ["loss", "ppl", "lr", "grad_norm", "tokens_per_s", "memory_mib", "step_time"]


@pytest.mark.parametrize("x", ["step", "tokens", "hours"])
def test_each_kind_of_curve_is_drawn_against_each_axis(run, tmp_path, x):
    result = draw(run, make_run(tmp_path / "other"), "--x", x, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    # No run has a known mfu.
    assert result.stdout.split() == [str(tmp_path / f"out/{kind}.png") for kind in KINDS]
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == sorted(KINDS)


def test_a_name_is_no_formula(tmp_path):
    assert draw(make_run(tmp_path / r"$\frac$")).returncode == 0


def test_pictures_can_be_svg(run):
    assert draw(run, "--format", "svg").returncode == 0
    for kind in KINDS:
        assert "<svg" in (run / f"plots/{kind}.svg").read_text()


def test_evaluations_lie_where_their_steps_do(run):
    seen = read_run(run)
    assert seen.places("tokens", seen.valid["step"]).tolist() == [25600, 51200, 76800, 102400]
    assert seen.places("hours", seen.valid["step"])[-1] == pytest.approx(200 / 3600)


def test_an_axis_that_a_run_does_not_know_is_told(run):
    (run / "train.csv").write_text("step,loss,ppl\n1,7,1096\n")
    message = refused(run, "--x", "hours")
    assert f"{run}/train.csv has no elapsed_s, which --x hours needs; use --x step" in message
    assert draw(run).stdout.split() == [str(run / f"plots/{kind}.png") for kind in ("loss", "ppl")]


class Clock:
    """A clock whose sleep is when other processes do something."""

    def __init__(self, *doings):
        self.now, self.doings = 0, list(doings)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.doings.pop(0)()


def test_a_run_is_watched_until_it_ends(run):
    lease, train = run / "lease.json", run / "train.csv"
    rows = train.read_text()

    def renew(text, csv):
        lease.write_text(text)
        train.write_text(csv)

    renew("1", TRAIN_HEADER)
    drawn = []
    clock = Clock(
        lambda: renew("2", rows + train_row(201, 4.0) + "\n"),
        lambda: renew("3", train.read_text()),
        lambda: renew("4", train.read_text() + train_row(202, 4.0) + "\n"),
        lease.unlink,
    )

    def redraw():
        drawn.append(len(read_run(run).train))

    plot.watch([run], redraw, clock)
    # Not without rows, not without new ones, and once more at the end.
    assert drawn == [201, 202, 202]


def test_a_run_that_was_killed_is_not_watched_for_long(run):
    (run / "lease.json").write_text("1")
    drawn = []
    plot.watch([run], lambda: drawn.append(1), Clock(lambda: None, lambda: None))
    assert drawn == [1, 1]


def test_watching_a_run_that_has_ended_draws_it_once(run):
    result = draw(run, "--watch")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == len(KINDS)


def test_a_damaged_csv_of_a_watched_run_is_told_at_its_end(run):
    (run / "train.csv").write_text("")
    assert "train.csv is empty" in refused(run, "--watch")


def test_a_folder_that_cannot_be_made_is_told(run, tmp_path):
    (tmp_path / "file").write_text("")
    result = draw(run, "--out", tmp_path / "file/plots")
    assert result.returncode == 4
    assert f"cannot write {tmp_path}/file/plots/loss.png" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_line_is_explained():
    assert draw().returncode == 2
    result = started(PLOT, "--help")
    assert result.returncode == 0
    assert "example: .venv/bin/python analysis/plot.py" in result.stdout
