"""D_unsafe from the model's own answers: generate, judge, keep, de-duplicate (TA-SFT, §4.1)."""

import json
import os
import random
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from datasets import Dataset, Features, Value
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasft_lib.generation import Decoding, check_prompts, generate
from tasft_lib.judges import LABELS, Judge, judge_responses

# Sampling from the model itself: a new round gives new answers, and answers differ from prompt to prompt.
SAMPLING = Decoding(do_sample=True)
FEATURES = Features(
    {"prompt": Value("string"), "completion": Value("string"), "label": Value("bool"), "instruction": Value("string")}
)


@dataclass(frozen=True)
class HarvestReport:
    """How a set of unsafe completions came about.

    Attributes:
        model: hub id, or the folder name of a local model.
        asked: distinct prompts available.
        rounds: rounds begun; each asks the prompts that have no unsafe answer yet.
        generated: answers sampled, `unfinished` among them.
        unfinished: answers cut off by `max_new_tokens`.
        judged: answers per label.
        duplicates: harmful answers dropped because their text was already there.
        surplus: harmful answers dropped because there were enough.
        kept: rows of the data set.
    """

    model: str
    judge: str
    judge_revision: str
    judge_licence: str
    template: str
    decoding: Decoding
    asked: int
    rounds: int
    generated: int
    unfinished: int
    judged: dict[str, int]
    duplicates: int
    surplus: int
    kept: int

    @property
    def yield_rate(self) -> float:
        """Usable unsafe answers per generated answer, in [0, 1]."""
        return (self.kept + self.surplus) / self.generated if self.generated else 0.0

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self) | {"yield_rate": self.yield_rate}

    def __str__(self) -> str:
        labels = ", ".join(f"{label} {self.judged[label]}" for label in LABELS if self.judged.get(label))
        settings = ", ".join(f"{name} {value}" for name, value in asdict(self.decoding).items())
        return (
            f"kept {self.kept} unsafe answers of {self.model or 'the model'}: "
            f"{self.asked} prompts, {self.generated} answers in {self.rounds} round{'' if self.rounds == 1 else 's'}, "
            f"yield {self.yield_rate:.1%}\n"
            f"judged by {self.judge} (revision {self.judge_revision}, {self.judge_licence}): {labels or 'none'}\n"
            f"dropped: unfinished {self.unfinished}, duplicates {self.duplicates}, surplus {self.surplus}\n"
            f"template {self.template}; {settings}"
        )


def harvest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    judge: Judge,
    *,
    n: int,
    template: Literal["alpaca", "short", "none"] = "alpaca",
    decoding: Decoding = SAMPLING,
    rounds: int = 4,
    evaluation_prompts: Iterable[str] = (),
    allow_fewer: bool = False,
    keep_unfinished: bool = False,
    batch_size: int = 32,
    cache: Path | None = None,
    progress: bool | None = None,
) -> tuple[Dataset, HarvestReport]:
    """Collect n unsafe answers of the model itself: at most one per prompt, no two with the same text.

    Prompts are asked in an order shuffled by `decoding.seed`, so that n answers come from everywhere in the list, and
    asking stops at n. Those without an unsafe answer are asked again with a new seed, up to `rounds` times; greedy or
    beam decoding would repeat itself, so it has one round.

    An answer cut off by `max_new_tokens` is not judged and not kept: the trainer closes every completion with EOS, and
    the model never ended there. `keep_unfinished` keeps them all the same, for a model that seldom ends.

    Args:
        prompts: bare toxic instructions; the template is added here.
        n: rows wanted.
        evaluation_prompts: instructions that must not be among `prompts`.
        allow_fewer: return what was found instead of raising.
        cache: file of judgements, see `judge_responses`.

    Returns:
        Rows of `prompt` (with template), `completion`, `label` (False: unsafe) and `instruction`; and the report.

    Raises:
        ValueError: an empty prompt, an evaluation prompt among the prompts, or fewer than n unsafe answers found.
    """
    from tasft_lib.data import format_prompt

    instructions = _distinct(prompts)
    _refuse_evaluation_prompts(prompts, evaluation_prompts)
    if n < 1 or rounds < 1:
        raise ValueError(f"n and rounds must be at least 1, got n={n}, rounds={rounds}")
    if len(instructions) < n and not allow_fewer:
        raise ValueError(
            f"n={n} unsafe answers from {len(instructions)} distinct prompts is impossible, since one is kept per "
            "prompt: give more prompts, lower n, or pass allow_fewer=True"
        )
    # Before the shuffle, so that an error names the prompt by its place in the caller's list.
    templated = [format_prompt(prompt, template=template) for prompt in prompts]
    check_prompts(model, tokenizer, templated, max_new_tokens=decoding.max_new_tokens)
    random.Random(decoding.seed).shuffle(instructions)

    kept: dict[str, str] = {}  # instruction -> answer
    texts: set[str] = set()
    counts: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    chunks = _chunks(instructions, kept, size=4 * batch_size, rounds=rounds if decoding.do_sample else 1)
    with tqdm(total=n, desc="harvesting", unit="row", disable=None if progress is None else not progress) as bar:
        for call, (round_number, chunk) in enumerate(chunks):
            answers = generate(
                model,
                tokenizer,
                [format_prompt(instruction, template=template) for instruction in chunk],
                decoding=replace(decoding, seed=decoding.seed + call),
                batch_size=batch_size,
                progress=False,
            )
            usable = {i: a.text for i, a in zip(chunk, answers, strict=True) if a.finished or keep_unfinished}
            judgements = judge_responses(judge, list(usable), list(usable.values()), cache=cache, progress=False)
            counts["rounds"] = round_number
            counts["generated"] += len(answers)
            counts["unfinished"] += sum(not answer.finished for answer in answers)
            judged.update(judgement.label for judgement in judgements)
            for (instruction, text), judgement in zip(usable.items(), judgements, strict=True):
                if judgement.label != "harmful":
                    continue
                if _normalise(text) in texts:
                    counts["duplicates"] += 1
                elif len(kept) == n:
                    counts["surplus"] += 1
                else:
                    kept[instruction] = text
                    texts.add(_normalise(text))
                    bar.update()
            if len(kept) == n:
                break

    report = HarvestReport(
        model=_model_name(model),
        judge=judge.name,
        judge_revision=judge.revision,
        judge_licence=judge.licence,
        template=template,
        decoding=decoding,
        asked=len(instructions),
        rounds=counts["rounds"],
        generated=counts["generated"],
        unfinished=counts["unfinished"],
        judged=dict(judged),
        duplicates=counts["duplicates"],
        surplus=counts["surplus"],
        kept=len(kept),
    )
    if len(kept) < n and not allow_fewer:
        raise ValueError(_too_few(report, n))
    columns = {
        "prompt": [format_prompt(instruction, template=template) for instruction in kept],
        "completion": list(kept.values()),
        "label": [False] * len(kept),
        "instruction": list(kept),
    }
    return Dataset.from_dict(columns, features=FEATURES), report


def save_harvest(dataset: Dataset, report: HarvestReport, path: str | Path) -> Path:
    """Write the data set (`datasets.load_from_disk` reads it), a data card README.md and report.json into a new folder.

    Atomic: the folder is there with everything in it, or not at all. Raises ValueError if it exists already.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already: remove it, or save the harvest under another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        folder = temporary / path.name
        dataset.save_to_disk(folder)
        (folder / "README.md").write_text(_data_card(report), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(folder, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _normalise(text: str) -> str:
    """Words only, case folded: what makes two texts the same. A text without words stands for itself."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def _distinct(prompts: list[str]) -> list[str]:
    first: dict[str, str] = {}
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: remove it from the list")
        first.setdefault(_normalise(prompt), prompt)
    return list(first.values())


def _refuse_evaluation_prompts(prompts: list[str], evaluation_prompts: Iterable[str]) -> None:
    evaluated = {_normalise(prompt) for prompt in evaluation_prompts}
    leaks = [number for number, prompt in enumerate(prompts, start=1) if _normalise(prompt) in evaluated]
    if leaks:
        more = f" and {len(leaks) - 1} more are evaluation prompts" if len(leaks) > 1 else " is an evaluation prompt"
        raise ValueError(f"prompt {leaks[0]}{more}: harvest from other prompts, or the evaluation measures memory")


def _chunks(
    instructions: list[str], kept: dict[str, str], *, size: int, rounds: int
) -> Iterator[tuple[int, list[str]]]:
    """(round, prompts) of those that have no kept answer when the round begins; `kept` fills up meanwhile."""
    for round_number in range(1, rounds + 1):
        open_instructions = [instruction for instruction in instructions if instruction not in kept]
        for start in range(0, len(open_instructions), size):
            yield round_number, open_instructions[start : start + size]


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
        f"prompts{unfinished}: give more prompts, more rounds (this took {report.rounds}), a lower n, or pass "
        "allow_fewer=True"
    )


def _data_card(report: HarvestReport) -> str:
    body = "\n".join(f"- {line}" for line in str(report).splitlines())
    return (
        "# Unsafe completions, harvested\n\n"
        "**Content warning.** Every row is an answer that a judge called harmful. The rows exist to be pushed away "
        "from (TA-SFT, KTO: `label` False); fine-tuning on them as ordinary data makes a model unsafe.\n\n"
        "Columns: `prompt` (with template), `completion`, `label` (False throughout), `instruction` (without "
        "template). Load with `datasets.load_from_disk`; `report.json` holds the numbers below.\n\n"
        f"{body}\n\n"
        "The labels are one judge's opinion and were not checked by a person. The answers fall under the licences of "
        "the model and of the prompts they came from.\n"
    )
