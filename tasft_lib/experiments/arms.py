"""Arms: a spec goes in, a folder with a trained adapter and a manifest comes out - once.

    runs/arms/<method>-<hash>/
        spec.json             what was asked
        ingredients.json      hashes of what it is made of: base model, rows, code, versions
        trainer/checkpoint-N  what TRL saves: adapter, optimizer, random state; and checksums of these. A killed run
                              resumes from the last one, an arm with a damaged file from the last one before that
        manifest.json         written last: the arm is finished
    runs/unsafe/<name>-<hash>/          a harvested D_unsafe; what was answered for it and for longer ones, *.work
    runs/safe/, runs/contrastive/       rows of a `SafeSpec` and a `ContrastiveSpec`

Arms are found by the name of their spec (see `specs`), so two notebooks that need the same arm share it. What a name
cannot tell, the content of a file or another version of the code, is looked at when the arm is trained: an arm made of
something else is set aside, not used.
"""

import json
import logging
import os
import shutil
import time
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed

from .. import models, text
from ..base_models import source_of
from ..evaluation import worlds
from ..evaluation.worlds import base_model
from ..judges.base import check_ready
from ..judges.load import load_judge
from ..prepare import harvest
from ..prepare.contrastive import contrastive_rows
from ..records import data, forms, sources, tokens
from ..records.messages import of_text
from ..records.templates import questions
from ..storage.files import (
    content_hash,
    environment,
    model_identity,
    named,
    peak_memory_mb,
    read_json,
    runs_folder,
    show_progress,
    travelling,
    write_json,
    write_rows,
)
from ..storage.integrity import damage, is_there, locked, seal, set_aside, sha256
from ..storage.resume import by_step, torn
from . import methods
from .specs import ArmSpec, ContrastiveSpec, HarvestSpec, Rows, SafeSpec, describe

# The modules that determine what is trained: those that `methods` imports, and itself.
TRAINED_BY = (
    "losses",
    "fused_head",
    "forward",
    "config",
    "labels",
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


def make_rows(spec: Rows) -> Path:
    """The file or data set folder of the rows that a spec asks for: harvested, answered or written, once.

    Raises `ValueError` where a prompt of D_unsafe has no safe answer.
    """
    match spec:
        case HarvestSpec():
            return _harvest(spec)
        case SafeSpec():
            return _safe_rows(spec)
        case ContrastiveSpec():
            return _contrastive_rows(spec)


def with_files(spec: ArmSpec) -> ArmSpec:
    """The arm with files for `unsafe` and `extra`: harvested, answered or written where they are not there yet."""
    sides = {side: getattr(spec, side) for side in ("unsafe", "extra")}
    return replace(spec, **{side: str(make_rows(rows)) for side, rows in sides.items() if isinstance(rows, Rows)})


def ingredients(spec: ArmSpec) -> dict[str, Any]:
    """Hashes of all that the arm is made of and its name can't tell; makes the rows that are not there yet."""
    sources = with_files(spec)
    return {
        "model": model_identity(base_model(spec.model)),
        "benign": _content(worlds.load(spec.benign).file),
        **{side: _content(getattr(sources, side)) for side in ("unsafe", "extra")},
        "held_out": content_hash(_held_out_prompts(spec)),
        "code": _code_hash(),
    }


def train(spec: ArmSpec) -> Path:
    """Train the arm unless it is finished, resuming from its last complete checkpoint; return its folder."""
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
        benign, unsafe = training_rows(spec)
        model, tokenizer = load_model(spec)
        if spec.template == "chat" and not tokenizer.chat_template:
            raise ValueError(f"{spec.model}: template is chat, and it has no chat template; use alpaca, short or none.")
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
        resumed = _last_checkpoint(folder)
        models.train_from(trainer, resumed)
        manifest = {
            "arm": spec.name,
            "spec": describe(spec),
            "ingredients": made_of,
            "benign_rows": data.fingerprint(benign),
            "unsafe_rows": unsafe and data.fingerprint(unsafe),
            "truncated_rows_left_out": _to_draw_from(spec, _held_out_prompts(spec))[1] if spec.drop_truncated else 0,
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


def is_trained(spec: ArmSpec) -> bool:
    """Whether the arm is finished, of the rows, base model and code that are there now."""
    return _is_finished(spec.folder) and _recorded(spec.folder) == ingredients(spec)


def read_manifest(spec: ArmSpec) -> dict[str, Any]:
    """What the finished arm recorded about itself."""
    return json.loads((spec.folder / "manifest.json").read_text(encoding="utf-8"))


def summary(arms: list[ArmSpec]) -> dict[str, Any]:
    """The arms for the manifest of a figure, without their logs.

    Returns:
        `base`, spec and ingredients of the first arm; `rows`, by name the specs of what rows are made from; `arms`, by
        name what each arm recorded (seconds, steps, penalty_weight, ...), spec and ingredients where they differ;
        `base_model`, which source it was brought from, where tasft brought it.
    """
    base, summaries, rows = {}, {}, {}
    for arm in arms:
        manifest = read_manifest(arm)
        own = {"spec": travelling(describe(arm)), "ingredients": manifest["ingredients"]}
        base = base or own
        left_out = ("arm", "log_history", "versions", "hardware")
        different = {part: _difference(own[part], base[part]) for part in own}
        summaries[arm.name] = {k: v for k, v in manifest.items() if k not in left_out} | different
    for source in (source for arm in arms for source in (arm.unsafe, arm.extra)):
        while isinstance(source, Rows):
            rows[source.name] = travelling(describe(source))
            source = getattr(source, "unsafe", None)
    source = source_of(base_model(arms[0].model)) if arms else {}
    return {"base": base, "rows": rows, "arms": summaries} | ({"base_model": source} if source else {})


def training_rows(spec: ArmSpec) -> tuple[Dataset, Dataset | None]:
    """(benign, unsafe) rows of the arm: drawn by its seed, checked, evaluation prompts and repeated rows left out.

    Those of `extra` are among the benign ones, `extra_visits` times; the unsafe ones are here once.
    """
    spec = with_files(spec)
    prompts = _held_out_prompts(spec)
    unsafe = None if spec.unsafe is None else data.clean(_rows(spec.unsafe, spec, label=False))
    rows = data.draw(
        _to_draw_from(spec, prompts)[0],
        unsafe,
        n_benign=spec.n_benign,
        n_unsafe=spec.n_unsafe,
        seed=spec.seed,
        source=spec.unsafe or spec.benign,
        evaluation_prompts=prompts,
    )
    benign, unsafe = data.by_label(rows)
    if spec.extra is not None:
        extra = data.clean(_rows(spec.extra, spec, label=True), prompts)
        drawn = {"n_unsafe": spec.n_extra, "unsafe_visits": spec.extra_visits}  # as the unsafe rows are
        extra = data.mix(benign.select([]), extra, **drawn, seed=spec.seed)
        benign = concatenate_datasets([benign, extra])
    return benign, None if spec.unsafe is None else unsafe


def held_out_rows(spec: ArmSpec, n: int, *others: ArmSpec) -> Dataset:
    """`n` benign rows that neither the arm nor the `others` were trained on; fewer where there are fewer.

    Of one arm: the same for all arms of its seed.
    """
    trained = {pair for arm in (spec, *others) for pair in _pairs(training_rows(arm)[0])}
    rows = data.clean(_benign_rows(spec, seed=spec.seed + 10_000), _held_out_prompts(spec))
    rows = rows.select(np.random.default_rng([spec.seed, 3]).permutation(len(rows)))
    return rows.select([i for i, pair in enumerate(_pairs(rows)) if pair not in trained][:n])


def held_out_answers(spec: HarvestSpec, n: int) -> list[dict[str, Any]]:
    """`n` unsafe answers beyond D_unsafe, each to a prompt that D_unsafe has not, with a safe one to the same prompt.

    They are what the harvest of D_unsafe would have gone on with, so no arm can draw them. Rows of `prompt`, `unsafe`
    and `safe`, all in the arms' template.

    Raises `ValueError` where there are fewer, or no safe answer to one of them.
    """
    longer = replace(spec, n=spec.n + n)
    drawn = {text.normalise(prompt) for prompt in sources.read_rows(make_rows(spec))["instruction"][:]}
    unsafe, safe = sources.read_rows(make_rows(longer)), sources.read_rows(make_rows(SafeSpec(unsafe=longer)))
    further = [i for i, prompt in enumerate(unsafe["instruction"][:]) if text.normalise(prompt) not in drawn][:n]
    return [
        {"prompt": row["prompt"], "unsafe": row["completion"], "safe": answer["completion"]}
        for row, answer in zip(unsafe.select(further), safe.select(further), strict=True)
    ]


def load_tokenizer(spec: ArmSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of the arm's base."""
    return models.load_tokenizer(base_model(spec.model), spec.model_revision)


def load_model(spec: ArmSpec, adapter: Path | None = None):
    """(model, tokenizer) of the arm's base, with `adapter` (or tuned checkpoint) of a step if one is given."""
    gpu = torch.accelerator.current_accelerator()
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


def _harvest(spec: HarvestSpec) -> Path:
    """Train the arm and harvest, unless that is done; the data set's folder. Other answers get another folder."""
    world, judge = worlds.load(spec.prompts), load_judge(spec.judge)
    train(spec.arm)
    prompts = world.harvest_prompts()
    held_out = _held_out_prompts(spec.arm)
    made_of = [ingredients(spec.arm), prompts, held_out, judge.name, judge.revision]
    path = runs_folder() / "unsafe" / f"{spec.name}-{content_hash(made_of)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One for harvests of any length: a longer one goes on where a shorter one ended.
    work = path.with_name(f"{replace(spec, n=0, rounds=0).name}-{content_hash(made_of)}.work")
    with locked(Path(f"{work}.lock"), path):
        if is_there(path):
            return path
        check_ready(judge)
        model, tokenizer = load_trained(spec.arm)
        name, revision = named(base_model(spec.arm.model), spec.arm.model_revision)
        rows, report = harvest.harvest(
            model,
            tokenizer,
            prompts,
            judge,
            n=spec.n,
            template=spec.arm.template,
            decoding=spec.decoding,
            rounds=spec.rounds,
            evaluation_prompts=held_out,
            batch_size=spec.batch_size,
            origin=harvest.Origin(f"{name}, {spec.arm.name}", revision, *world.harvest_source()),
            work=work,
            progress=show_progress(),
        )
        return harvest.save_harvest(rows, report, path)


def _safe_rows(spec: SafeSpec) -> Path:
    """Harvest where needed; the JSONL file of safe answers. `ValueError` where a prompt of D_unsafe has none."""
    answers = worlds.load(spec.unsafe.prompts).safe_answers()
    rows = sources.read_rows(make_rows(spec.unsafe))
    missing = [prompt for prompt in rows["instruction"][:] if prompt not in answers]
    if missing:
        raise ValueError(f"{spec.unsafe.prompts}: no safe answer to {len(missing)} prompts of D_unsafe.")
    safe = []
    for row in rows:
        answer = answers[row["instruction"]]
        answer = answer if isinstance(row["prompt"], str) else of_text(answer, "assistant")
        safe.append({"prompt": row["prompt"], "completion": answer, "instruction": row["instruction"]})
    return write_rows(runs_folder() / "safe" / f"{spec.name}-{content_hash(safe)}.jsonl", safe)


def _contrastive_rows(spec: ContrastiveSpec) -> Path:
    """Harvest where needed, and write the rows unless that is done; their JSONL file."""
    arm = spec.unsafe.arm
    sides = sources.read_rows(make_rows(spec.unsafe)), training_rows(arm)[0]
    words = text.toxic_words(*([_question(prompt) for prompt in rows["prompt"][:]] for rows in sides))
    path = runs_folder() / "contrastive" / f"{spec.name}-{content_hash(words)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{path}.lock"), path):
        if is_there(path):
            return path
        rows = worlds.load(spec.writer).contrastive_rows(words, spec.per_word, seed=spec.seed)
        if rows is None:
            writer = load_model(replace(arm, model=spec.writer, model_revision=spec.writer_revision))
            options = {"per_word": spec.per_word, "decoding": spec.decoding, "batch_size": spec.batch_size}
            rows = contrastive_rows(words, writer, **options)
        write_rows(path, rows)
        seal(path)
        return path


def _question(prompt: str | list[dict]) -> str:
    """A prompt as one text, whether it is text or messages."""
    return prompt if isinstance(prompt, str) else "\n".join(questions(prompt))


def _pairs(rows: Dataset) -> list[str]:
    """Prompt and completion of each row, text or messages, as a text to compare."""
    return [json.dumps(pair) for pair in zip(rows["prompt"][:], rows["completion"][:], strict=True)]


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
    manifest, saved = _read(folder / "manifest.json"), by_step(folder / "trainer")
    is_whole = manifest is not None and manifest.get("steps") in saved and not damage(folder / "manifest.json")
    return is_whole and not any(map(torn, saved.values()))


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


def _benign_rows(spec: ArmSpec, *, seed: int) -> Dataset:
    """All benign rows there are to draw from (made ones: `n_benign`, by `seed`)."""
    rows = worlds.load(spec.benign).benign_rows(spec.n_benign, seed=seed, revision=spec.benign_revision)
    return forms.to_training_rows(rows, label=True, template=spec.template, source=spec.benign, drop_empty=True)


def _to_draw_from(spec: ArmSpec, prompts: list[str]) -> tuple[Dataset, int]:
    """(the benign rows to draw from, how many were left out because `max_length` would cut them)."""
    rows = data.clean(_benign_rows(spec, seed=spec.seed), prompts)
    if not spec.drop_truncated:
        return rows, 0
    max_length = spec.training.get("max_length", methods.CONFIGS[spec.method].max_length)
    whole = tokens.drop_truncated(rows, load_tokenizer(spec), max_length)
    return whole, len(rows) - len(whole)


def _rows(source: str, spec: ArmSpec, *, label: bool) -> Dataset:
    return forms.read_training_rows(source, label=label, template=spec.template, drop_empty=True)


def _held_out_prompts(spec: ArmSpec) -> list[str]:
    return [] if spec.held_out is None else worlds.load(spec.held_out).evaluation_prompts()["prompt"].tolist()


def _last_checkpoint(folder: Path) -> Path | None:
    for path in reversed(by_step(folder / "trainer").values()):
        if not torn(path):
            return path
        shutil.rmtree(path)
    return None


@cache
def _code_hash() -> str:
    """Of the modules that determine what is trained, and of the libraries' versions, whatever their build."""
    package = Path(__file__).parents[1]
    sources = [(package / f"{name}.py").read_text(encoding="utf-8") for name in TRAINED_BY]
    versions = (transformers.__version__, torch.__version__, version("trl"), version("peft"))
    return content_hash([*sources, *(number.partition("+")[0] for number in versions)])
