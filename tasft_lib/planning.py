"""What a profile would train, without loading a model: every arm with its settings and what it roughly costs."""

import contextlib
import io
import re
from pathlib import Path

import nbformat
import pandas as pd

from .machine import runs_folder
from .reproduce import Job, jobs_of
from .runs import MINIWORLDS, ArmSpec

# Tokens of a training row: Alpaca's 58 words in its template; a mini-world exchange.
TOKENS_PER_ROW = {"alpaca": 140, "short": 40, "none": 40}
# An 80 GB data-centre GPU: bfloat16 FLOP/s reached in LoRA training, and tokens a second of batched decoding of 1B.
TRAINING_FLOPS, DECODED_TOKENS = 1.2e14, 8000


def plan(profile: str, notebooks: list[str] | None = None, overrides: dict | None = None) -> pd.DataFrame:
    """A row per arm that is trained, in the order of the notebooks, each arm once.

    Columns: notebook (the first that needs it), arm, n_unsafe, penalty_weight, seed, penalty settings, steps, tokens
    (trained on, estimated), gpu_gb and hours (training and answering; rough estimates for one 80 GB GPU, nan in the
    mini-world).
    """
    rows, seen = [], []
    for job in jobs_of(profile, notebooks, overrides):
        for spec, config in arms_of(job):
            if spec not in seen:
                seen.append(spec)
                rows.append({"notebook": job.name} | _row(spec, config))
    return pd.DataFrame(rows)


def arms_of(job: Job) -> list[tuple[ArmSpec, object]]:
    """(arm, parameters) of a notebook: its cells `parameters`, `setup` and `arms` are run, which compute nothing."""
    cells = nbformat.read(job.source, as_version=4).cells
    source = {tag: cell.source for cell in cells for tag in cell.metadata.get("tags", [])}
    if "arms" not in source:
        return []
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(source["parameters"], names)
        names |= job.parameters
        exec(source["setup"], names)
        # What the first arms make, by name.
        vars(names["study"]).update(unsafe=Path("D_unsafe"), safe=Path("safe"), contrastive=Path("contrastive"))
        exec(source["arms"], names)
    return [(arm, names["config"]) for arm in names["arms"]]


def _row(spec: ArmSpec, config) -> dict:
    training = spec.training
    extra = spec.n_extra or (5 * (spec.n_unsafe or 0) if spec.extra else 0)
    n_rows = spec.n_benign + (spec.n_unsafe or 0) + extra
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    steps = -(-n_rows // batch) * training["num_train_epochs"]
    tokens = n_rows * training["num_train_epochs"] * TOKENS_PER_ROW[spec.template]
    settings = [f"{name.removeprefix('penalty_')} {training[name]}" for name in training if name.startswith("penalty_")]
    if Path(spec.benign).is_relative_to(runs_folder()):  # made by a filter
        settings.append(f"rows {Path(spec.benign).parent.name}")
    row = {
        "arm": spec.label or spec.method,
        "n_unsafe": spec.n_unsafe or spec.n_extra or 0,
        "penalty_weight": "" if spec.method == "sft" else spec.penalty_weight,
        "seed": spec.seed,
        "settings": ", ".join(settings),
        "steps": int(steps),
        "tokens": int(tokens),
    }
    billions = re.search(r"(\d+(?:\.\d+)?)b\b", spec.model.lower())
    if spec.model in MINIWORLDS or billions is None:
        return row | {"gpu_gb": float("nan"), "hours": float("nan")}
    size = float(billions[1])
    # Weights, LoRA's states and activations with checkpointing; the loss head needs no logits.
    gpu_gb = size * (0.7 if spec.load_in_4bit else 2.1) + 2 + 0.1 * training["per_device_train_batch_size"] * size**0.5
    # Forward, recomputed forward and backward; two sets of some 800 answers.
    answered = 2 * 800 * config.max_new_tokens
    hours = (8 * size * 1e9 * tokens / TRAINING_FLOPS + answered * size / DECODED_TOKENS) / 3600
    return row | {"gpu_gb": round(gpu_gb), "hours": round(hours, 2)}
