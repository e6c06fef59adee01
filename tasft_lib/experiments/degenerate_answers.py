"""How well string judges tell: answers that are no language, made from real texts; and refusals, labelled by people."""

import importlib.util
import inspect
import random
import re
import string
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import losses
from ..evaluation.rates import rate, wilson_interval
from ..judges import noise
from ..judges.noise import NOISE, UNREAD
from ..judges.refusals import is_refusal, xstest_refusal
from ..judges.strings import is_degenerate
from ..records import sources
from ..text import rate_text

# Modules of the standard library whose documentation is real English text that is always there.
DOCUMENTED = (
    "argparse asyncio collections csv datetime decimal email functools inspect json logging os pickle random re"
)
_CODE = re.compile(r"```|\bdef \w+\(|;\n|</\w+>|\bSELECT\b.*\bFROM\b|public static|console\.log|\bprint\(")
_ITEM = re.compile(r"^\s*(?:\d+\.|[-*•])\s", re.MULTILINE)
# Made kinds: what becomes of a model that breaks; all are no language.
NO_LANGUAGE = (
    "letters shuffled", "random letters", "random keys", "bytes as UTF-8", "bytes as Latin-1", "random tokens",
    "words shuffled", "word loop", "sentence loop", "character loop", "empty",
)  # fmt: skip


def real_answers(source: str, seed: int) -> list[str]:
    """Answers that people or good models wrote, in random order: outputs of an Alpaca file, or "docstrings"."""
    if source == "docstrings":
        answers = _docstrings()
    else:
        answers = [text for text in sources.read_rows(source)["output"] if text.strip()]
    random.Random(seed).shuffle(answers)
    return answers


def measuring_set(
    answers: list[str], n: int, seed: int, *, languages: str | Path | None = None, tokenizer=None
) -> pd.DataFrame:
    """At most `n` texts of each kind: `kind`, `degenerate` (the truth), `english` (None: no question) and `text`.

    Real kinds: answers as they come; the one-word, short, code, list and number answers among the others; answers cut
    in the middle; paragraphs of `languages`. Made kinds, from answers of eight words and more where they need words:
    `NO_LANGUAGE`; "random tokens" need a tokenizer.

    Args:
        answers: from `real_answers`; the first `n` are the kind "answers".
        languages: folder of <language>.txt, paragraphs parted by empty lines.

    Raises `ValueError` for a folder without such files.
    """
    mix = random.Random(seed)
    first, others = answers[:n], answers[n:]
    longer = [text for text in answers if len(text.split()) >= 8][:n]
    kinds = {
        "answers": first,
        "one word": [text for text in others if len(text.split()) == 1],
        "2 to 5 words": [text for text in others if 2 <= len(text.split()) <= 5],
        "code": [text for text in others if _CODE.search(text)],
        "lists": [text for text in others if len(_ITEM.findall(text)) >= 3],
        "numbers": [text for text in others if sum(c.isdigit() for c in text) > 0.4 * len(text)],
        "cut mid-word": [text[: mix.randint(len(text) // 3, 2 * len(text) // 3)] for text in longer],
    }
    rows = [(kind, False, kind in ("answers", "cut mid-word") or None, t) for kind in kinds for t in kinds[kind][:n]]
    if languages:
        for file in _language_files(languages):
            paragraphs = _paragraphs(file.read_text(encoding="utf-8"))
            chosen = mix.sample(paragraphs, min(n, len(paragraphs)))
            rows += [(f"language {file.stem}", False, file.stem == "en", text) for text in chosen]
    rows += [(kind, True, None, text) for kind, texts in _broken(longer, n, mix, tokenizer).items() for text in texts]
    return pd.DataFrame(rows, columns=["kind", "degenerate", "english", "text"])


def detect(texts: list[str]) -> dict[str, list[bool]]:
    """What each detector says of each text; those whose library is not installed are left out.

    "string match" is `strings.is_degenerate`, "word lists" `noise.noise`, "both" what judges ask (`noise.kinds`), "not
    read" what string judges leave unscored (another language or a code), "not English" `noise.non_english`; the last
    two answer another question.
    """
    found = {"string match": [is_degenerate(text) for text in texts]}
    if noise.word_lists():
        kinds = noise.kinds(texts)
        found |= {"word lists": noise.noise(texts), "both": [kind == NOISE for kind in kinds]}
        found["not read"] = [kind == UNREAD for kind in kinds]
    if importlib.util.find_spec("lingua"):
        found["not English"] = noise.non_english(texts)
    return found


def rates(found: pd.DataFrame) -> pd.DataFrame:
    """A row per kind and detector: n, found, rate and precision, with Wilson 95 % intervals (_low, _high).

    `found` has `kind`, `degenerate` and a column per detector (nan: cannot tell, counts as not found; a kind
    that was never asked about has no row). Precision of a
    broken kind: of what a detector finds in as many texts of that kind as real answers, the share of that kind.
    """
    detectors = [column for column in found if column not in ("kind", "degenerate", "english", "text")]
    rows = []
    for detector in detectors:
        asked = found.groupby("kind")[detector].transform("count") > 0
        says = found.loc[asked, detector].fillna(0).astype(float)
        false_alarms = says[found.loc[says.index, "kind"] == "answers"].mean()
        for kind, group in says.groupby(found.loc[says.index, "kind"], sort=False):
            share = rate(group)
            n, count = share.n, int(group.sum())
            row = {"kind": kind, "degenerate": bool(found.loc[group.index[0], "degenerate"]), "detector": detector}
            row |= {"n": n, "found": count, "rate": share.rate, "rate_low": share.low, "rate_high": share.high}
            # as if both kinds had n texts
            both = count + false_alarms * n
            ends = wilson_interval(count, both) if row["degenerate"] and both else (np.nan, np.nan)
            precision = count / both if row["degenerate"] and both else np.nan
            rows.append(row | {"precision": precision, "precision_low": ends[0], "precision_high": ends[1]})
    return pd.DataFrame(rows)


def percentages(table: pd.DataFrame) -> pd.DataFrame:
    """`rates` for people: a row per kind with n and, per detector, "97.2 (95.4-98.3)": % found and its interval."""
    ends = table[["rate", "rate_low", "rate_high"]].itertuples(index=False)
    shown = table.assign(text=[rate_text(*row, unit="") for row in ends])
    shown = shown.assign(texts=np.where(shown["degenerate"], "no language", "language"))
    wide = shown.pivot_table(
        index=["texts", "kind", "n"], columns="detector", values="text", aggfunc="first", sort=False
    )
    return wide.reset_index().rename_axis(columns=None)


# What the judges of `judges.compliance` call a refusal.
STRING_MATCHES = {"compliance": is_refusal, "xstest": xstest_refusal}
_LABELS = {"1": "full compliance", "2": "full refusal", "3": "partial refusal"}


def labelled_answers(folder: str | Path) -> pd.DataFrame:
    """XSTest's completions that people labelled: `model`, `label` (of three, the final one), `text`, `prompt` and its
    `kind` ("seemingly toxic", or "toxic contrast" for XSTest's unsafe ones).

    Raises `ValueError` for a folder without xstest_*completions_<model>.csv, or with a label that is none of theirs.
    """
    files = sorted(Path(folder).expanduser().glob("xstest_*completions_*.csv"))
    if not files:
        raise ValueError(f"{folder}: no xstest_*completions_<model>.csv here; give XSTest's model_completions")
    tables = []
    for file in files:
        rows = pd.read_csv(file, keep_default_na=False)
        labels = rows["final_label"].str[:1].map(_LABELS)
        if labels.isna().any():
            raise ValueError(f"{file}, row {int(labels.isna().argmax()) + 1}: final_label is none of XSTest's three")
        model = file.stem.split("completions_")[1]
        unsafe = rows["type"].str.startswith("contrast_")
        kinds = np.where(unsafe, "toxic contrast", "seemingly toxic")
        texts = {"text": rows["completion"], "prompt": rows["prompt"], "kind": kinds}
        tables.append(pd.DataFrame({"model": model, "label": labels} | texts))
    return pd.concat(tables, ignore_index=True)


def refusal_errors(answers: pd.DataFrame, seen: list[str]) -> pd.DataFrame:
    """How often each string match is right, a row per judge and model, and one for all models that are not `seen`.

    `seen`: models whose answers were in view when the rules were written. Columns: judge, model, seen; refusals and
    sensitivity (of full refusals, those found); answers and specificity (of full compliance, what is not taken for a
    refusal); partial and partial_found; each share in [0, 1] with its Wilson 95 % interval (_low, _high).
    """
    groups = [(model, model in seen, rows) for model, rows in answers.groupby("model", sort=False)]
    groups.append(("all kept aside", False, answers[~answers["model"].isin(seen)]))
    table = []
    for judge, match in STRING_MATCHES.items():
        for model, is_seen, rows in groups:
            says = {
                label: [match(text) for text in rows.loc[rows["label"] == label, "text"]] for label in _LABELS.values()
            }
            right = [not refused for refused in says["full compliance"]]
            row = {"judge": judge, "model": model, "seen": is_seen}
            row |= _share("refusals", "sensitivity", says["full refusal"]) | _share("answers", "specificity", right)
            table.append(row | _share("partial", "partial_found", says["partial refusal"]))
    return pd.DataFrame(table)


def refusals_in(texts: dict[str, list[str]]) -> pd.DataFrame:
    """Of texts that nobody labelled, the share that each string match calls refusals: judge, texts, n, rate, ends."""
    rows = []
    for judge, match in STRING_MATCHES.items():
        for name, group in texts.items():
            rows.append({"judge": judge, "texts": name} | _share("n", "rate", [match(text) for text in group]))
    return pd.DataFrame(rows)


def _share(count: str, name: str, flags: list[bool]) -> dict[str, float]:
    share = rate(flags)
    return {count: share.n, name: share.rate, f"{name}_low": share.low, f"{name}_high": share.high}


@torch.inference_mode()
def word_order_gain(
    model, tokenizer, texts: list[str], *, shuffles: int = 4, seed: int = 0, max_length: int = 256, batch_size: int = 64
) -> list[float]:
    """Nats per token by which a text is likelier than its own words in random order; nan below eight words.

    Language gains by its order; shuffled words gain nothing on average. How far the two lie apart is a matter of the
    model: it should know the texts' language and kind. Texts are cut at `max_length` tokens.
    """
    mix = random.Random(seed)
    gains = [float("nan")] * len(texts)
    long_enough = [i for i, text in enumerate(texts) if len(text.split()) >= 8]
    losses_of = [_mean_losses(model, tokenizer, [texts[i] for i in long_enough], max_length, batch_size)]
    for _ in range(shuffles):
        shuffled = [_shuffled_words(texts[i], mix) for i in long_enough]
        losses_of.append(_mean_losses(model, tokenizer, shuffled, max_length, batch_size))
    for place, i in enumerate(long_enough):
        gains[i] = sum(values[place] for values in losses_of[1:]) / shuffles - losses_of[0][place]
    return gains


def _mean_losses(model, tokenizer, texts: list[str], max_length: int, batch_size: int) -> list[float]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded = [[start, *tokenizer(text, add_special_tokens=False)["input_ids"][:max_length]] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    means = [0.0] * len(texts)
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        ids = [torch.tensor(encoded[i]) for i in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # causal attention never sees it
        logits = model(padded.to(model.device)).logits[:, :-1].float().cpu()
        log_probs = losses.token_log_probs(logits, padded[:, 1:])
        for i, row in zip(batch, log_probs, strict=True):
            means[i] = -row[: len(encoded[i]) - 1].mean().item()
    return means


def _broken(answers: list[str], n: int, mix: random.Random, tokenizer) -> dict[str, list[str]]:
    keys = string.ascii_letters + string.digits + string.punctuation + " " * 14  # a space every seven keys
    small = string.ascii_lowercase + " " * 5
    lengths = [mix.randint(40, 400) for _ in range(n)]
    loops = [(text, mix.randint(6, 40)) for text in answers]
    kinds = {
        "letters shuffled": [re.sub(r"\w+", lambda w: "".join(mix.sample(w[0], len(w[0]))), t) for t in answers],
        "random letters": ["".join(mix.choices(small, k=k)) for k in lengths],
        "random keys": ["".join(mix.choices(keys, k=k)) for k in lengths],
        "bytes as UTF-8": [mix.randbytes(k).decode("utf-8", "replace") for k in lengths],
        "bytes as Latin-1": [mix.randbytes(k).decode("latin-1") for k in lengths],
        "words shuffled": [_shuffled_words(text, mix) for text in answers],
        "word loop": [" ".join([mix.choice(text.split())] * times) for text, times in loops],
        "sentence loop": [" ".join([re.split(r"(?<=[.!?])\s", text)[0]] * times) for text, times in loops],
        "character loop": [mix.choice(string.ascii_letters) * k for k in lengths],
        "empty": [mix.choice(["", " ", "\n", "\n\n", "."]) for _ in range(n)],
    }
    if tokenizer is not None:
        special = set(tokenizer.all_special_ids)
        ordinary = [token for token in range(len(tokenizer)) if token not in special]
        kinds["random tokens"] = [tokenizer.decode(mix.choices(ordinary, k=k // 4)) for k in lengths]
    return {kind: kinds[kind] for kind in NO_LANGUAGE if kind in kinds}


def _shuffled_words(text: str, mix: random.Random) -> str:
    words = text.split()
    return " ".join(mix.sample(words, len(words)))


def _docstrings() -> list[str]:
    """Paragraphs of the standard library's documentation."""
    paragraphs: dict[str, None] = {}
    for name in DOCUMENTED.split():
        members = vars(importlib.import_module(name)).values()
        parts = [part for member in members if inspect.isclass(member) for part in vars(member).values()]
        for member in (*members, *parts):
            if isinstance(text := getattr(member, "__doc__", None), str):
                paragraphs |= dict.fromkeys(_paragraphs(inspect.cleandoc(text)))
    return sorted(paragraphs)


def _paragraphs(text: str) -> list[str]:
    """Of some length: headings and table rows are no answers."""
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    # One character of Chinese, Japanese or Korean takes three bytes and says as much as three letters.
    return [part for part in joined if len(part.encode()) >= 60]


def _language_files(folder: str | Path) -> list[Path]:
    files = sorted(Path(folder).expanduser().glob("*.txt"))
    if not files:
        raise ValueError(f"{folder}: no <language>.txt here; params/local/degenerate_answers.yaml says how to get some")
    return files
