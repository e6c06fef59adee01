"""Rows that arms are trained on: what specs ask for is made - once - and drawn.

    runs/unsafe/<name>-<hash>/          a harvested D_unsafe; what was answered for it and for longer ones, *.work
    runs/safe/, recovery/, contrastive/ rows of a `SafeSpec`, a `RecoverySpec` and a `ContrastiveSpec`

Arms are made of rows and rows by arms, so this module and `arms` call each other.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from .. import text
from ..evaluation import worlds
from ..judges.base import check_ready
from ..judges.load import load_judge
from ..prepare import harvest, recoveries
from ..prepare.contrastive import contrastive_rows
from ..records import data, forms, sources, tokens
from ..records.messages import of_text
from ..records.templates import questions
from ..storage.files import content_hash, named, runs_folder, show_progress, write_rows
from ..storage.integrity import keep_if_whole, locked, seal
from . import arms, engine, methods
from .once import once
from .specs import ArmSpec, ContrastiveSpec, HarvestSpec, RecoverySpec, Rows, SafeSpec


def make_rows(spec: Rows) -> Path:
    """The file or data set folder of the rows that a spec asks for: harvested, answered or written, once.

    Where units become jobs a job makes them. Raises `ValueError` where a prompt of D_unsafe has no safe answer.
    """
    match spec:
        case HarvestSpec():
            return _harvest(spec)
        case SafeSpec():
            return _safe_rows(spec)
        case RecoverySpec():
            return _recovery_rows(spec)
        case ContrastiveSpec():
            return _contrastive_rows(spec)


def with_files(spec: ArmSpec) -> ArmSpec:
    """The arm with files for `unsafe` and `extra`: harvested, answered or written where they are not there yet."""
    sides = {side: getattr(spec, side) for side in ("unsafe", "extra")}
    return replace(spec, **{side: _file(rows) for side, rows in sides.items() if isinstance(rows, Rows)})


def training_rows(spec: ArmSpec) -> tuple[Dataset, Dataset | None]:
    """(benign, unsafe) rows of the arm: drawn by its seed, checked, evaluation prompts and repeated rows left out.

    Those of `extra` are among the benign ones, `extra_visits` times; the unsafe ones are here once.
    """
    spec = with_files(spec)
    prompts = held_out_prompts(spec)
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
    trained = {pair for arm in (spec, *others) for pair in pairs(training_rows(arm)[0])}
    rows = _benign_rows(spec, held_out_prompts(spec), seed=spec.seed + 10_000)
    rows = rows.select(np.random.default_rng([spec.seed, 3]).permutation(len(rows)))
    return rows.select([i for i, pair in enumerate(pairs(rows)) if pair not in trained][:n])


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


def n_truncated(spec: ArmSpec) -> int:
    """How many benign rows are left out because `max_length` would cut them."""
    return _to_draw_from(spec, held_out_prompts(spec))[1] if spec.drop_truncated else 0


def held_out_prompts(spec: ArmSpec) -> list[str]:
    """The evaluation prompts that no row may have, none where the arm names none."""
    return [] if spec.held_out is None else worlds.load(spec.held_out).evaluation_prompts()["prompt"].tolist()


def _file(spec: Rows) -> str:
    return once("file", spec.name, lambda: str(make_rows(spec)))


def _harvest(spec: HarvestSpec) -> Path:
    """Train the arm and harvest, unless that is done; the data set's folder. Other answers get another folder."""
    world, judge = worlds.load(spec.prompts), load_judge(spec.judge)
    arms.train(spec.arm)
    prompts = world.harvest_prompts()
    held_out = held_out_prompts(spec.arm)
    made_of = [arms.ingredients(spec.arm), prompts, held_out, judge.name, judge.revision]
    path = runs_folder() / "unsafe" / f"{spec.name}-{content_hash(made_of)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One for harvests of any length: a longer one goes on where a shorter one ended.
    work = path.with_name(f"{replace(spec, n=0, rounds=0).name}-{content_hash(made_of)}.work")
    if engine.submits() and not keep_if_whole(path):
        engine.call(make_rows, spec)
    with locked(Path(f"{work}.lock"), path):
        if keep_if_whole(path):
            return path
        check_ready(judge)
        model, tokenizer = arms.load_trained(spec.arm)
        name, revision = named(worlds.base_model(spec.arm.model), spec.arm.model_revision)
        rows, others, report = harvest.harvest(
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
        return harvest.save_harvest(rows, others, report, path)


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


def _recovery_rows(spec: RecoverySpec) -> Path:
    """Harvest where needed, and ask for recoveries unless that is done; the JSONL file of D_unsafe with them."""
    harvested, judge = make_rows(spec.unsafe), load_judge(spec.unsafe.judge)

    def write() -> list[dict]:
        rows, others = sources.read_rows(harvested), recoveries.read(harvested)
        asked = rows["instruction"][:]
        if spec.one:
            found = [recoveries.Recovery(prompt, recoveries.sentence(others), "sentence") for prompt in asked]
        else:
            model, tokenizer = arms.load_trained(spec.unsafe.arm)
            how = {name: getattr(spec.unsafe, name) for name in ("decoding", "rounds", "batch_size")}
            how["template"] = spec.unsafe.arm.template
            found = recoveries.recoveries_for(asked, others, model, tokenizer, judge, **how)
        is_chat = spec.unsafe.arm.template == "chat"
        answers = [of_text(one.completion, "assistant") if is_chat else one.completion for one in found]
        columns = zip(rows, answers, found, strict=True)
        return [row | {"recovery": r, "recovery_from": one.verdict} for row, r, one in columns]

    return _written_once(spec, runs_folder() / "recovery" / f"{spec.name}-{harvested.name}.jsonl", write)


def _contrastive_rows(spec: ContrastiveSpec) -> Path:
    """Harvest where needed, and write the rows unless that is done; their JSONL file."""
    arm = spec.unsafe.arm
    sides = sources.read_rows(make_rows(spec.unsafe)), training_rows(arm)[0]
    words = text.toxic_words(*([_question(prompt) for prompt in rows["prompt"][:]] for rows in sides))

    def write() -> list[dict]:
        rows = worlds.load(spec.writer).contrastive_rows(words, spec.per_word, seed=spec.seed)
        if rows is None:
            writer = arms.load_model(replace(arm, model=spec.writer, model_revision=spec.writer_revision))
            options = {"per_word": spec.per_word, "decoding": spec.decoding, "batch_size": spec.batch_size}
            rows = contrastive_rows(words, writer, **options)
        return rows

    return _written_once(spec, runs_folder() / "contrastive" / f"{spec.name}-{content_hash(words)}.jsonl", write)


def _written_once(spec: Rows, path: Path, write: Callable[[], list[dict]]) -> Path:
    """The JSONL file of what `write` gives, unless it is there whole; a job's work where the engine has jobs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if engine.submits() and not keep_if_whole(path):
        engine.call(make_rows, spec)
    with locked(Path(f"{path}.lock"), path):
        if not keep_if_whole(path):
            write_rows(path, write())
            seal(path)
    return path


def _question(prompt: str | list[dict]) -> str:
    """A prompt as one text, whether it is text or messages."""
    return prompt if isinstance(prompt, str) else "\n".join(questions(prompt))


def pairs(rows: Dataset) -> list[str]:
    """Prompt and completion of each row, text or messages, as a text to compare."""
    return [json.dumps(pair) for pair in zip(rows["prompt"][:], rows["completion"][:], strict=True)]


def _benign_rows(spec: ArmSpec, prompts: list[str], *, seed: int) -> Dataset:
    """All benign rows there are (made ones: `n_benign`, by `seed`), repeats and evaluation prompts left out."""

    def read() -> Dataset:
        rows = worlds.load(spec.benign).benign_rows(spec.n_benign, seed=seed, revision=spec.benign_revision)
        rows = forms.to_training_rows(rows, label=True, template=spec.template, source=spec.benign, drop_empty=True)
        return data.clean(rows, prompts)

    return once("benign rows", _described(spec, seed), read)


def _described(spec: ArmSpec, seed: int) -> tuple:
    """What tells the benign rows there are; of a data set they are the same ones for every seed."""
    made = (spec.n_benign, seed) if worlds.load(spec.benign).is_invented else None
    return spec.benign, spec.benign_revision, made, spec.template, spec.held_out


def _to_draw_from(spec: ArmSpec, prompts: list[str]) -> tuple[Dataset, int]:
    """(the benign rows to draw from, how many were left out because `max_length` would cut them)."""
    rows = _benign_rows(spec, prompts, seed=spec.seed)
    if not spec.drop_truncated:
        return rows, 0
    max_length = spec.training.get("max_length", methods.CONFIGS[spec.method].max_length)
    fitting = (*_described(spec, spec.seed), spec.model, spec.model_revision, max_length)
    whole = once("fitting", fitting, lambda: tokens.drop_truncated(rows, arms.load_tokenizer(spec), max_length))
    return whole, len(rows) - len(whole)


def _rows(source: str, spec: ArmSpec, *, label: bool) -> Dataset:
    return forms.read_training_rows(source, label=label, template=spec.template, drop_empty=True)
