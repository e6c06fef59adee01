"""The folder of a training: what it holds, the checkpoint to go on from, and what in it is the user's."""

import json
import logging
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from trl import ModelConfig

from ..config import TASFTConfig
from ..storage import files, integrity
from ..storage.resume import by_step, torn

# Trainer uploads nothing that begins with "_".
SETTINGS = "_settings.json"
# What a training leaves beside checkpoints and model.
LEFT = (files.RECORD, SETTINGS, "training_args.bin", "adapter_model.bin", "_samples.jsonl")
# Options, or how their names begin, that change nothing in what is trained; data options are in the hash of the rows.
WITHOUT_EFFECT = (
    "output_dir", "overwrite", "resume_from_checkpoint", "logging_", "log_", "report_to", "run_name", "project",
    "trackio_", "disable_tqdm", "hub_", "push_to_hub", "save_", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "dataset_num_proc", "local_rank", "ddp_timeout", "skip_memory_metrics", "do_", "per_device_eval_batch_size",
    "eval_accumulation_steps", "ignore_data_skip", "restore_callback_states", "model_name_or_path",
)  # fmt: skip

# How long it lasts; may change while it is unfinished, and where a checkpoint to go on from is named.
LENGTH = ("max_steps", "num_train_epochs")


def settings(args: Any, model_args: Any, rows_hash: str, base: str, *, patience: int | None = None) -> dict[str, Any]:
    """What decides on the outcome of a training, as JSON has it; tokens are hidden. `patience` is of early stopping."""
    options = vars(model_args) | args.to_dict() | {"world_size": args.world_size}
    kept = {name: value for name, value in options.items() if not name.startswith(WITHOUT_EFFECT)}
    kept |= {} if patience is None else {"early_stopping_patience": patience}
    return json.loads(json.dumps(kept | {"rows": rows_hash, "base_model": base}, sort_keys=True, default=str))


def begin(
    folder: Path,
    asked: dict[str, Any],
    *,
    overwrite: bool,
    resume: str | bool | None,
    reads: Sequence[tuple[str, str]] = (),
) -> Path | None:
    """Take the folder for a training with these settings; the checkpoint to go on from, None where there is none.

    Args:
        overwrite: what another training left is removed; the user's own files are not.
        resume: a checkpoint that the user names; False not to go on from any, None for the newest whole one.
        reads: options and their paths, which the training reads and nothing may remove.

    Raises:
        ValueError: the folder holds a training or model of other settings, a checkpoint that was named is torn, the one
            to go on from is past the last step, or `overwrite` would remove what is read.
    """
    held = _held(folder, asked)
    if overwrite and (held != asked or is_finished(folder, asked) or resume is False):
        _remove_training(folder, reads)
        held = None
    if held is None and not resume and (names := _left(folder)):
        what = f"holds {names[0]} of another training"
        raise ValueError(f"{folder}: {what}; give another output_dir, or --overwrite to replace it")
    _refuse_other(folder, held, asked, any_length=bool(resume))
    if resume:
        checkpoint = Path(resume)
        _refuse_other(checkpoint.parent, _held(checkpoint.parent, asked), asked, any_length=True)
        if names := torn(checkpoint):
            remedy = "leave out resume_from_checkpoint to take the newest whole one"
            raise ValueError(f"{checkpoint}: torn ({', '.join(names)}); {remedy}")
    else:
        checkpoint = _newest_whole(folder)
        if resume is False and checkpoint is not None:
            what = f"holds {checkpoint.name}, and resume_from_checkpoint is false"
            raise ValueError(f"{folder}: {what}; leave it out to go on, or give --overwrite to begin anew")
    if checkpoint is not None and 0 < asked.get("max_steps", 0) < _step(checkpoint):
        what = f"is past max_steps={asked['max_steps']}"
        raise ValueError(f"{checkpoint}: {what}; raise it, or give --overwrite to begin anew")
    if held != asked:
        folder.mkdir(parents=True, exist_ok=True)
        own = _has_own_readme(folder) if held is None else files.read_object(folder / SETTINGS)["own_readme"]
        files.write_json(folder / SETTINGS, asked | {"own_readme": own})
    return checkpoint


def is_finished(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether the folder holds the model of a training with these settings."""
    return _held(folder, asked) == asked and (folder / files.RECORD).exists()


def keep_readme(trainer: Any) -> None:
    """Leave a README.md alone that lay in the folder before training; TRL and PEFT would write over it.

    In TRL's own the tags, a set, are sorted: equal trainings leave equal files.
    """
    write = trainer.create_model_card

    def write_sorted(*args: Any, **options: Any) -> None:
        write(*args, **options)
        card = Path(trainer.args.output_dir) / "README.md"
        if trainer.is_world_process_zero() and card.exists():
            text = card.read_text(encoding="utf-8")
            by_tag = re.sub(r"(?m)(?<=^tags:\n)(- .*\n)+", lambda tags: "".join(sorted(tags[0].splitlines(True))), text)
            files.write_text(card, by_tag)

    trainer.create_model_card = write_sorted
    file = Path(trainer.args.output_dir) / SETTINGS
    if file.exists() and files.read_object(file).get("own_readme"):
        trainer.create_model_card = lambda *_, **__: None
        if hasattr(trainer.model, "create_or_update_model_card"):
            trainer.model.create_or_update_model_card = lambda *_, **__: None


def _held(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the training in the folder. Options that only `asked` has came with a later version: the training
    did what their defaults do."""
    if not (folder / SETTINGS).exists():
        return None
    held = files.read_object(folder / SETTINGS)
    held = {name: value for name, value in held.items() if name != "own_readme"}
    if new := set(asked) - set(held):
        defaults = settings(TASFTConfig(output_dir=""), ModelConfig(), "", "")
        held |= {name: defaults[name] for name in new & set(defaults)}
    return held


def _refuse_other(folder: Path, held: dict[str, Any] | None, asked: dict[str, Any], *, any_length: bool) -> None:
    names = sorted(name for name in (held or asked) | asked if (held or asked).get(name) != asked.get(name))
    if any_length or not (folder / files.RECORD).exists():
        names = [name for name in names if name not in LENGTH]
    if names:
        what = f"holds a training with other {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise ValueError(f"{folder}: {what}; give another output_dir, or --overwrite to begin anew")


def _left(folder: Path) -> list[str]:
    """What trainings and models leave in a folder, by name."""
    patterns = (*LEFT, *files.MODEL_FILES, "checkpoint-*")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _remove_training(folder: Path, reads: Sequence[tuple[str, str]]) -> None:
    """Remove what `_left` names. Raises `ValueError`, with all still there, where some of that is to be read."""
    paths = [folder / name for name in _left(folder)]
    for option, source in reads:
        if any(Path(source).resolve().is_relative_to(path.resolve()) for path in paths):
            raise ValueError(f"{source}: {option} lies in what --overwrite removes; give another output_dir")
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (folder / "README.md").exists() and not _has_own_readme(folder):
        (folder / "README.md").unlink()


def _step(checkpoint: Path) -> int:
    return files.read_object(checkpoint / "trainer_state.json")["global_step"]


def _has_own_readme(folder: Path) -> bool:
    from ..publish.card import is_generated

    return (folder / "README.md").exists() and not is_generated(folder / "README.md")


def _newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; newer ones are set aside, with a word."""
    for path in reversed(by_step(folder).values()):
        names = torn(path) or ([] if integrity.is_sealed(path) else ["not written to its end"])
        if names:
            integrity.set_aside(path, names)
        elif any(path.glob("optimizer*")) or any(path.glob("global_step*")):
            return path
        else:
            what = "%s holds no optimizer (save_only_model), so nothing can go on from it"
            logging.getLogger(__name__).warning(what, path)
    return None
