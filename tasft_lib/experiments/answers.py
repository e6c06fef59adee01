"""From arms to tables: train where needed, answer the prompts at each checkpoint, judge the answers; or measure what
the arm finds likely.

runs/arms/<arm>/responses/<hash>/step-N.jsonl   answers, per set of prompts and decoding; generated once
runs/arms/<arm>/likelihoods/<hash>/step-N.csv   of held-out rows, without text
runs/arms/<arm>/judgements/<judge>.jsonl        labels by text hash, without text; one process writes at a time
runs/arms/<arm>/counts.jsonl                    how many answers got which verdict, for `status.rates`
runs/arms/<arm>/failed.json                     why it did not come to an end, until it does

`run` and `measure` are the units of work: whoever calls one, a pool, a cluster's job or a shell, what is there is not
made again, two at once wait for each other, and a killed one is called again.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, product
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from .. import generation
from ..evaluation.answers import asked_and_begun, judge_answers, questions
from ..evaluation.preference import DEPTHS, HeldOut, likelihoods
from ..evaluation.rates import counts
from ..evaluation.worlds import base_model
from ..judges import load
from ..judges.base import ExactJudge, Judge, check_ready
from ..storage.files import (
    checked,
    content_hash,
    full_disk_named,
    model_identity,
    read_records,
    runs_folder,
    show_progress,
    write_json,
    write_text,
)
from ..storage.integrity import damage, keep_if_whole, locked, seal, set_aside
from ..storage.resume import by_step
from . import engine
from .arms import check_options, has_ended, load_model, load_tokenizer, train
from .once import looked_at_once, once
from .rows import make_rows
from .specs import ArmSpec, Rows


@contextmanager
def _quick_collection() -> Iterator[None]:
    """Letting a model go searches what was made inside, not the million objects of the libraries each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_all(
    specs: list[ArmSpec],
    prompts: pd.DataFrame,
    decodings: list[generation.Decoding],
    judge_name: str | None = None,
    *,
    steps: str = "last",
    batch_size: int = 64,
    workers: int | None = None,
) -> pd.DataFrame:
    """`run` for many arms by the chosen engine, see `engine`; on this machine in `workers` processes of one thread
    (default: `engine.default_workers`).

    An arm that fails does not stop the others; they are finished and kept, then the first failure is raised.
    """
    options = {"prompts": prompts, "decodings": decodings, "judge_name": judge_name, "steps": steps}
    work = partial(run, **options, batch_size=batch_size)
    return _each(specs, work, lambda spec: _is_judged(spec, prompts, decodings, judge_name, steps), workers)


def measure_all(
    specs: list[ArmSpec],
    held_out: HeldOut,
    *,
    steps: str = "last",
    batch_size: int = 8,
    workers: int | None = None,
) -> pd.DataFrame:
    """`measure` for many arms, as `run_all` runs them."""
    work = partial(measure, held_out=held_out, steps=steps, batch_size=batch_size)
    return _each(specs, work, lambda spec: _is_measured(spec, held_out, steps), workers)


@_quick_collection()
@looked_at_once()
def _each(
    specs: list[ArmSpec],
    work: Callable[[ArmSpec], pd.DataFrame],
    is_done: Callable[[ArmSpec], bool],
    workers: int | None,
) -> pd.DataFrame:
    """What `work` makes of each arm, one below the other."""
    # What many arms need is made first, where its bar is seen and no worker, nor a job that holds a GPU, waits for it.
    shared = (source for spec in specs for source in (spec.unsafe, spec.extra) if isinstance(source, Rows))
    for source in {source.name: source for source in shared}.values():
        make_rows(source)
    are_done = [is_done(spec) for spec in specs]
    missing = [i for i, is_there in enumerate(are_done) if not is_there]
    check_options([specs[i] for i in missing])
    workers = min(engine.default_workers() if workers is None else workers, max(len(missing), 1))
    # What is there is read here.
    read = ((i, engine.attempt(work, spec)) for i, spec in enumerate(specs) if are_done[i])
    made = ((missing[i], result) for i, result in engine.results(work, [specs[i] for i in missing], workers))
    done: dict[int, pd.DataFrame] = {}
    failures: list[tuple[ArmSpec, BaseException]] = []
    with tqdm(total=len(specs), desc="arms", unit="arm", disable=not show_progress()) as bar:
        for i, result in chain(read, made):
            spec = specs[i]
            name = spec.display_name or spec.method
            bar.set_postfix_str(f"{name} λ={spec.penalty_weight} seed={spec.seed}", refresh=False)
            bar.update()
            if isinstance(result, BaseException):
                failures.append((spec, result))
                _record_failure(spec, result)
            else:
                done[i] = result
                (spec.folder / "failed.json").unlink(missing_ok=True)
    if failures:
        spec, error = failures[0]
        raise ValueError(f"arm {spec.name} ({len(failures)} of {len(specs)} failed): {error}") from error
    return pd.concat([done[i] for i in range(len(specs))], ignore_index=True)


def run(
    spec: ArmSpec,
    prompts: pd.DataFrame,
    decodings: list[generation.Decoding],
    judge_name: str | None = None,
    *,
    steps: str = "last",
    batch_size: int = 64,
) -> pd.DataFrame:
    """`train` the arm, `respond` with each of `decodings`, and judge the answers if a judge is named."""
    judge = None if judge_name is None else load.load_judge(judge_name)
    is_answered = _is_answered(spec, prompts, decodings, steps)
    if judge is not None and not is_answered:
        check_ready(judge)
    with full_disk_named(spec.folder):
        if not is_answered:
            train(spec)
        answers = [respond(spec, prompts, d, steps=steps, batch_size=batch_size) for d in decodings]
        answers = pd.concat(answers, ignore_index=True)
        if judge is None:
            return answers
        with locked(spec.folder / "judgements.lock", spec.folder):
            judged = judge_answers(answers, [judge], cache=spec.folder / "judgements")
            _count(judged, spec, prompts, decodings, judge)
    return judged


def respond(
    spec: ArmSpec, prompts: pd.DataFrame, decoding: generation.Decoding, *, steps: str = "last", batch_size: int = 64
) -> pd.DataFrame:
    """The arm's answers at the "last" or "all" of its checkpoints, generated once and kept in its folder.

    `prompts` are those of `worlds.World.evaluation_prompts`, or of an attack (see `attacks`), which may have `asked`
    for them and `begun` the answer. Returns their rows for each step, with `method` (the arm's display name),
    `n_unsafe`, `penalty_weight`, `model`, `seed`, `arm`, `step`, `decoding` ("greedy", "sampled" or "beam"), `response`
    and `finished`. Step 0, the base model, is part of "all".
    """
    decoding = _own(decoding, spec)
    chosen = _steps(spec, steps)
    kept = {step: _responses(spec, step, prompts, decoding) for step in chosen}
    is_chat = spec.template == "chat"
    asked = questions(prompts, spec.template, load_tokenizer(spec) if is_chat else None)
    for step, adapter in chosen.items():
        path = kept[step]
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(Path(f"{path}.lock"), path):
            if path.exists() and (damage(path) or _read_answers(path, len(prompts)) is None):
                set_aside(path)
            if path.exists():
                continue
            model, tokenizer = load_model(spec, adapter)
            options = {"batch_size": batch_size, "special_tokens": not is_chat, "progress": show_progress()}
            answers = generation.generate(model, tokenizer, asked, decoding=decoding, **options)
            write_text(path, "".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
            seal(path)
            del model
            gc.collect()
    tables = []
    for step, path in kept.items():
        answers = _read_answers(path, len(prompts))
        table = _of_arm(prompts, spec, step).assign(decoding=decoding.name)
        tables.append(table.assign(response=[a["text"] for a in answers], finished=[a["finished"] for a in answers]))
    return pd.concat(tables, ignore_index=True)


def measure(spec: ArmSpec, held_out: HeldOut, *, steps: str = "last", batch_size: int = 8) -> pd.DataFrame:
    """`train` the arm, and `preference.likelihoods` at the "last" or "all" of its checkpoints, once and kept.

    Returns its rows for each step, with `method`, `n_unsafe`, `penalty_weight`, `seed`, `arm` and `step` as `respond`
    has them.
    """
    tables = []
    with full_disk_named(spec.folder):
        if not _is_measured(spec, held_out, steps):
            train(spec)
        for step, adapter in _steps(spec, steps).items():
            path = _likelihoods(spec, step, held_out)
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(Path(f"{path}.lock"), path):
                if not keep_if_whole(path):
                    model, tokenizer = load_model(spec, adapter)
                    table = likelihoods(model, tokenizer, held_out, batch_size=batch_size, progress=show_progress())
                    write_text(path, table.to_csv(index=False, float_format="%.9g"))
                    seal(path)
                    del model
                    gc.collect()
            tables.append(_of_arm(pd.read_csv(path), spec, step))
    return pd.concat(tables, ignore_index=True)


def judge_by_name(responses: pd.DataFrame, *judge_names: str) -> pd.DataFrame:
    """`responses` judged by those judges, see `evaluation.answers.judge_answers`; they share one cache."""
    return judge_answers(responses, load.load_judges(judge_names), cache=runs_folder() / "judgements")


def _count(
    judged: pd.DataFrame, spec: ArmSpec, prompts: pd.DataFrame, decodings: list[generation.Decoding], judge: Judge
) -> None:
    """The verdicts' numbers, a line each file of answers, judge and kind of prompt, in the place of earlier ones."""
    path, by = spec.folder / "counts.jsonl", ["answers", "step", "kind", "judge"]
    files = {decoding.name: _hash(prompts, _own(decoding, spec)) for decoding in decodings}
    table = counts(judged, ["decoding", "step", "kind"])
    table = table.assign(answers=table["decoding"].map(files), judge=judge.name, revision=judge.revision)
    there = {tuple(record[name] for name in by): checked(record) for record in read_records(path)}
    rows = json.loads(table.to_json(orient="records", double_precision=15))
    new = {tuple(record[name] for name in by): checked(record) for record in rows}
    if there | new != there:
        write_text(path, "".join(json.dumps(record) + "\n" for _, record in sorted((there | new).items())))


def _record_failure(spec: ArmSpec, error: BaseException) -> None:
    with suppress(OSError):  # the disk may be full
        spec.folder.mkdir(parents=True, exist_ok=True)
        write_json(spec.folder / "failed.json", {"error": str(error), "at": time.time()})


def _steps(spec: ArmSpec, steps: str) -> dict[int, Path | None]:
    saved = by_step(spec.folder / "trainer")
    return {0: None, **saved} if steps == "all" else dict([max(saved.items())])


def _own(decoding: generation.Decoding, spec: ArmSpec) -> generation.Decoding:
    """The decoding with the arm's own random state, so that seeds differ in what is sampled too."""
    return replace(decoding, seed=decoding.seed + spec.seed) if decoding.do_sample else decoding


def _is_answered(spec: ArmSpec, prompts: pd.DataFrame, decodings: list[generation.Decoding], steps: str) -> bool:
    if not has_ended(spec):
        return False
    pairs = product(_steps(spec, steps), decodings)
    return all(keep_if_whole(_responses(spec, step, prompts, _own(decoding, spec))) for step, decoding in pairs)


def _is_judged(
    spec: ArmSpec, prompts: pd.DataFrame, decodings: list[generation.Decoding], judge_name: str | None, steps: str
) -> bool:
    def cache() -> str | None:
        judge = load.load_judge(judge_name)
        return None if isinstance(judge, ExactJudge) else f"{judge.name}.jsonl"

    if not _is_answered(spec, prompts, decodings, steps):
        return False
    file = judge_name and once("cache", judge_name, cache)
    return file is None or (spec.folder / "judgements" / file).exists()


def _is_measured(spec: ArmSpec, held_out: HeldOut, steps: str) -> bool:
    return has_ended(spec) and all(keep_if_whole(_likelihoods(spec, step, held_out)) for step in _steps(spec, steps))


def _of_arm(table: pd.DataFrame, spec: ArmSpec, step: int) -> pd.DataFrame:
    """The table with columns that say whose it is."""
    return table.assign(
        method=spec.display_name or spec.method,
        n_unsafe=spec.n_unsafe or spec.n_extra or 0,
        penalty_weight=spec.penalty_weight,
        model=spec.model,
        seed=spec.seed,
        arm=spec.name,
        step=step,
    )


def _read_answers(path: Path, n: int) -> list[dict] | None:
    """The answers in the file; None unless it holds one for each of `n` prompts."""
    try:
        answers = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except ValueError:
        return None
    is_whole = len(answers) == n and all({"text", "finished"} <= set(answer) for answer in answers)
    return answers if is_whole else None


def _responses(spec: ArmSpec, step: int, prompts: pd.DataFrame, decoding: generation.Decoding) -> Path:
    return _folder(spec, step) / "responses" / _hash(prompts, decoding) / f"step-{step}.jsonl"


def _hash(prompts: pd.DataFrame, decoding: generation.Decoding) -> str:
    def look() -> tuple[pd.DataFrame, str]:
        asked, begun = asked_and_begun(prompts)
        return prompts, content_hash({"asked": asked, "begun": begun, "decoding": asdict(decoding)})

    return once("answers", f"{id(prompts)} {decoding}", look)[1]  # with the table, so that its id stays its own


def _likelihoods(spec: ArmSpec, step: int, held_out: HeldOut) -> Path:
    described = content_hash([asdict(held_out), DEPTHS])
    return _folder(spec, step) / "likelihoods" / described / f"step-{step}.csv"


def _folder(spec: ArmSpec, step: int) -> Path:
    """The arm's; of step 0 the base model's, which all its arms share."""
    if step:
        return spec.folder
    described = {"model": model_identity(base_model(spec.model)), "revision": spec.model_revision}
    described |= {"dtype": spec.dtype, "4bit": spec.load_in_4bit, "template": spec.template}
    return runs_folder() / "arms" / f"base-{content_hash(described)}"
