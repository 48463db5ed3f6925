"""Run directories as the cost model sees them: what ran, and the medians of its steps."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from measurements import Unusable, read_csv

from .cost import BYTES, Model, Setting, largest_micro_batch

PARTS = ["data_ms", "compute_ms", "comm_exposed_ms", "optimizer_ms"]

COLUMNS = ["step", "step_ms", *PARTS, "world_size"]

# A median needs this many rows after the warm-up.
LEAST_ROWS = 5


@dataclass(frozen=True)
class Run:
    """One run directory: what ran, and the medians of its steps, in milliseconds."""

    name: str
    digest: str
    model: Model
    setting: Setting
    steps: int
    measured: dict[str, float]
    # The lower and the upper quartile of what was measured: how far to trust the medians.
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """The distance of the quartiles of step_ms, as a share of its median."""
        low, high = self.quartiles["step_ms"]
        return (high - low) / self.measured["step_ms"]


def read_run(folder: Path, warm_up: int, vocab_size: int | None) -> Run:
    """Reads a run directory. Raises Unusable if it is not one or has too few rows."""
    if not folder.is_dir():
        raise Unusable(f"{folder} is not a folder; name a run directory, such as runs/sample")
    path = folder / "train.csv"
    train = read_csv(path, COLUMNS)
    twice = train["step"][train["step"].duplicated()]
    if not twice.empty:
        raise Unusable(
            f"{path} has step {int(twice.iloc[0])} twice; expected each step once: "
            "is it two files in one?"
        )
    sizes = sorted(train["world_size"].dropna().unique())
    if len(sizes) != 1:
        found = ", ".join(f"{size:g}" for size in sizes) or "none"
        raise Unusable(f"{path}: expected one world_size in all rows, found {found}")
    rows = train.iloc[warm_up:].dropna(subset=["step_ms", *PARTS])
    if len(rows) < LEAST_ROWS:
        raise Unusable(
            f"{path}: expected at least {LEAST_ROWS} rows with all times after the first {warm_up} "
            f"(--warm-up), found {len(rows)}; train for more steps"
        )
    model, setting = read_config(folder, int(sizes[0]), vocab_size)
    return Run(
        name=str(folder),
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        model=model,
        setting=setting,
        steps=len(rows),
        measured={name: float(rows[name].median()) for name in ["step_ms", *PARTS]},
        quartiles={
            name: tuple(map(float, rows[name].quantile([0.25, 0.75])))
            for name in ["step_ms", *PARTS]
        },
    )


def read_config(folder: Path, world_size: int, vocab_size: int | None) -> tuple[Model, Setting]:
    """The model, and how its step was split, from config.yaml.

    A run from before buckets existed summed the whole gradient after the backward pass.
    """
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text())
        data, shape = config["data"], config["model"]
        comm, optim = config.get("comm"), config["optim"]
        model = Model(
            n_layer=int(shape["n_layer"]),
            n_embd=int(shape["n_embd"]),
            vocab_size=vocab_size or read_vocab_size(folder),
            block_size=int(data["block_size"]),
            tied_head=bool(shape.get("tied_head", True)),
            bias=bool(shape.get("bias", True)),
            pre_norm=shape.get("norm", "pre") == "pre",
            recompute=bool(shape.get("recompute", False)),
        )
        batch_size = int(data["batch_size"])
        share = max(1, batch_size // world_size)
        micro_batch = data.get("micro_batch", "auto")
        if micro_batch == "auto":
            micro_batch = largest_micro_batch(share, model.block_size)
        setting = Setting(
            world_size=world_size,
            batch_size=batch_size,
            accumulation=max(1, share // int(micro_batch)),
            bucket_mib=float(comm["bucket_mib"]) if comm else math.inf,
            overlap=bool(comm["overlap"]) if comm else False,
            zero1=bool(optim.get("zero1", False)),
            gradient_bytes=BYTES[comm.get("grad_dtype", "fp32") if comm else "fp32"],
            weight_bytes=BYTES[config.get("precision", "fp32")],
        )
    except FileNotFoundError:
        raise Unusable(
            f"{path} is not there; name a run directory, as `lockstep train` writes it"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Unusable(f"cannot read {path}: {' '.join(str(error).split())}") from None
    except KeyError as error:
        raise Unusable(
            f"{path}: there is no key {error}; expected a run's resolved config"
        ) from None
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Unusable(f"{path}: expected a run's resolved config; {error}") from None
    return model, setting


def read_vocab_size(folder: Path) -> int:
    """The number of tokens in the run's own copy of the vocabulary: the configuration has none."""
    path = folder / "tokenizer.json"
    try:
        vocabulary = json.loads(path.read_text())
        ids = [*vocabulary["model"]["vocab"].values()]
        ids += [token["id"] for token in vocabulary.get("added_tokens", [])]
        return max(ids) + 1
    except FileNotFoundError:
        raise Unusable(f"{path} is not there; give the vocabulary's size as --vocab-size") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"{path}: expected Hugging Face's tokenizer.json; {error!r}") from None


def read_runs(folders: list[Path], warm_up: int, vocab_size: int | None) -> list[Run]:
    """Reads runs for one fit: no run twice, and all of the same model."""
    runs = [read_run(folder, warm_up, vocab_size) for folder in folders]
    for index, run in enumerate(runs):
        for other in runs[:index]:
            if run.digest == other.digest:
                raise Unusable(f"{run.name} and {other.name} are the same run; name it once")
        if run.model != runs[0].model:
            raise Unusable(
                f"{run.name} and {runs[0].name} train different models or block sizes, whose "
                "compute cannot be compared; fit each alone"
            )
    return runs


def table(runs: list[Run]) -> pd.DataFrame:
    """What was measured, a row for each run."""
    return pd.DataFrame(
        {
            "run": [run.name for run in runs],
            "world_size": [run.setting.world_size for run in runs],
            "batch_size": [run.setting.batch_size for run in runs],
            "bucket_mib": [run.setting.bucket_mib for run in runs],
            "overlap": [run.setting.overlap for run in runs],
            "zero1": [run.setting.zero1 for run in runs],
            "steps": [run.steps for run in runs],
            **{name: [run.measured[name] for run in runs] for name in ["step_ms", *PARTS]},
            "step_ms_spread": [run.spread for run in runs],
            **{
                f"{name}_{quartile}": [run.quartiles[name][at] for run in runs]
                for name in ["step_ms", "comm_exposed_ms"]
                for at, quartile in enumerate(["q1", "q3"])
            },
        }
    )
