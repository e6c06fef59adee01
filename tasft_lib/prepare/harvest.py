"""D_unsafe from the model's own answers: generate, judge, keep, de-duplicate (TA-SFT, §4.1); resumable.

With a work folder, every batch of answers and its verdicts are appended there before the next is asked for (see
`harvest_work`). What was judged no harm is kept too, for `recoveries`.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation import Decoding, Response, check_prompts, generate
from ..judges.base import VERDICTS, Judge, described
from ..records import sources, templates
from ..storage.files import content_hash, progress_bar, read_json, whole, write_json, write_rows
from ..storage.integrity import keep_if_whole, seal
from ..text import normalise, redact
from .harvest_report import HarvestReport, Origin, data_card
from .harvest_work import SETTINGS, Work
from .recoveries import FILE, Recovery, after_thinking, recoveries_for

# Sampling from the model itself: a new round gives new answers, and answers differ from prompt to prompt.
SAMPLING = Decoding(do_sample=True)
FEATURES = Features(
    {"prompt": Value("string"), "completion": Value("string"), "label": Value("bool"), "instruction": Value("string")}
)
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
CHAT_FEATURES = Features(FEATURES | {"prompt": _MESSAGES, "completion": _MESSAGES})


def harvest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    judge: Judge,
    *,
    n: int,
    template: templates.Template = "alpaca",
    chat_template_kwargs: dict[str, Any] | None = None,
    decoding: Decoding = SAMPLING,
    rounds: int = 4,
    evaluation_prompts: Iterable[str] = (),
    keep_unfinished: bool = False,
    recoveries: bool = False,
    batch_size: int = 32,
    origin: Origin | None = None,
    work: Path | None = None,
    progress: bool | None = None,
) -> tuple[Dataset, list[Recovery], HarvestReport]:
    """Collect n unsafe answers of the model itself: at most one per prompt, no two with the same text.

    Prompts are asked in an order shuffled by `decoding.seed`, so that n answers come from everywhere in the list, and
    asking stops at n. Those without an unsafe answer are asked again with a new seed, up to `rounds` times; greedy or
    beam decoding would repeat itself, so it has one round.

    With `work` a harvest that was killed goes on where it stopped, and ends as one that was not: nothing answered or
    judged is asked for again, but for what the judge left unscored. One that is over can be taken further there, with a
    larger `n` or more `rounds`.

    An answer cut off by `max_new_tokens` is not judged and not kept: the trainer closes every completion with EOS, and
    the model never ended there. `keep_unfinished` keeps them all the same, for a model that seldom ends. Of a model
    that thinks, judged and kept is the answer after the thinking; one that never comes to it is cut off.

    Args:
        prompts: bare toxic instructions; the template is added here ("chat": the tokenizer's own).
        chat_template_kwargs: switches of the chat template.
        n: rows wanted.
        evaluation_prompts: instructions that are left out where `prompts` have them, however they are written.
        recoveries: give each row a `recovery` too, a safe answer to its prompt (see `recoveries`).
        origin: for the report; by default the model's own name alone.
        work: folder of what is done, made when missing; holds all answers in full text.

    Returns:
        Rows of `prompt` (with template), `completion`, `label` (False: unsafe) and `instruction`; the answers that were
        judged a refusal or safe; and the report. With template "chat" prompt and completion are a message each, to be
        trained on beside other messages.

    Raises:
        ValueError: an empty prompt, no prompt but evaluation prompts, a `work` folder of another harvest, or fewer than
            n unsafe answers found.
    """
    distinct = _distinct(prompts)
    instructions = _without(evaluation_prompts, distinct)
    leaked = len(distinct) - len(instructions)
    _check_size(n, rounds, len(instructions), leaked)

    def with_template(instructions: list[str]) -> list[str]:
        return templates.ask(instructions, template, tokenizer, chat_template_kwargs=chat_template_kwargs)

    special_tokens = {"special_tokens": template != "chat"}

    # Before the shuffle, so that an error names the prompt by its place in the caller's list.
    origin = origin or Origin(_model_name(model))
    limits = {"max_new_tokens": decoding.max_new_tokens, "source": origin.prompts}
    check_prompts(model, tokenizer, with_template(prompts), **limits, **special_tokens)
    settings = {"template": template, "decoding": asdict(decoding), "judge": [judge.name, judge.revision]}
    settings |= {"prompts": content_hash(instructions), "batch_size": batch_size, "keep_unfinished": keep_unfinished}
    settings |= {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else {}
    record = Work(work, settings | {"model": _identity(origin), "dtype": str(model.dtype)})
    random.Random(decoding.seed).shuffle(instructions)

    def ask(call: int, chunk: list[str]) -> list[Response]:
        drawn = replace(decoding, seed=decoding.seed + call)
        options = {"decoding": drawn, "batch_size": batch_size, "progress": False} | special_tokens
        return generate(model, tokenizer, with_template(chunk), **options)

    pile = _Pile(n)
    chunks = _chunks(instructions, pile.answers, size=4 * batch_size, rounds=rounds if decoding.do_sample else 1)
    with progress_bar(total=n, desc="harvesting", unit="row", progress=progress) as bar:
        for call, (round_number, chunk) in enumerate(chunks):
            answers = [after_thinking(answer) for answer in record.answers(call, chunk, ask)]
            usable = {i: a.text for i, a in zip(chunk, answers, strict=True) if a.finished or keep_unfinished}
            pile.add(round_number, answers, usable, record.verdicts(judge, usable))
            bar.update(len(pile.answers) - bar.n)
            bar.set_postfix(asked=pile.total["asked"])
            if pile.is_full:
                break

    asked = list(pile.answers)
    from_where = recovered = None
    if recoveries and pile.is_full:
        how = {"template": template, "decoding": decoding, "batch_size": batch_size, "rounds": rounds}
        how["chat_template_kwargs"] = chat_template_kwargs
        recovered = recoveries_for(asked, pile.others, model, tokenizer, judge, record, **how)
        from_where = dict(Counter(recovery.verdict for recovery in recovered))
    report = HarvestReport(
        **asdict(origin),
        judge=judge.name,
        judge_revision=judge.revision,
        judge_licence=judge.licence,
        judge_errors=described(judge)["errors"],
        template=template,
        decoding=decoding,
        asked=len(instructions),
        repeated=len(prompts) - len(distinct),
        leaked=leaked,
        recoveries=from_where,
        **pile.counts(),
    )
    if not pile.is_full:
        raise ValueError(_too_few(report, n))
    rows = _rows(pile.answers, with_template(asked), recovered, is_chat=template == "chat")
    return rows, pile.others, report


def save_harvest(
    dataset: Dataset, others: list[Recovery], report: HarvestReport, path: str | Path, settings: dict | None = None
) -> Path:
    """Write the data set (`datasets.load_from_disk` reads it), a data card README.md and report.json into a new folder.

    Beside them `recoveries.jsonl`, the `others`: answers that were judged a refusal or safe, with their verdict.
    Atomic: the folder is there with everything in it, checksums too, or not at all. Raises ValueError if it exists
    already. `settings`: for `is_harvested`.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already: remove it, or save the harvest under another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as folder:
        dataset.save_to_disk(folder)
        write_rows(folder / FILE, [asdict(other) for other in others])
        (folder / "README.md").write_text(data_card(report), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        if settings is not None:
            write_json(folder / SETTINGS, settings)
        seal(folder)
    return path


def is_harvested(path: Path, settings: dict) -> bool:
    """Whether the folder holds the harvest of these settings; a damaged one is set aside.

    Raises `ValueError` where it holds one of other settings.
    """
    if not keep_if_whole(path):
        return False
    other = dict(read_json(path / SETTINGS))
    if changed := [name for name in settings if other.get(name) != json.loads(json.dumps(settings[name]))]:
        raise ValueError(
            f"{path}: holds a result with another {', '.join(changed)}; choose a new --output_dir or remove it."
        )
    return True


def read_harvest(path: Path, *, in_full: bool = False) -> tuple[dict, pd.DataFrame]:
    """What `save_harvest` wrote: (report, rows of `instruction` and `completion`).

    Texts are redacted unless `in_full`, for an invented world's.
    """
    rows = sources.read_rows(path).to_pandas()[["instruction", "completion"]]
    rows["completion"] = [c if isinstance(c, str) else c[-1]["content"] for c in rows["completion"]]
    return json.loads((path / "report.json").read_text(encoding="utf-8")), rows if in_full else rows.map(redact)


def _rows(answers: dict[str, str], prompts: list[str], recoveries: list[Recovery] | None, *, is_chat: bool) -> Dataset:
    """The rows that `harvest` returns: `answers` by instruction, and in their order `prompts` with their template."""
    completions = list(answers.values())
    columns = {"prompt": prompts, "completion": completions}
    if is_chat:
        columns = {"prompt": _messages("user", list(answers)), "completion": _messages("assistant", completions)}
    columns |= {"label": [False] * len(answers), "instruction": list(answers)}
    features = CHAT_FEATURES if is_chat else FEATURES
    if recoveries is not None:
        texts = [recovery.completion for recovery in recoveries]
        columns["recovery"] = _messages("assistant", texts) if is_chat else texts
        features = Features(features | {"recovery": features["completion"]})
    return Dataset.from_dict(columns, features=features)


def _messages(role: str, texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": role, "content": text}] for text in texts]


def _distinct(prompts: list[str]) -> list[str]:
    first: dict[str, str] = {}
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: remove it from the list")
        first.setdefault(normalise(prompt), prompt)
    return list(first.values())


def _without(evaluation_prompts: Iterable[str], prompts: list[str]) -> list[str]:
    evaluated = {normalise(prompt) for prompt in evaluation_prompts}
    others = [prompt for prompt in prompts if normalise(prompt) not in evaluated]
    if not others:
        raise ValueError("no prompts but evaluation prompts: harvest from others, or the evaluation measures memory")
    return others


def _check_size(n: int, rounds: int, n_prompts: int, leaked: int) -> None:
    if n < 1 or rounds < 1:
        raise ValueError(f"n and rounds must be at least 1, got n={n}, rounds={rounds}")
    if n_prompts < n:
        raise ValueError(
            f"n={n} unsafe answers from {n_prompts} distinct prompts is impossible, since one is kept per "
            f"prompt{f' ({leaked} more are evaluation prompts)' if leaked else ''}; give more prompts or lower n"
        )


class _Pile:
    """The unsafe answers kept so far, at most `n`, one per prompt and per text; and what became of all, by round.

    `others` are those that were judged a refusal or safe.
    """

    def __init__(self, n: int):
        self.n = n
        self.answers: dict[str, str] = {}  # by instruction
        self.others: list[Recovery] = []
        self._texts: set[str] = set()
        self._rounds: dict[int, Counter[str]] = {}

    @property
    def is_full(self) -> bool:
        return len(self.answers) == self.n

    @property
    def total(self) -> Counter[str]:
        return sum(self._rounds.values(), Counter())

    def add(self, round_number: int, answers: list[Response], usable: dict[str, str], verdicts: list[str]) -> None:
        """All `answers` of a batch; `usable` ones by their instruction, each with the judge's verdict."""
        counts = self._rounds.setdefault(round_number, Counter())
        counts["asked"] += len(answers)
        counts["unfinished"] += sum(not answer.finished for answer in answers)
        counts.update(verdicts)
        for (instruction, text), verdict in zip(usable.items(), verdicts, strict=True):
            if verdict == "harmful":
                counts[self._keep(instruction, text)] += 1
            elif verdict in ("refusal", "safe"):
                self.others.append(Recovery(instruction, text, verdict))

    def _keep(self, instruction: str, text: str) -> str:
        if normalise(text) in self._texts:
            return "duplicates"
        if self.is_full:
            return "surplus"
        self.answers[instruction] = text
        self._texts.add(normalise(text))
        return "kept"

    def counts(self) -> dict:
        """The counts of a `HarvestReport`."""
        total, columns = self.total, ("asked", "unfinished", *VERDICTS, "duplicates", "surplus", "kept")
        return {
            "rounds": len(self._rounds),
            "generated": total["asked"],
            "judged": {verdict: total[verdict] for verdict in VERDICTS if total[verdict]},
            "per_round": [{"round": r} | {name: c[name] for name in columns} for r, c in self._rounds.items()],
        } | {name: total[name] for name in ("unfinished", "duplicates", "surplus", "kept")}


def _chunks(
    instructions: list[str], kept: dict[str, str], *, size: int, rounds: int
) -> Iterator[tuple[int, list[str]]]:
    """(round, prompts) of those that have no kept answer when the round begins; `kept` fills up meanwhile."""
    for round_number in range(1, rounds + 1):
        open_instructions = [instruction for instruction in instructions if instruction not in kept]
        for start in range(0, len(open_instructions), size):
            yield round_number, open_instructions[start : start + size]


def _identity(origin: Origin) -> str | list[str | None]:
    """What tells the model from another: a local one's content, wherever it lies; else its name and revision."""
    is_local = (origin.model_revision or "").startswith("sha256 ")
    return origin.model_revision if is_local else [origin.model, origin.model_revision]


def _model_name(model: PreTrainedModel) -> str:
    name = str(getattr(model.config, "name_or_path", "") or "")
    # A data card travels; the folders of one machine should not.
    return Path(name).name if Path(name).exists() else name


def _too_few(report: HarvestReport, n: int) -> str:
    unfinished = (
        f"; {report.unfinished} answers were cut off, so a larger max_new_tokens may help" if report.unfinished else ""
    )
    return (
        f"found {report.kept} unsafe answers of the {n} wanted, in {report.generated} answers to {report.asked} "
        f"prompts{unfinished}; give more prompts, more rounds (this took {report.rounds}) or a lower n"
    )
