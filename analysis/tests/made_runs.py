"""Run directories as `lockstep train` leaves them, with numbers made here."""

import json
import math

import numpy as np

TRAIN_HEADER = (
    "step,tokens,loss,ppl,lr,grad_norm,step_ms,data_ms,compute_ms,comm_exposed_ms,optimizer_ms,"
    "tokens_per_s,mfu,memory_mib,world_size,elapsed_s"
)
EVAL_HEADER = "step,split,loss,ppl,word_ppl,tokens,eval_s"
RANKS_HEADER = "step,rank,host,compute_ms,median_ms,factor"

CONFIG = """name: {name}
seed: 3407
model:
  n_layer: 4
optim:
  lr: {lr}
train:
  prompts:
  - ' The river'
...
"""


def train_row(step, loss):
    return f"{step},{step * 512},{loss},{math.exp(loss)},0.001,1.5,9,1,6,1,1,50000,,200,2,{step}"


def eval_row(step, split, loss):
    return f"{step},{split},{loss},{math.exp(loss)},,4000,0.5"


def make_run(folder):
    """A run of 200 steps with an evaluation every 50, and nothing but its CSVs."""
    folder.mkdir(parents=True)
    losses = [(step, 4 + 3 / step) for step in range(1, 201)]
    rows = [train_row(step, loss) for step, loss in losses]
    write_csv(folder / "train.csv", TRAIN_HEADER, rows)
    rows = [eval_row(step, "valid", 4.5 - step / 1000) for step in (50, 100, 150, 200)]
    write_csv(folder / "eval.csv", EVAL_HEADER, [*rows, eval_row(200, "test", 1.0)])
    return folder


def write_csv(path, header, rows):
    path.write_text("\n".join([header, *rows, ""]))


def make_whole_run(folder, lr=0.001):
    """A run with all that a run leaves, which was stopped after step 100 and resumed."""
    make_run(folder)
    (folder / "config.yaml").write_text(CONFIG.format(name=folder.name, lr=lr))
    write_csv(folder / "ranks.csv", RANKS_HEADER, ["120,1,node-b,30.0,10.0,3.0"])
    for name in ("logs", "samples", "checkpoints/step-00000200"):
        (folder / name).mkdir(parents=True)
    (folder / "samples/step-00000200.txt").write_text(" The river runs .\n")
    (folder / "logs/rank-0000.log").write_text(
        "11:45:13Z  INFO step 1/200: loss 7.0000, 50000 tokens/s\n"
        "11:45:20Z  INFO step 100/200: loss 4.0300, 50000 tokens/s\n"
        "11:45:21Z ERROR stopped on request after step 100 of 200\n"
        "11:46:25Z  INFO resuming from runs/sample/checkpoints/step-00000100 after 100 steps\n"
    )
    state = {
        "step": 200,
        "conditions": {"lockstep": "0.1.0", "libtorch": "2.11.0", "hardware": "AMD EPYC"},
    }
    (folder / "checkpoints/step-00000200/state.json").write_text(json.dumps(state))
    return folder


def make_long_run(folder, steps, seed):
    """A run of many steps, with noise, and one spike in its loss at a third of them."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    step = np.arange(1, steps + 1)
    loss = 4 + 5 / np.sqrt(step) + 0.1 * draws.standard_normal(steps)
    loss[steps // 3] = 25 + seed
    parts = 0.5 + np.array([[5], [70], [8], [4]]) * draws.gamma(20, 0.05, (4, steps))
    parts[:, steps // 2] *= 10
    step_ms = parts.sum(axis=0)
    rates = 5e5 / step_ms
    norm = draws.gamma(4, 0.3, steps)
    memory = 400 + 20 * np.log(step).round()
    elapsed = step_ms.cumsum() / 1000
    columns = [step, 512 * step, loss, np.exp(loss), 1e-3 * np.cos(step / steps), norm, step_ms]
    columns += [*parts, rates, rates / 1e4, memory, np.full(steps, 2), elapsed]
    rows = [",".join(f"{cell:.9g}" for cell in row) for row in np.transpose(columns)]
    write_csv(folder / "train.csv", TRAIN_HEADER, rows)
    marks = range(steps // 20, steps + 1, steps // 20)
    rows = [eval_row(mark, "valid", 4.1 + 5 / math.sqrt(mark)) for mark in marks]
    write_csv(folder / "eval.csv", EVAL_HEADER, rows)
    return folder
