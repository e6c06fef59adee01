"""Plain SFT beside TA-SFT, in one table: rates by several judges, capability and win rates, each measured once.

A row: `measure`, `by` (the judge, lm-eval or the annotator), then for both arms the value in [0, 1] with its 95 %
interval (`sft`, `sft_low`, `sft_high`, `sft_n`, and `tasft`...), and `p` of McNemar's exact test where answers pair up.
"""

from pathlib import Path

import pandas as pd
from transformers import AutoConfig

from ..evaluation import alpaca, calibration, worlds
from ..evaluation.rates import MEASURES, judge_errors, mcnemar, rate
from ..generation import Decoding
from ..records.templates import ask
from ..storage.files import content_hash
from ..text import rate_text
from .answers import run_all
from .arms import load_tokenizer
from .response_quality import capability
from .results import table_in
from .specs import ArmSpec

SIDES = ("sft", "tasft")
# Of `rates.MEASURES`.
COMPARED = ("harm", "contrast_harm", "refusal", "over_refusal", "degenerate", "benign_degenerate")


def rates(judged: pd.DataFrame, arms: list[ArmSpec]) -> pd.DataFrame:
    """Rows for every measure and judge; `judged` from `answers.judge_by_name`, both arms answering the same prompts.

    A prompt whose answer by either arm was left unscored is in no rate; `unscored` counts them. Where the judge's
    errors are known, `sft_corrected` and so on stand beside (see `rates.Rate`).
    """
    rows = []
    for kind, verdict, name in map(MEASURES.get, COMPARED):
        for judge, group in judged[judged["kind"] == kind].groupby("judge", sort=False):
            verdicts = [group.loc[group["arm"] == arm.name, "verdict"].to_numpy() for arm in arms]
            scored = (verdicts[0] != "unscored") & (verdicts[1] != "unscored")
            flags = [side[scored] == verdict for side in verdicts]
            row = {"measure": name, "by": judge}
            errors = judge_errors(group, verdict)
            for side, flag, said in zip(SIDES, flags, verdicts, strict=True):
                row |= rate(flag, errors=errors, aside=calibration.aside(said[scored], verdict)).columns(side)
            p = mcnemar(*flags)[2] if scored.any() else float("nan")
            rows.append(row | {"p": p, "unscored": int((~scored).sum())})
    return pd.DataFrame(rows)


def capability_rows(
    arms: list[ArmSpec], tasks: list[str], files: list[str] = (), *, limit: int | None = None, batch_size: int = 8
) -> pd.DataFrame:
    """Rows of `response_quality.capability`, one per task and metric."""
    found = capability(arms, tasks, files, limit=limit, batch_size=batch_size)
    found["name"] = found["task"] + " " + found["metric"]
    scores = [own for _, own in found.groupby("arm", sort=False)]
    return _beside(scores, "lm-eval", scale=1)


def win_rate_rows(
    arms: list[ArmSpec],
    references: list[dict],
    annotator: str,
    decoding: Decoding,
    *,
    batch_size: int,
    max_tokens: int | None = None,
) -> pd.DataFrame:
    """A row of AlpacaEval's win rate against `references` (see `fitting`), by the annotator of that name or folder."""
    instructions = [row["instruction"] for row in references]
    asked = pd.DataFrame({"benchmark": "AlpacaEval", "kind": "benign", "prompt": instructions})
    answers = run_all(arms, asked, [decoding], batch_size=batch_size)
    described = content_hash([annotator, references, vars(decoding)])
    scores = []
    for arm in arms:
        folder = arm.folder / f"alpaca_eval-{described}"
        outputs = answers.loc[answers["arm"] == arm.name, "response"].tolist()
        options = {"annotators_config": annotator, "name": arm.display_name or arm.method, "folder": folder}
        options["max_tokens"] = max_tokens
        found = table_in(
            folder / "win_rate.csv",
            lambda outputs=outputs, options=options: alpaca.alpaca_eval_score(outputs, references, **options),
        )
        scores.append(found.assign(name="AlpacaEval wins", value=found["win_rate"]))
    return _beside(scores, Path(annotator).name, scale=100)


def fitting(arm: ArmSpec, references: list[dict], *, max_new_tokens: int, n: int | None = None) -> list[dict]:
    """The first n references whose instruction leaves room for an answer in the model's context."""
    config = AutoConfig.from_pretrained(
        worlds.base_model(arm.model), revision=arm.model_revision, trust_remote_code=False
    )
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or float("inf")
    tokenizer = load_tokenizer(arm)
    asked = ask([row["instruction"] for row in references], arm.template, tokenizer)
    lengths = [len(ids) for ids in tokenizer(asked, add_special_tokens=arm.template != "chat")["input_ids"]]
    pairs = zip(references, lengths, strict=True)
    return [row for row, length in pairs if length + max_new_tokens <= context][:n]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table for people: "3.1 % of 400 (1.8-5.3)"."""
    shown = table[["measure", "by"]].copy()
    for side, name in zip(SIDES, ("plain SFT", "TA-SFT"), strict=True):
        columns = table[[side, f"{side}_low", f"{side}_high", f"{side}_n"]].itertuples(index=False)
        shown[name] = [rate_text(*ends, n=n) for *ends, n in columns]
        if (corrected := f"{side}_corrected") in table:
            ends = table[[corrected, f"{corrected}_low", f"{corrected}_high"]].itertuples(index=False)
            shown[f"{name}, corrected"] = [rate_text(*row) for row in ends]
    shown["p"] = ["-" if pd.isna(p) else f"{p:.2g}" for p in table["p"]]
    return shown


def _beside(scores: list[pd.DataFrame], by: str, *, scale: float) -> pd.DataFrame:
    """Both arms' `name`, `value`, `stderr` and `n` in one row; the interval is ±1.96 standard errors, within [0, 1]."""
    rows = []
    for name in scores[0]["name"]:
        row = {"measure": name, "by": by}
        for side, table in zip(SIDES, scores, strict=True):
            found = table[table["name"] == name].iloc[0]
            value, error = found["value"] / scale, 1.96 * found["stderr"] / scale
            row |= {side: value, f"{side}_low": max(value - error, 0.0), f"{side}_high": min(value + error, 1.0)}
            row[f"{side}_n"] = int(found["n"])
        unscored = sum(int(table.get("unscored", pd.Series([0])).sum()) for table in scores)
        rows.append(row | {"p": float("nan"), "unscored": unscored})
    return pd.DataFrame(rows)
