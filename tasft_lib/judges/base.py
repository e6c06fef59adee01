"""Judges: one protocol, five verdicts, one cache. Nothing here knows transformers."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..storage.files import append_records, checked, progress_bar, read_records
from .noise import find_degenerate

logger = logging.getLogger(__name__)
VERDICTS = ("harmful", "refusal", "safe", "degenerate", "unscored")


@dataclass(frozen=True)
class Judgement:
    """What a judge says about one response: a verdict of `VERDICTS` and a score from 0 (harmless) to 5 (most harmful).

    The score is nan when the verdict is "unscored" (the judge failed or its answer could not be parsed).
    """

    verdict: str
    score: float


DEGENERATE = Judgement("degenerate", 0.0)
UNSCORED = Judgement("unscored", math.nan)


class Judge(Protocol):
    """Labels responses. `name`, `revision` and `licence` are written into every result.

    `revision` must change whenever the same response could get another verdict: judgements are cached by it. A judge
    may also have `save_every`, the number of responses after which its judgements are worth saving, and `check()`,
    which raises `ValueError` for what it lacks (see `check_ready`). `errors`
    says how often it was measured to be wrong.
    """

    name: str
    revision: str
    licence: str

    def judge(self, prompts: list[str], responses: list[str]) -> list[Judgement]:
        """One judgement per response, in order. Prompts are the bare instructions, without a template."""
        ...


@runtime_checkable
class ExactJudge(Judge, Protocol):
    """A judge of a world it knows: never wrong, faster than a cache, and able to check what other judges cannot."""

    def are_correct(self, prompts: list[str], responses: list[str]) -> list[bool | None]:
        """Per answer to a benign evaluation prompt, whether it is right; None for a prompt of another world."""
        ...

    def harm_words(self, text: str) -> set[str]:
        """The words in the text that only harm is made of."""
        ...


def check_ready(judge: Judge) -> None:
    """Raise `ValueError` for what a judge will lack when it is asked, such as a key: before answers are made for it."""
    check = getattr(judge, "check", None)
    if check is not None:
        check()


def described(judge: Judge) -> dict[str, str]:
    """What is shown and recorded wherever a rate is by this judge: name, revision, licence, and how often it errs."""
    unknown = "exact" if isinstance(judge, ExactJudge) else "not measured"
    parts = {name: getattr(judge, name) for name in ("name", "revision", "licence")}
    return parts | {"errors": getattr(judge, "errors", unknown)}


def judge_in_batches(
    ask: Callable[[list[str], list[str]], list[Judgement]],
    prompts: list[str],
    responses: list[str],
    *,
    batch_size: int,
    name: str,
    progress: bool | None = None,
) -> list[Judgement]:
    """What `ask(prompts, responses)` says, in batches; for judges that are models or services.

    Degenerate responses are not asked about, because such judges call gibberish harmless. Judgements come in the order
    of the responses; `name` is shown by the progress bar.
    """
    judgements = [DEGENERATE if degenerate else UNSCORED for degenerate in find_degenerate(responses)]
    asked = [i for i, judgement in enumerate(judgements) if judgement is UNSCORED]
    # Longest first: what does not fit in memory fails at once, and batches hold little padding.
    asked.sort(key=lambda i: len(prompts[i]) + len(responses[i]), reverse=True)
    # Under the bar of `judge_responses`, so only when it takes long.
    options = {"unit": "response", "leave": False, "delay": 2, "progress": progress}
    with progress_bar(total=len(asked), desc=name, **options) as bar:
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            answered = ask([prompts[i] for i in batch], [responses[i] for i in batch])
            for i, judgement in zip(batch, answered, strict=True):
                judgements[i] = judgement
            bar.update(len(batch))
    return judgements


def judge_responses(
    judge: Judge,
    prompts: list[str],
    responses: list[str],
    *,
    cache: Path | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> list[Judgement]:
    """Judge every response, in order, asking the judge only for what the cache does not know.

    The cache is an append-only JSONL file of (hash, label, score): no text, so it can be passed on with results. Every
    batch is on disk before the next begins; a run that was killed loses one batch at most. A pair that occurs several
    times is asked once. "unscored" is returned but not cached, so the next call tries again.

    Args:
        cache: file of earlier judgements, made when missing; one file may serve many judges and runs.
        batch_size: responses given to the judge at once; default: its `save_every`, else 256.
        progress: True or False forces the bar on or off; None shows it on a terminal.

    Raises:
        ValueError: prompts and responses differ in number, or the judge breaks its protocol.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses: give one prompt per response")
    revision = judge.revision  # asked for once: it may read an installed package's version
    keys = [_key(judge.name, revision, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    known = dict(_read_cache(Path(cache))) if cache is not None else {}
    first_position: dict[str, int] = {}
    for position, key in enumerate(keys):
        if key not in known:
            first_position.setdefault(key, position)
    missing = list(first_position.values())
    batch_size = batch_size or getattr(judge, "save_every", 256)

    with progress_bar(total=len(missing), desc=f"judging ({judge.name})", unit="response", progress=progress) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            judgements = judge.judge([prompts[i] for i in batch], [responses[i] for i in batch])
            _check_protocol(judge, judgements, len(batch))
            new = {keys[i]: judgement for i, judgement in zip(batch, judgements, strict=True)}
            if cache is not None:
                _append_cache(Path(cache), new)
            known |= new
            bar.update(len(batch))
    return [known[key] for key in keys]


def cached_judgements(
    name: str, revision: str, prompts: list[str], responses: list[str], cache: Path
) -> list[Judgement | None]:
    """What a judge of that name and revision once said of each response, None where the file does not know it."""
    known = dict(_read_cache(cache))
    return [known.get(_key(name, revision, p, r)) for p, r in zip(prompts, responses, strict=True)]


def _key(name: str, revision: str, prompt: str, response: str) -> str:
    # JSON keeps the four parts apart: no two different quadruples give one string.
    return hashlib.sha256(json.dumps([name, revision, prompt, response]).encode()).hexdigest()


# A line of the cache calls a verdict "label": files of earlier runs are still good.
def _read_cache(path: Path) -> Iterator[tuple[str, Judgement]]:
    for record in read_records(path):
        try:
            score = math.nan if record["score"] is None else float(record["score"])
            if record["label"] in VERDICTS:
                yield record["key"], Judgement(record["label"], score)
        except (ValueError, KeyError, TypeError):
            continue  # not one of ours: its judgement is simply asked for again


def _append_cache(path: Path, judgements: dict[str, Judgement]) -> None:
    records = [
        checked({"key": key, "label": j.verdict, "score": None if math.isnan(j.score) else j.score})
        for key, j in judgements.items()
        if j.verdict != "unscored"
    ]
    append_records(path, records)


def _check_protocol(judge: Judge, judgements: list[Judgement], expected: int) -> None:
    if len(judgements) != expected:
        raise ValueError(f"judge {judge.name!r} returned {len(judgements)} judgements for {expected} responses")
    for judgement in judgements:
        if judgement.verdict not in VERDICTS:
            known = ", ".join(VERDICTS)
            raise ValueError(f"judge {judge.name!r} returned verdict {judgement.verdict!r}, not one of {known}")
