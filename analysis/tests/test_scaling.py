"""analysis/scaling through its command line, on runs written here from a known machine."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from command_line import call, started

from scaling import command, cost, fit
from scaling.runs import PARTS, Run, read_run

SCALING = Path(__file__).resolve().parent.parent / "scaling"

HEADER = (
    "step,tokens,loss,ppl,lr,grad_norm,step_ms,data_ms,compute_ms,comm_exposed_ms,optimizer_ms,"
    "tokens_per_s,mfu,memory_mib,world_size,elapsed_s"
)
MODEL = cost.Model(3, 48, 8192, 64, tied_head=False)
TRUTH = {
    "data_fixed": 2e-4,
    "data_per_sequence": 2e-5,
    "compute_fixed": 12e-3,
    "compute_per_sequence": 7e-3,
    "crowding": 0.15,
    "slow_down_per_byte": 1.5e-9,
    "optimizer_per_parameter": 4e-9,
    "latency": 4e-3,
    "crowd_latency": 9e-3,
    "byte_s": 8e-9,
    "work_per_byte": 3e-9,
    "sync": 2e-3,
    "jitter": 0.02,
}
# (ranks, sequences of the step, MiB of a bucket, overlap)
FITTED = [
    (1, 24, 25, True),
    (1, 6, 25, True),
    (2, 24, 1, True),
    (2, 24, 25, False),
    (2, 24, 1, False),
    (2, 12, 1, True),
    (3, 24, 1, False),
    (3, 24, 25, True),
    (3, 12, 1, True),
]
HELD_OUT = [(2, 24, 2, True), (2, 36, 25, True), (3, 24, 2, False), (3, 36, 2, True)]


def config(batch=24, bucket=25, overlap=True, zero1=False, **changes):
    """Part of a resolved configuration, as `lockstep train` writes it."""
    resolved = {
        "name": "synthetic",
        "data": {"block_size": 64, "batch_size": batch, "micro_batch": "auto"},
        "model": {"n_layer": 3, "n_head": 3, "n_embd": 48, "tied_head": False, "bias": True},
        "optim": {"lr": 5e-4, "zero1": zero1},
        "comm": {"overlap": overlap, "bucket_mib": bucket, "grad_dtype": "fp32"},
    }
    resolved["model"] |= {"norm": "pre", "recompute": False}
    return {**resolved, **changes}


def write_run(folder, rows, settings=None, header=HEADER):
    """A run directory with these rows of train.csv."""
    folder.mkdir(parents=True)
    (folder / "train.csv").write_text("\n".join([header, *rows, ""]))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or config()))
    vocabulary = {"added_tokens": [{"id": 0}], "model": {"vocab": {"a": 1, "b": 8191}}}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    return folder


def row(step, parts, ranks):
    data, compute, exposed, optimizer = parts
    times = f"{sum(parts):.3f},{data:.3f},{compute:.3f},{exposed:.3f},{optimizer:.3f}"
    return f"{step},{step * 512},4.0,54.6,0.001,1.5,{times},50000,,200,{ranks},{step}"


def synthetic(folder, ranks, batch, bucket, overlap, *, zero1=False, noise=0.03, seed=0, link=1.0):
    """A run on the machine of TRUTH, its link `link` times as slow; the first steps are slower."""
    setting = cost.Setting(ranks, batch, 1, bucket, overlap, zero1)
    truth = fit.machine({**TRUTH, "byte_s": link * TRUTH["byte_s"]}, ranks_at_once=2)
    expected = fit.milliseconds(cost.step(MODEL, setting, truth))
    rng = np.random.default_rng([seed, ranks, batch, bucket, overlap, zero1])
    rows = []
    for step in range(1, 41):
        slow = 3 if step <= 5 else 1
        parts = [slow * expected[name] * np.exp(rng.normal(0, noise)) for name in PARTS]
        rows.append(row(step, parts, ranks))
    return write_run(folder, rows, config(batch, bucket, overlap, zero1))


def scaling(*arguments):
    return call(command.main, *arguments)


def refused(*arguments):
    """What it prints about runs that it cannot use: one line, with exit code 3."""
    result = scaling(*arguments)
    assert result.returncode == 3, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("scaling: ")
    return result.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A folder with a fit, and runs that the fit has not seen."""
    folder = tmp_path_factory.mktemp("cluster")
    seen = [synthetic(folder / f"seen-{i}", *case) for i, case in enumerate(FITTED)]
    for i, case in enumerate(HELD_OUT):
        synthetic(folder / f"new-{i}", *case)
    result = scaling("fit", *seen, "--ranks-at-once", "2", "--out", folder / "fit.json")
    assert result.returncode == 0, result.stderr
    return folder


def new_runs(folder):
    return sorted(folder.glob("new-*"))


def test_a_fit_finds_the_machine(cluster):
    record = json.loads((cluster / "fit.json").read_text())
    found = record["parameters"]
    assert list(found) == list(TRUTH)
    for name in ("compute_per_sequence", "optimizer_per_parameter", "latency"):
        assert found[name] == pytest.approx(TRUTH[name], rel=0.06), name
    for name in ("compute_fixed", "crowding", "crowd_latency", "slow_down_per_byte", "byte_s"):
        assert found[name] == pytest.approx(TRUTH[name], rel=0.25), name
    # The time for a byte between two ranks is known better than its two causes.
    between_two = [each["byte_s"] + each["work_per_byte"] for each in (found, TRUTH)]
    assert between_two[0] == pytest.approx(between_two[1], rel=0.06)
    assert record["bandwidth_gbit_s"] == pytest.approx(1, rel=0.25)
    # The fit's record of a run holds no paths of the machine.
    assert len(record["runs"]) == len(FITTED)


def test_a_known_rate_of_the_link_is_kept(cluster, tmp_path):
    """It tells moving a byte from adding it up, which ZeRO-1's gather of weights does not do."""
    seen = [cluster / f"seen-{number}" for number in range(len(FITTED))]
    out = tmp_path / "fit.json"
    options = ("--ranks-at-once", "2", "--gbit-s", "1", "--out", out)
    assert scaling("fit", *seen, *options).returncode == 0
    record = json.loads(out.read_text())
    assert record["parameters"]["byte_s"] == TRUTH["byte_s"] == 8e-9
    assert list(record["parameters"]) == list(TRUTH)
    assert record["relative_standard_error"]["byte_s"] == 0
    free = json.loads((cluster / "fit.json").read_text())
    doubt = [each["relative_standard_error"]["work_per_byte"] for each in (record, free)]
    assert doubt[0] < doubt[1] / 2
    run = synthetic(tmp_path / "zero1", 2, 24, 1, True, zero1=True)
    assert scaling("check", out, run).returncode == 0
    assert scaling("fit", *seen, "--gbit-s", "0").returncode == 2


def test_a_fit_without_noise_finds_every_parameter():
    runs = []
    for ranks, batch, bucket, overlap in FITTED:
        setting = cost.Setting(ranks, batch, 1, bucket, overlap)
        truth = fit.machine(TRUTH, ranks_at_once=2)
        measured = fit.milliseconds(cost.step(MODEL, setting, truth))
        runs.append(Run("", "", MODEL, setting, 30, measured))
    found, spread = fit.fit(runs, ranks_at_once=2)
    assert found == pytest.approx(TRUTH, rel=0.02)
    assert max(spread.values()) < 0.2


def test_what_the_runs_do_not_say_is_told(tmp_path):
    cases = [(2, batch, bucket, False) for batch in (12, 24, 48) for bucket in (1, 25)]
    runs = [synthetic(tmp_path / str(i), *case) for i, case in enumerate(cases)]
    result = scaling("fit", *runs)
    assert result.returncode == 0, result.stderr
    unknown = json.loads(result.stdout)["not_determined"]
    # Without overlap nothing slows the compute; if each rank has its own machine, none waits for a
    # core.
    assert {"slow_down_per_byte", "crowd_latency", "crowding"} <= set(unknown)
    assert not {"latency", "compute_per_sequence", "optimizer_per_parameter"} & set(unknown)
    assert "these runs do not determine" in result.stderr


def test_a_check_holds_on_runs_of_the_same_machine(cluster):
    result = scaling("check", cluster / "fit.json", *new_runs(cluster))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\nholds: largest error" in result.stdout
    for column in ("step_ms", "step_ms_predicted", "step_ms_error", "comm_exposed_ms_error"):
        assert column in result.stdout


def test_a_check_catches_another_link(cluster, tmp_path):
    slow = synthetic(tmp_path / "slow", 2, 24, 2, True, link=1.6)
    result = scaling("check", cluster / "fit.json", slow)
    assert result.returncode == 1, result.stdout
    assert "DOES NOT HOLD" in result.stdout


def test_a_check_catches_a_wrong_model(cluster, tmp_path):
    record = json.loads((cluster / "fit.json").read_text())
    for name, factor in (("byte_s", 2), ("compute_per_sequence", 1.2), ("latency", 4)):
        wrong = {**record, "parameters": dict(record["parameters"])}
        wrong["parameters"][name] *= factor
        (tmp_path / "fit.json").write_text(json.dumps(wrong))
        result = scaling("check", tmp_path / "fit.json", *new_runs(cluster))
        assert result.returncode == 1, f"{name}: {result.stdout}"


def test_zero1_is_predicted_from_runs_without_it(cluster, tmp_path):
    run = synthetic(tmp_path / "zero1", 2, 24, 1, True, zero1=True)
    result = scaling("check", cluster / "fit.json", run)
    assert result.returncode == 0, result.stdout


def test_a_check_needs_other_runs_than_the_fit(cluster):
    message = refused("check", cluster / "fit.json", cluster / "seen-3")
    assert "which the model was fitted to" in message


def test_a_check_needs_the_same_model(cluster, tmp_path):
    run = synthetic(tmp_path / "run", 2, 24, 1, True, seed=1)
    changed = yaml.safe_load((run / "config.yaml").read_text())
    changed["model"]["n_layer"] = 4
    (run / "config.yaml").write_text(yaml.safe_dump(changed))
    assert "trains another model" in refused("check", cluster / "fit.json", run)
    assert "different models" in refused("fit", cluster / "seen-2", run)


def test_a_check_needs_a_fit(tmp_path):
    run = synthetic(tmp_path / "run", 2, 24, 1, True)
    for name, content in (("no.json", None), ("empty.json", ""), ("other.json", '{"runs": []}')):
        if content is not None:
            (tmp_path / name).write_text(content)
        message = refused("check", tmp_path / name, run)
        assert "expected what `fit` wrote" in message


def test_a_report_lists_what_was_measured(cluster, tmp_path):
    result = scaling("report", *new_runs(cluster), "--out", tmp_path / "a/buckets.png")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    columns = lines[0].split(",")
    for name in ("bucket_mib", "overlap", "world_size", "step_ms", "comm_exposed_ms"):
        assert name in columns
    assert len(lines) == 1 + len(HELD_OUT)
    assert (tmp_path / "a/buckets.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_medians_leave_the_warm_up_out(tmp_path):
    run = synthetic(tmp_path / "run", 2, 24, 1, True, noise=0)
    lines = scaling("report", run).stdout.splitlines()
    measured = dict(zip(lines[0].split(","), lines[1].split(",")))  # noqa: B905  # Python 3.9
    truth = fit.machine(TRUTH, ranks_at_once=2)
    expected = cost.step(MODEL, cost.Setting(2, 24, 1, 1, True), truth)
    assert float(measured["step_ms"]) == pytest.approx(1000 * expected.total, abs=0.01)
    assert measured["steps"] == "35"
    assert float(measured["step_ms_spread"]) == 0
    for name in ("step_ms", "comm_exposed_ms"):
        assert measured[name] == measured[f"{name}_q1"] == measured[f"{name}_q3"]
    noisy = synthetic(tmp_path / "noisy", 2, 24, 1, True, noise=0.2)
    lines = scaling("report", noisy).stdout.splitlines()
    measured = dict(zip(lines[0].split(","), lines[1].split(",")))  # noqa: B905  # Python 3.9
    low, middle, high = (float(measured[f"step_ms{name}"]) for name in ("_q1", "", "_q3"))
    assert low < middle < high
    spread = float(measured["step_ms_spread"])
    assert 0.1 < spread < 0.4 and spread == pytest.approx((high - low) / middle, abs=1e-3)
    everything = scaling("report", run, "--warm-up", "0").stdout.splitlines()[1]
    assert ",40," in everything


def test_a_run_from_before_there_were_buckets_is_read(tmp_path):
    old = config()
    del old["comm"], old["optim"]["zero1"]
    run = write_run(tmp_path / "old", [row(s, (1, 50, 20, 3), 2) for s in range(1, 20)], old)
    line = scaling("report", run).stdout.splitlines()[1]
    assert ",inf,False,False," in line


def test_micro_batches_that_the_configuration_fixes_are_counted(tmp_path):
    changed = config()
    changed["data"]["micro_batch"] = 3
    run = write_run(tmp_path / "run", [row(s, (1, 50, 20, 3), 2) for s in range(1, 20)], changed)
    assert read_run(run, 5, None).setting.accumulation == 4
    assert read_run(run, 5, None).model == MODEL


def test_missing_files_are_named(tmp_path):
    run = synthetic(tmp_path / "run", 2, 24, 1, True)
    assert f"{tmp_path}/no is not a folder" in refused("report", tmp_path / "no")
    for name, hint in (
        ("tokenizer.json", "--vocab-size"),
        ("config.yaml", "name a run directory"),
        ("train.csv", "name a run directory"),
    ):
        (run / name).unlink()
        message = refused("report", run)
        assert f"{run}/{name} is not there" in message
        assert hint in message


def test_the_vocabularys_size_can_be_given(tmp_path):
    run = synthetic(tmp_path / "run", 2, 24, 1, True)
    (run / "tokenizer.json").unlink()
    assert scaling("report", run, "--vocab-size", "8192").returncode == 0
    assert scaling("report", run, "--vocab-size", "0").returncode == 2


def test_a_csv_that_is_empty_or_of_something_else_is_told(tmp_path):
    run = synthetic(tmp_path / "run", 2, 24, 1, True)
    train = run / "train.csv"
    train.write_text("")
    assert f"{train} is empty" in refused("report", run)
    train.write_text(HEADER + "\n")
    assert "expected one world_size" in refused("report", run)
    train.write_text("step,step_ms\n1,2\n")
    assert "has no column data_ms, compute_ms" in refused("report", run)
    train.write_text("\n".join([HEADER, *(row(s, (1, 5, 2, 3), 2) for s in range(1, 9)), ""]))
    message = refused("report", run)
    assert "expected at least 5 rows" in message and "found 3" in message


def test_a_step_that_is_there_twice_is_told(tmp_path):
    rows = [row(step, (1, 5, 2, 3), 2) for step in [*range(1, 20), 7]]
    assert "has step 7 twice" in refused("report", write_run(tmp_path / "run", rows))


def test_a_run_that_changed_its_world_is_told(tmp_path):
    rows = [row(step, (1, 5, 2, 3), 1 + step // 10) for step in range(1, 20)]
    assert "found 1, 2" in refused("report", write_run(tmp_path / "run", rows))


def test_a_run_that_is_named_twice_is_told(cluster):
    run = cluster / "seen-3"
    assert "are the same run" in refused("fit", run, cluster / "seen-4", run)


def test_a_fit_without_several_ranks_is_told(cluster):
    assert "expected a run of several ranks" in refused("fit", cluster / "seen-0")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("data: [", "cannot read"),
        ("", "expected a run's resolved config"),
        ("data: {block_size: 64}\nmodel: {}\noptim: {}\n", "there is no key 'n_layer'"),
        (yaml.safe_dump(config(comm={"overlap": True})), "there is no key 'bucket_mib'"),
        (yaml.safe_dump(config(model={"n_layer": None, "n_embd": 3})), "resolved config"),
    ],
)
def test_a_configuration_that_is_none_is_told(tmp_path, content, told):
    run = synthetic(tmp_path / "run", 2, 24, 1, True)
    (run / "config.yaml").write_text(content)
    message = refused("report", run)
    assert f"{run}/config.yaml" in message
    assert told in message


def test_a_vocabulary_that_is_none_is_told(tmp_path):
    run = synthetic(tmp_path / "run", 2, 24, 1, True)
    (run / "tokenizer.json").write_text("{}")
    assert "expected Hugging Face's tokenizer.json" in refused("report", run)


def test_predict_draws_what_it_models(tmp_path):
    result = started(SCALING, "predict", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    picture = tmp_path / "runs/scaling.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    rows = pd.read_csv(picture.with_suffix(".csv"))
    assert {"ring", "tree", "best"} == set(rows["algorithm"])
    assert set(rows["preset"]) == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
    assert (rows["gpus"].min(), rows["gpus"].max()) == (8, 16384)
    assert not rows.duplicated().any()
    for word in ("modelled: ", "assumed:", "published, ", "MFU"):
        assert word in result.stdout
    # Gradients of half the size cannot make it slower.
    half = scaling("predict", "--grad-dtype", "bf16", "--out", tmp_path / "half.png")
    assert half.returncode == 0, half.stderr
    assert (pd.read_csv(tmp_path / "half.csv")["step_ms"] <= rows["step_ms"]).all()


def test_a_picture_that_cannot_be_written_is_told(cluster, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (["predict"], ["report", *new_runs(cluster)]):
        result = scaling(*arguments, "--out", tmp_path / "file/x.png")
        assert result.returncode == 4
        assert f"cannot write {tmp_path}/file" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_command_line_is_explained():
    assert scaling().returncode == 2
    assert scaling("predict", "--preset", "gpt-5").returncode == 2
    result = started(SCALING, "--help")
    assert result.returncode == 0
    assert "example: .venv/bin/python analysis/scaling" in result.stdout
