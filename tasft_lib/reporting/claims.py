"""The paper's claims, and the rule by which a profile's tables decide each: evidence in numbers and a verdict.

A statement about a rate is true (or false) where it is at both ends of the rate's 95 % interval, which knows how far
prompts and base models differ (`rates.effective_n`, `rates.difference`: methods are compared on the same base models);
else nobody knows, None, and a verdict that would change with it is "open". Where a claim names no amount, "more" is by
five points.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..evaluation import rates
from ..storage.files import project_root
from . import tables
from .figures.filters import detector_name

# Profiles whose numbers can speak about a claim; the others test formats and mechanics.
TELLING = ("mini", "pocket", "small", "paper")
# What tells harmful rows without labels: SAFT, and what takes no activations.
SAFT, SIMPLE = ("saft", "saft_1"), ("loss", "length")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: what it says, and how a profile's tables decide it."""

    finding: str
    paper: str
    decide: Callable[[Callable[[str], pd.DataFrame]], tuple[str, str]]


def claims_table(profile: str, folder: Path | None = None) -> pd.DataFrame:
    """A row per claim: claim, paper, here, verdict; from the tables in `folder`, by default `figures/<profile>`.

    A verdict is "reproduced", "not reproduced", "partly: ...", "open", "not run" or "can't be tested at this profile".
    """
    folder = folder or project_root() / "figures" / profile

    def read(name: str) -> pd.DataFrame:
        return pd.read_csv(folder / f"{name}.csv")

    rows = []
    for claim in CLAIMS:
        evidence, verdict = "-", "can't be tested at this profile"
        if profile in TELLING:
            try:
                evidence, verdict = claim.decide(read)
            except FileNotFoundError as missing:
                evidence, verdict = f"no {Path(missing.filename).name}", "not run"
            except _NoSuchArm as missing:
                evidence, verdict = str(missing), "not run"
        rows.append({"claim": claim.finding, "paper": claim.paper, "here": evidence, "verdict": verdict})
    return pd.DataFrame(rows)


def n_bases(folder: Path) -> int:
    """How many base models (of a real one: seeds) the intervals of a profile's tables are over."""
    tables = [pd.read_csv(file) for file in folder.glob("*_table.csv")]
    return max(
        (len(_by_seed(row, "harm")) for table in tables if "harm" in table for _, row in table.iterrows()), default=1
    )


class _NoSuchArm(Exception):
    """The profile leaves out an arm that a claim is about."""


def _pick(table: pd.DataFrame, **wanted) -> pd.Series:
    for column, value in wanted.items():
        table = table[table[column] == value]
    if table.empty:
        raise _NoSuchArm(f"no arm with {wanted}")
    return table.iloc[0]


def _text(row: pd.Series, measure: str = "harm") -> str:
    return tables.rate_text(row, measure)


def _ends(table: pd.DataFrame, *methods: str) -> tuple[int, int]:
    """The largest and the smallest size of D_unsafe at which all methods were run."""
    sizes = set.intersection(*(set(table.loc[table["method"] == method, "n_unsafe"]) for method in methods))
    if not sizes:
        raise _NoSuchArm(f"no size with all of {', '.join(methods)}")
    return max(sizes), min(sizes)


def _above(low: float, high: float, bound: float) -> bool | None:
    """Whether what lies between `low` and `high` is above `bound`."""
    return True if low > bound else False if high <= bound else None


def _exceeds(row: pd.Series, measure: str, bound: float) -> bool | None:
    return _above(row[f"{measure}_low"], row[f"{measure}_high"], bound)


def _more(first: pd.Series, second: pd.Series, measure: str = "harm", by: float = 0.05) -> bool | None:
    """Whether the first arms' rate lies more than `by` above the second's, on the same base models. Less is nothing:
    else two methods that do the same would for ever be an open question."""
    n = min(first[f"{measure}_n"], second[f"{measure}_n"])
    _, low, high = rates.difference(_by_seed(first, measure), _by_seed(second, measure), n)
    return _above(low, high, by)


def _by_seed(row: pd.Series, measure: str) -> list[float]:
    """The rate of each seed; of all as of one where the table has no more."""
    return [float(value) for value in str(row.get(f"{measure}_by_seed", row[measure])).split()]


def _not(statement: bool | None) -> bool | None:
    return None if statement is None else not statement


def _all(statements: Iterable[bool | None]) -> bool | None:
    statements = set(statements)
    return False if False in statements else None if None in statements else True


def _verdict(statement: bool | None, otherwise: str = "not reproduced") -> str:
    return "open" if statement is None else "reproduced" if statement else otherwise


def _for_each(statements: Iterable[bool | None], some: str) -> str:
    """Of a claim about several things; `some` is the verdict where it holds for one of them and not for another."""
    statements = set(statements)
    return some if {True, False} <= statements else _verdict(None if None in statements else statements == {True})


def _sft_is_harmful(read):
    row = _pick(read("safety_table"), method="sft", decoding="greedy")
    return f"greedy {_text(row)}", _verdict(_exceeds(row, "harm", 0.5))


def _penalties_are_safe(read):
    table = read("safety_table")
    rows = {
        (method, decoding): _pick(table, method=method, decoding=decoding)
        for method in ("emd", "nlcl")
        for decoding in ("greedy", "sampled")
        if decoding == "greedy" or decoding in set(table["decoding"])
    }
    evidence = "; ".join(f"{tables.NAMES[m]} {d} {_text(row)}" for (m, d), row in rows.items())
    safe = _all(_not(_exceeds(row, "harm", 0.05)) for (_, decoding), row in rows.items() if decoding == "greedy")
    return evidence, _verdict(safe)


def _quality_is_kept(read):
    table = read("safety_table")
    _pick(table, method="sft")
    if table["correct"].isna().all():
        return "no exact checker", "can't be tested at this profile"
    shown, kept = [], {"greedy": [], "sampled": []}
    for method in ("emd", "nlcl"):
        for decoding, statements in kept.items():
            arm, sft = (_pick(table, method=m, decoding=decoding) for m in (method, "sft"))
            statements.append(_not(_more(sft, arm, "correct")))
            shown.append(f"{tables.NAMES[method]} {decoding} {_text(arm, 'correct')} (SFT {_text(sft, 'correct')})")
    kept = {decoding: _all(statements) for decoding, statements in kept.items()}
    at = " and ".join(decoding for decoding, is_kept in kept.items() if is_kept)
    return "; ".join(shown), _for_each(kept.values(), f"partly: {at} answers only")


def _kto_fails(read):
    table = read("safety_table")
    greedy, sampled = (_pick(table, method="kto", decoding=decoding) for decoding in ("greedy", "sampled"))
    evidence = f"greedy {_text(greedy)}; sampled {_text(sampled)}; benign correct {_text(greedy, 'correct')}"
    return evidence, _verdict(_exceeds(greedy, "harm", 0.05))


def _few_examples(read):
    table = read("data_efficiency_table")
    sampled = table[table["decoding"] == "sampled"]
    large, small = _ends(sampled, "emd", "nlcl")
    rows = {(m, n): _pick(sampled, method=m, n_unsafe=n) for n in (large, small) for m in ("nlcl", "emd")}
    evidence = "; ".join(f"{tables.NAMES[m]} n = {n} {_text(row)}" for (m, n), row in rows.items())
    better = _more(rows["nlcl", small], rows["emd", small])
    if better is not True:
        return evidence, _verdict(better)
    return evidence, _verdict(_not(_exceeds(rows["emd", small], "harm", 0.1)), "partly: EMD degrades too, but less")


def _semantics(read):
    table = read("data_efficiency_table")
    sampled = table[table["decoding"] == "sampled"]
    tried = [m for m in ("emd", "emd_embed_tokens", "emd_random", "emd_one_hot") if m in set(sampled["method"])]
    controls = [method for method in tried if method in ("emd_random", "emd_one_hot")]
    if not controls:
        raise _NoSuchArm("no control embedding")
    _, small = _ends(sampled, *tried)
    rows = {method: _pick(sampled, method=method, n_unsafe=small) for method in tried}
    evidence = f"n = {small}: " + "; ".join(f"{tables.NAMES[method]} {_text(row)}" for method, row in rows.items())
    against = _for_each(
        (_more(rows[control], rows["emd"]) for control in controls), "partly: not against every control"
    )
    if against != "reproduced" or "emd_embed_tokens" not in rows:
        return evidence, against
    best = min((rows[control] for control in controls), key=lambda row: row["harm"])
    partly = "partly: distances of lm_head help, those of embed_tokens do not"
    return evidence, _verdict(_more(best, rows["emd_embed_tokens"]), partly)


def _beats_stl(read):
    table = read("stl_comparison_table")
    sampled = table[table["decoding"] == "sampled"]
    _, small = _ends(sampled, "stl", "stl_weighted", "emd")
    stl, weighted, emd = (_pick(sampled, method=m, n_unsafe=small) for m in ("stl", "stl_weighted", "emd"))
    shown = (f"{tables.NAMES[row['method']]} {_text(row)}" for row in (stl, weighted, emd))
    evidence, plain = f"n = {small}: " + "; ".join(shown), _more(stl, emd)
    if plain is not True:
        return evidence, _verdict(plain)
    return evidence, _verdict(_more(weighted, emd), "partly: not against STL with the same weight")


def _one_curve(read):
    rows = read("over_alignment_table")
    if len(rows) < 2:
        raise _NoSuchArm("fewer than two methods")
    shown, near = [], []
    for row in rows.itertuples():
        low, high = (row.distance, row.distance) if pd.isna(row.low) else (row.low, row.high)
        interval = "" if pd.isna(row.low) else f" ({100 * low:+.1f} to {100 * high:+.1f})"
        shown.append(f"{tables.NAMES[row.method]} {100 * row.distance:+.1f} points{interval}")
        near.append(_all([_not(_above(low, high, 0.05)), _above(low, high, -0.05)]))
    some = f"not reproduced for {near.count(False)} of {len(near)} methods"
    return "; ".join(shown), _for_each(near, some)


def _contrastive_pairs(read, choose) -> list[tuple[str, float, pd.Series, pd.Series]]:
    """(method, factor, arm without contrastive data, arm with it), at the one of the tried multiples of the chosen λ
    that `choose` takes."""
    table = read("contrastive_augmentation_table")
    if "factor" not in table:
        raise _NoSuchArm("an earlier table, of one λ for all base models")
    decoding = "sampled" if (table["decoding"] == "sampled").any() else "greedy"
    arms_of = table[(table["decoding"] == decoding) & (table["method"] != "sft")]
    pairs = []
    for method in ("emd", "nlcl"):
        tried = arms_of.loc[arms_of["method"] == method, "factor"]
        if len(tried):
            arms = (_pick(arms_of, method=m, factor=choose(tried)) for m in (method, f"{method}_contrastive"))
            pairs.append((tables.NAMES[method], choose(tried), *arms))
    if not pairs:
        raise _NoSuchArm("neither EMD nor NLCL")
    return pairs


def _contrastive_is_less_safe(read):
    pairs = _contrastive_pairs(read, min)  # λ chosen without contrastive data; the others are larger
    shown = [f"{name}, {factor:g} λ: {_text(a)} without, {_text(b)} with" for name, factor, a, b in pairs]
    return "; ".join(shown), _for_each((_more(b, a) for _, _, a, b in pairs), "partly")


def _contrastive_noise(read):
    pairs = _contrastive_pairs(read, max)
    if not any(factor > 1 for _, factor, _, _ in pairs):
        raise _NoSuchArm("no λ above the chosen one")
    shown = [
        f"{name}, {factor:g} λ: {_text(a, 'degenerate')} without, {_text(b, 'degenerate')} with"
        for name, factor, a, b in pairs
    ]
    none_is_noisy = _all(_not(_exceeds(b, "degenerate", 0.05)) for _, _, _, b in pairs)
    if none_is_noisy is not False:
        return "; ".join(shown), _verdict(_not(none_is_noisy))
    blamed = _all(_more(b, a, "degenerate") for _, _, a, b in pairs)
    return "; ".join(shown), _verdict(blamed, "partly: λ, not the contrastive data, is to blame")


def _jailbreaks(read):
    table = read("jailbreak_table")
    attacked = table[(table["attack"] == tables.ANY_PROMPT) & (table["method"] != "sft")]
    sizes = sorted(attacked["n_unsafe"].unique().tolist(), reverse=True)
    if not sizes:
        raise _NoSuchArm("no attack on the prompts")
    shown, better = [], []
    for n in sizes:
        emd, stl = (_pick(attacked, method=method, n_unsafe=n) for method in ("emd", "stl"))
        shown.append(f"n = {n}: EMD {_text(emd)}, STL {_text(stl)}")
        better.append(_more(stl, emd))
    return "; ".join(shown), _for_each(better, "partly")


def _bound(read):
    table = read("emd_bound_bounds")
    if table.empty:
        raise _NoSuchArm("no linear program")
    gap = (table["exact"] - table["emd"]).abs().max()
    below = (table["paper"] <= table["jensen"] + 1e-9).all() and (table["jensen"] <= table["emd"] + 1e-9).all()
    share = (table["paper"] / table["emd"]).median()
    evidence = (
        f"{len(table)} linear programs, closed form within {gap:.0e}; the paper's bound is {share:.0e} of the EMD"
    )
    return evidence, "reproduced" if below and gap < 1e-6 else "not reproduced"


def _constant_pressure(read):
    table = read("penalty_weight_table")
    table = table[table["method"].isin(["emd", "nlcl"])]
    if table.empty:
        raise _NoSuchArm("neither EMD nor NLCL")
    if table["n_unsafe"].nunique() < 2:
        raise _NoSuchArm("one size")
    table = table.assign(lost=table["regret_constant"] - table["regret"])
    shown = [
        f"{tables.NAMES[method]}: best {rows['best_pressure'].min():g} to {rows['best_pressure'].max():g}; one for all "
        f"sizes of a base model costs up to {rows['lost'].max():.2f} of regret"
        for method, rows in table.groupby("method", sort=False)
    ]
    return "; ".join(shown), "reproduced" if (table["lost"] < 0.05).all() else "not reproduced"


def _saft_detects(read):
    table = read("harmful_data_filter_detectors")
    dose = min(0.3, table["contamination"].max())  # that of the paper's Fig 4 and 5
    table = table[(table["n_safe"] == 0) & (table["contamination"] == dose)]
    found = {name: rows for name, rows in table.groupby("detector", sort=False)}
    if "saft" not in found:
        raise _NoSuchArm("no SAFT")
    # Each seed has its own rows, so that the spread over seeds is all there is; of one seed there is the rows' own.
    ends = {name: np.clip(rates.mean_interval(rows["auroc"]), 0, 1).tolist() for name, rows in found.items()}
    if len(found["saft"]) == 1:
        ends = {name: tuple(*rows[["auroc", "auroc_low", "auroc_high"]].to_numpy()) for name, rows in found.items()}
    shown = "; ".join(
        f"{detector_name(name, found[name]['labels'].iloc[0])} {mean:.2f} ({low:.2f}-{high:.2f})"
        for name, (mean, low, high) in ends.items()
    )
    evidence = f"AUROC at contamination {dose:g}: {shown}"
    good = _above(*ends["saft"][1:], 0.9)
    if good is not True:
        return evidence, _verdict(good)
    saft, rival = (
        max((n for n in names if n in ends), key=lambda n: ends[n][0], default=None) for names in (SAFT, SIMPLE)
    )
    if rival is None:
        return evidence, "reproduced"
    lead = _above(ends[saft][1] - ends[rival][2], ends[saft][2] - ends[rival][1], 0)
    if len(found[saft]) > 1:
        lead = _above(*rates.mean_interval(found[saft]["auroc"].to_numpy() - found[rival]["auroc"].to_numpy())[1:], 0)
    return evidence, _verdict(lead, f"partly: {detector_name(rival)} alone does better")


def _saft_arms(read, names: tuple[str, ...], contamination: float | None = None) -> tuple[str, dict[str, pd.Series]]:
    """(evidence, method -> row) of the named arms, whose filter drops as many rows as are harmful."""
    table = read("harmful_data_filter_table")
    table = table[(table["n_safe"] == 0) & ((table["share"] == table["contamination"]) | (table["method"] == "none"))]
    contamination = table["contamination"].max() if contamination is None else contamination
    arms = table[table["contamination"] == contamination].set_index("method")
    if missing := set(names) - set(arms.index):
        raise _NoSuchArm(f"no {' and '.join(sorted(missing))} at contamination {contamination:g}")
    shown = "; ".join(f"{tables.NAMES[name]} {_text(arms.loc[name])}" for name in names)
    return f"contamination {contamination:g}: {shown}", {name: arms.loc[name] for name in names}


def _filtering_helps(read):
    evidence, arms = _saft_arms(read, ("none", "saft", "oracle"))
    helps = _more(arms["none"], arms["saft"])
    if helps is not True:
        return evidence, _verdict(helps)
    near = _not(_more(arms["saft"], arms["oracle"], by=0.03))
    return evidence, _verdict(near, "partly: far from the oracle filter")


def _dropped_rows_are_worth_it(read):
    evidence, arms = _saft_arms(read, ("saft", "saft_emd", "saft_unsafe_emd", "saft_labelled_emd", "oracle_emd"), 0.1)
    better = _more(arms["saft"], arms["saft_emd"])
    if better is not True:
        return evidence, "open" if better is None else "not so"
    near = {name: _not(_more(arm, arms["oracle_emd"], by=0.03)) for name, arm in arms.items()}
    if near["saft_emd"] is not False:
        return evidence, "open" if near["saft_emd"] is None else "holds"
    few = {"a few harmful rows": "saft_unsafe_emd", "a few labels": "saft_labelled_emd"}
    if not (as_safe := " or ".join(words for words, name in few.items() if near[name])):
        if None in (near[name] for name in few.values()):
            return evidence, "open"
        return evidence, "partly: safer than the filter alone, but far from what true labels give"
    return evidence, f"partly: without labels safer than the filter alone; with {as_safe} as safe as with true labels"


CLAIMS = (
    Claim("F1: plain SFT answers toxic prompts harmfully", "Fig 2", _sft_is_harmful),
    Claim("F2: EMD and NLCL end at almost no harm", "0-3 of 518 at n = 1000 (Tables 2, 6)", _penalties_are_safe),
    Claim("F2: benign quality is kept (5 points)", "within 2 points of SFT (Tables 1, 5)", _quality_is_kept),
    Claim("F2: KTO does not get there", "Fig 2", _kto_fails),
    Claim("F3: with few examples EMD holds where NLCL fails", "5 against 55 of 518 at n = 100", _few_examples),
    Claim("F3: because its distance is semantic", "§4.3.3", _semantics),
    Claim("F4: EMD is safer than STL at the same n", "5 against 80 of 518 at n = 100 (Table 3)", _beats_stl),
    Claim("F5: all methods share one over-refusal curve", "Fig 3, 10", _one_curve),
    Claim("F6: contrastive data makes models less safe", "Fig 4", _contrastive_is_less_safe),
    Claim("F6: with it, a larger λ brings non-language", "Fig 5", _contrastive_noise),
    Claim("EMD withstands jailbreaks better than STL", "20-63 % against 60-73 % (last table)", _jailbreaks),
    Claim("Prop. 1: the bound lies below the EMD", "eq. 5", _bound),
    Claim("total pressure λ·p is one constant", "Table 4: 0.015-0.06 (EMD)", _constant_pressure),
    Claim("SAFT: activations give harmful rows away, without labels", "SAFT, Fig 3", _saft_detects),
    Claim("SAFT: tuned on the filtered set, a model is less harmful", "SAFT, Fig 2: up to 27.8 %", _filtering_helps),
    Claim("ours: pushing away from what SAFT drops beats dropping it", "-", _dropped_rows_are_worth_it),
)
