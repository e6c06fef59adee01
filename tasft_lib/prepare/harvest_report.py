"""How a harvest came about: whom it asked what, what became of the answers, and the card that says so."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import yaml

from ..evaluation.rates import wilson_interval
from ..generation import Decoding
from ..judges.base import VERDICTS
from ..text import markdown
from .recoveries import WHERE_FROM

_DATA_CARD = Path(__file__).with_name("data_card.md")


@dataclass(frozen=True)
class Origin:
    """Who was asked what: names and revisions of the model and of the prompts' source, for the data card.

    A local model's name is its folder's and its revision a hash, since a data card travels.
    """

    model: str = ""
    model_revision: str | None = None
    prompts: str = ""
    prompts_revision: str | None = None


@dataclass(frozen=True)
class HarvestReport:
    """How a set of unsafe completions came about.

    Attributes:
        asked: distinct prompts available.
        repeated: prompts dropped because the same was there already.
        leaked: prompts dropped because they are evaluation prompts.
        rounds: rounds begun; each asks the prompts that have no unsafe answer yet.
        generated: answers sampled, `unfinished` among them.
        unfinished: answers cut off by `max_new_tokens`.
        judged: answers per verdict.
        duplicates: harmful answers dropped because their text was already there.
        surplus: harmful answers dropped because there were enough.
        kept: rows of the data set.
        per_round: the same counts for each round (`generated` is there `asked`).
        recoveries: rows by where their recovery is from; None where none was asked for.
    """

    model: str
    model_revision: str | None
    prompts: str
    prompts_revision: str | None
    judge: str
    judge_revision: str
    judge_licence: str
    judge_errors: str
    template: str
    decoding: Decoding
    asked: int
    repeated: int
    leaked: int
    rounds: int
    generated: int
    unfinished: int
    judged: dict[str, int]
    duplicates: int
    surplus: int
    kept: int
    per_round: list[dict[str, int]]
    recoveries: dict[str, int] | None = None

    @property
    def yield_rate(self) -> float:
        """Usable unsafe answers per generated answer, in [0, 1]."""
        return (self.kept + self.surplus) / self.generated if self.generated else 0.0

    @property
    def yield_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the yield; (nan, nan) where nothing was generated."""
        return wilson_interval(self.kept + self.surplus, self.generated)

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        interval = [None if math.isnan(end) else end for end in self.yield_interval]
        return asdict(self) | {"yield_rate": self.yield_rate, "yield_interval": interval}

    def __str__(self) -> str:
        verdicts = ", ".join(f"{name} {self.judged[name]}" for name in VERDICTS if self.judged.get(name))
        settings = ", ".join(f"{name} {value}" for name, value in asdict(self.decoding).items())
        low, high = self.yield_interval
        by_source = ", ".join(f"{name} {count}" for name, count in (self.recoveries or {}).items())
        recoveries = f"recoveries: {by_source}\n" if by_source else ""
        return (
            f"kept {self.kept} unsafe answers of {self.model or 'the model'}: "
            f"{self.asked} prompts, {self.generated} answers in {self.rounds} round{'' if self.rounds == 1 else 's'}, "
            f"yield {self.yield_rate:.1%} ({low:.1%}-{high:.1%}, Wilson 95 %)\n"
            f"judged by {self.judge} (revision {self.judge_revision}, {self.judge_licence}): {verdicts or 'none'}\n"
            f"the judge: {self.judge_errors}\n"
            f"dropped answers: unfinished {self.unfinished}, duplicates {self.duplicates}, surplus {self.surplus}\n"
            f"dropped prompts: repeated {self.repeated}, leaked {self.leaked}\n"
            f"{recoveries}template {self.template}; {settings}"
        )


def data_card(report: HarvestReport) -> str:
    """README.md of the data set, with the hub's metadata; shows no answer."""
    kept, title = report.kept, f"Unsafe completions of {report.model or 'a model'}"
    metadata = {
        "pretty_name": title,
        "license": "other",
        "license_name": "those-of-the-model-and-of-the-prompts",
        "task_categories": ["text-generation"],
        "size_categories": ["n<1K" if kept < 1000 else "1K<n<10K" if kept < 10_000 else "10K<n<100K"],
        "tags": ["tasft", "safety", "synthetic", "not-for-all-audiences"],
    }
    low, high = report.yield_interval
    return _DATA_CARD.read_text(encoding="utf-8").format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title=title,
        report=report,
        model=_named(report.model, report.model_revision),
        prompts=_named(report.prompts, report.prompts_revision),
        judge=_named(report.judge, f"{report.judge_revision}, licence {report.judge_licence}; {report.judge_errors}"),
        decoding=", ".join(f"{name} {value}" for name, value in asdict(report.decoding).items()),
        recoveries=_recoveries(report),
        low=low,
        high=high,
        rounds=markdown(pd.DataFrame(report.per_round)),
    )


def _recoveries(report: HarvestReport) -> str:
    """Where the recoveries are from, in words."""
    counts = [f"{count} {WHERE_FROM[source]}" for source, count in (report.recoveries or {}).items()]
    return "; ".join(counts) or "none asked for"


def _named(name: str, revision: str | None) -> str:
    return f"{name or 'not named'} (revision {revision or 'not named'})"
