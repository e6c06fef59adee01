"""Arms: a spec goes in, a folder with a trained adapter and a manifest comes out - once.

    runs/arms/<method>-<hash>/
        spec.json             what was asked
        ingredients.json      hashes of what it is made of: base model, rows, code, versions
        trainer/checkpoint-N  what TRL saves: adapter, optimizer, random state; and checksums of these. A killed run
                              resumes from the last one, an arm with a damaged file from the last one before that
        running.json          who trains it, since when, to which step; see `running`
        manifest.json         written last: the arm is finished

Arms are found by the name of their spec (see `specs`), so two notebooks that need the same arm share it. What a name
cannot tell, the content of a file or another version of the code, is looked at when the arm is trained: an arm made of
something else is set aside, not used.
"""

import json
import logging
import os
import shutil
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import trl.trainer.utils
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from .. import models
from ..base_models import source_of
from ..evaluation import worlds
from ..evaluation.worlds import base_model
from ..losses import PENALTIES
from ..records import data, sources
from ..storage.files import (
    content_hash,
    environment,
    model_identity,
    peak_memory_mb,
    read_json,
    show_progress,
    travelling,
    write_json,
)
from ..storage.integrity import damage, locked, seal, set_aside, sha256
from ..storage.resume import by_step, torn
from . import engine, methods, rows
from .once import once
from .running import Running
from .specs import ArmSpec, Rows, describe

# The modules that determine what is trained: those that `methods` imports, and itself.
TRAINED_BY = (
    "losses",
    "fused_head",
    "forward",
    "config",
    "labels",
    "sampling",
    "branches",
    "weight",
    "trainer",
    "experiments/methods",
    "records/data",
    "records/forms",
    "records/messages",
    "records/sources",
    "records/templates",
    "records/tokens",
    "text",
    "storage/files",
)

# Words of the vocabulary that TRL's head scores at a time on a CPU. It holds some ten arrays of tokens x words in
# float32: of `pocket`'s longest batch 2 GB at TRL's own 32,768, for the same loss up to rounding, and no faster.
HEAD_WORDS = 8192


def ingredients(spec: ArmSpec) -> dict[str, Any]:
    """Hashes of all that the arm is made of and its name can't tell; makes the rows that are not there yet."""
    files = rows.with_files(spec)
    return {
        "model": once("model", spec.model, lambda: model_identity(base_model(spec.model))),
        "benign": once("benign", spec.benign, lambda: _content(worlds.load(spec.benign).file)),
        "unsafe": once("rows", files.unsafe, lambda: _content(files.unsafe)),
        "extra": once("rows", files.extra, lambda: _content(files.extra)),
        "held_out": once("held_out", spec.held_out, lambda: content_hash(rows.held_out_prompts(spec))),
        "code": _code_hash(),
        "libraries": _libraries(),
    }


def train(spec: ArmSpec) -> Path:
    """Train the arm unless it is finished, resuming from its last complete checkpoint; return its folder.

    Where units become jobs a job trains it. On SIGTERM or SIGUSR2 a checkpoint is saved first, see `Running`.
    """
    if engine.submits() and not is_trained(spec):
        return engine.call(train, spec)
    folder, made_of = spec.folder, ingredients(spec)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{folder}.lock"), folder):
        _set_damaged_aside(folder)
        _set_aside(folder, made_of)
        if _is_finished(folder):
            return folder
        folder.mkdir(exist_ok=True)
        write_json(folder / "spec.json", describe(spec))
        write_json(folder / "ingredients.json", made_of)
        started = time.time()
        benign, unsafe = rows.training_rows(spec)
        model, tokenizer = load_model(spec)
        if spec.template == "chat" and not tokenizer.chat_template:
            raise ValueError(f"{spec.model}: template is chat, and it has no chat template; use alpaca, short or none.")
        if not torch.accelerator.is_available():
            trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = HEAD_WORDS
        set_seed(spec.seed)  # the adapter is initialised when the trainer is built
        trainer = methods.make_trainer(
            spec.method,
            model,
            tokenizer,
            benign,
            unsafe,
            penalty_weight=spec.penalty_weight,
            unsafe_visits=spec.unsafe_visits,
            lora=spec.lora,
            training=_defaults() | spec.training | {"output_dir": str(folder / "trainer"), "seed": spec.seed},
        )
        trainer.remove_callback(PrinterCallback)  # the log history goes into the manifest
        models.sort_targets(trainer.model)
        resumed, running = _last_checkpoint(folder), Running(folder)
        trainer.add_callback(running)
        with running.listening():
            models.train_from(trainer, resumed)
        for step, path in by_step(folder / "trainer").items():
            if step % trainer.state.save_steps and step != trainer.state.global_step:
                shutil.rmtree(path)  # saved for a signal; no other arm has one of this step
        manifest = {
            "arm": spec.name,
            "spec": describe(spec),
            "ingredients": made_of,
            "benign_rows": data.fingerprint(benign),
            "unsafe_rows": unsafe and data.fingerprint(unsafe),
            "truncated_rows_left_out": rows.n_truncated(spec),
            # λ of TA-SFT, KTO's undesirable weight; plain SFT has none. λ = 0 is a λ.
            "penalty_weight": getattr(trainer, "penalty_weight", getattr(trainer, "undesirable_weight", None)),
            "steps": trainer.state.global_step,
            "seconds": round(time.time() - started, 1),
            "resumed_from": resumed and resumed.name,
            "peak_memory_mb": peak_memory_mb(),
            "log_history": trainer.state.log_history,
        }
        write_json(folder / "manifest.json", manifest | environment())
        seal(folder / "manifest.json")
    return folder


def check_options(specs: list[ArmSpec]) -> None:
    """Raise `ValueError`, naming the arm, where a trainer would refuse its options: before the first is trained."""
    different = {(spec.method, spec.penalty_weight, json.dumps(spec.training, sort_keys=True)): spec for spec in specs}
    for spec in different.values():
        is_ours = spec.method in PENALTIES
        named = {"penalty": spec.method, "penalty_weight": spec.penalty_weight} if is_ours else {}
        try:
            methods.CONFIGS[spec.method](**_defaults() | spec.training | named | {"output_dir": str(spec.folder)})
        except ValueError as error:
            raise ValueError(f"arm {spec.display_name or spec.method}: {error}") from error


def is_trained(spec: ArmSpec) -> bool:
    """Whether the arm is finished and whole, of the rows, base model and code that are there now."""
    return _is_finished(spec.folder) and _recorded(spec.folder) == ingredients(spec)


def has_ended(spec: ArmSpec) -> bool:
    """`is_trained` for who does not load the weights: they are not read, so a grid of thousands is found in seconds."""
    return _is_recorded(spec.folder) and _recorded(spec.folder) == ingredients(spec)


def read_manifest(spec: ArmSpec) -> dict[str, Any]:
    """What the finished arm recorded about itself."""
    return json.loads((spec.folder / "manifest.json").read_text(encoding="utf-8"))


def summary(arms: list[ArmSpec]) -> dict[str, Any]:
    """The arms for the manifest of a figure, without their logs.

    Returns:
        `base`, spec and ingredients of the first arm; `rows`, by name the specs of what rows are made from; `arms`, by
        name what each arm recorded (seconds, steps, penalty_weight, ...), spec and ingredients where they differ,
        versions and hardware where they are others than here; `base_model`, which source it was brought from, where
        tasft brought it.
    """
    base, summaries, made, here = {}, {}, {}, environment()
    for arm in arms:
        manifest = read_manifest(arm)
        own = {"spec": travelling(describe(arm)), "ingredients": manifest["ingredients"]}
        base = base or own
        left_out = ("arm", "log_history", *(part for part in ("versions", "hardware") if manifest[part] == here[part]))
        different = {part: _difference(own[part], base[part]) for part in own}
        summaries[arm.name] = {k: v for k, v in manifest.items() if k not in left_out} | different
    for source in (source for arm in arms for source in (arm.unsafe, arm.extra)):
        while isinstance(source, Rows):
            made[source.name] = travelling(describe(source))
            source = getattr(source, "unsafe", None)
    source = source_of(base_model(arms[0].model)) if arms else {}
    return {"base": base, "rows": made, "arms": summaries} | ({"base_model": source} if source else {})


def load_tokenizer(spec: ArmSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of the arm's base."""
    return models.load_tokenizer(base_model(spec.model), spec.model_revision)


def load_model(spec: ArmSpec, adapter: Path | None = None):
    """(model, tokenizer) of the arm's base, with `adapter` (or tuned checkpoint) of a step if one is given.

    On a CPU all cores are its, where nothing runs beside it. A model of the mini-world has one thread: it gains nothing
    by a second, and its results are to be the same bytes on any number of cores.
    """
    gpu = torch.accelerator.current_accelerator()
    if gpu is None:
        torch.set_num_threads(models.CORES if engine.is_alone() and not worlds.is_built(spec.model) else 1)
    options = {
        "dtype": spec.dtype,
        "load_in_4bit": spec.load_in_4bit,
        "device": gpu and f"{gpu.type}:0",
    }
    if adapter is not None and not models.is_adapter(adapter):
        return models.load_weights(adapter, **options), load_tokenizer(spec)
    return models.load_model(base_model(spec.model), spec.model_revision, adapter=adapter, **options)


def load_trained(spec: ArmSpec):
    """(model, tokenizer) of the arm at the end of its training."""
    saved = checkpoints(spec)
    return load_model(spec, saved[max(saved)])


def checkpoints(spec: ArmSpec) -> dict[int, Path]:
    """Step -> complete checkpoint of the arm, in the order of training."""
    return {step: path for step, path in by_step(spec.folder / "trainer").items() if not torn(path)}


def _difference(spec: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The entries of `spec` that `base` has not, at both levels; None for one that only `base` has."""
    different = {name: spec.get(name) for name in {**base, **spec} if spec.get(name) != base.get(name)}
    return {
        name: _difference(value, base[name]) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in different.items()
    }


def _content(source: str | Path | None) -> str | None:
    """Hash of a file's bytes or a data set folder's rows; None for what has no file here: its name tells it."""
    if source is None or not Path(source).exists():
        return None
    if Path(source).is_dir():
        return data.fingerprint(sources.read_rows(source))
    return sha256(Path(source))


def _recorded(folder: Path) -> dict[str, Any] | None:
    """The ingredients of the arm in the folder; None where none was begun."""
    return _read(folder / "ingredients.json")


def _read(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none."""
    try:
        value = read_json(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _is_finished(folder: Path) -> bool:
    """Whether the manifest is there, the checkpoint of its last step, and every checkpoint as it was saved."""
    return _is_recorded(folder) and not any(map(torn, by_step(folder / "trainer").values()))


def _is_recorded(folder: Path) -> bool:
    """Whether the manifest is there, as it was written, and a checkpoint of its last step."""
    manifest = _read(folder / "manifest.json")
    is_there = manifest is not None and manifest.get("steps") in by_step(folder / "trainer")
    return is_there and not damage(folder / "manifest.json")


def _set_damaged_aside(folder: Path) -> None:
    """Make the arm in the folder go on from before what is damaged: its last steps are then made again, the same."""
    if (folder / "ingredients.json").exists() and _recorded(folder) is None:
        set_aside(folder, ["ingredients.json"])  # nobody knows what it is made of
        return
    manifest, is_damaged = folder / "manifest.json", False
    if manifest.exists() and (_read(manifest) is None or damage(manifest)):
        set_aside(manifest)
    for path in by_step(folder / "trainer").values():
        names = damage(path)
        if names or (manifest.exists() and torn(path)):
            set_aside(path, names or ["trainer_state.json"])
            is_damaged = True
        elif is_damaged:
            shutil.rmtree(path)
    if manifest.exists() and not _is_finished(folder):
        manifest.unlink()


def _set_aside(folder: Path, made_of: dict[str, Any]) -> None:
    """An arm in the folder that is made of something else goes to `<folder>.<hash>`; one made of this comes back."""
    other = _recorded(folder)
    if other is not None and other != made_of:
        aside = folder.with_name(f"{folder.name}.{content_hash(other)}")
        os.replace(folder, aside)
        changed = ", ".join(name for name in made_of if other.get(name) != made_of[name])
        message = "%s is trained anew, for its %s changed; the earlier one is kept as %s"
        logging.getLogger(__name__).warning(message, folder.name, changed, aside.name)
    earlier = folder.with_name(f"{folder.name}.{content_hash(made_of)}")
    if earlier.exists() and not folder.exists():
        os.replace(earlier, folder)


def _defaults() -> dict[str, Any]:
    on_gpu, on_cuda = torch.accelerator.is_available(), torch.cuda.is_available()
    return {
        "report_to": "none",
        "logging_steps": 10,
        "save_strategy": "steps",
        "disable_tqdm": not show_progress(),
        "bf16": on_cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": not on_gpu,
        "gradient_checkpointing": on_gpu,
        "dataloader_pin_memory": on_cuda,
    }


def _last_checkpoint(folder: Path) -> Path | None:
    for path in reversed(by_step(folder / "trainer").values()):
        if not torn(path):
            return path
        shutil.rmtree(path)
    return None


@cache
def _code_hash() -> str:
    """Of the modules that determine what is trained."""
    package = Path(__file__).parents[1]
    return content_hash([(package / f"{name}.py").read_text(encoding="utf-8") for name in TRAINED_BY])


def _libraries() -> list[str] | None:
    """Versions of the libraries that train, whatever their build; None where `$TASFT_ANY_LIBRARIES` lets any be right.

    So a laptop can read what a cluster trained, which has others. Manifests say which they were.
    """
    return None if os.environ.get("TASFT_ANY_LIBRARIES") else _versions()


@cache
def _versions() -> list[str]:
    versions = (transformers.__version__, torch.__version__, version("trl"), version("peft"))
    return [number.partition("+")[0] for number in versions]
