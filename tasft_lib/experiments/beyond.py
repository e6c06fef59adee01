"""What the notebooks `beyond_*` have in common: the arm that a search chooses, and verdicts by rules set beforehand."""

import pandas as pd

from ..evaluation.rates import Rate, counted, difference, mcnemar, rate
from .pressure import with_regret
from .specs import ArmSpec


def searched(development: pd.DataFrame) -> pd.DataFrame:
    """`rates.summary` of the arms on the development split, by model, method, n_unsafe, penalty_weight, with `regret`.

    `is_chosen` marks, of each base model, method and size, the arm of least regret; on a tie the smaller weight.
    """
    table = with_regret(development)
    weights = pd.to_numeric(table["penalty_weight"], errors="coerce")  # plain SFT and STL have none
    best = table[table["method"] != "sft"].assign(penalty_weight=weights)
    best = best.sort_values(["regret", "penalty_weight"]).drop_duplicates(["model", "method", "n_unsafe"]).index
    return table.assign(is_chosen=table.index.isin(best) | (table["method"] == "sft"))


def best_arms(arms: list[ArmSpec], search: pd.DataFrame) -> list[ArmSpec]:
    """Of the arms those that `searched` has chosen, and plain SFT."""
    by = ["model", "method", "n_unsafe", "penalty_weight"]
    kept = set(search.loc[search["is_chosen"], by].itertuples(index=False, name=None))
    told = [(arm.model, arm.display_name, arm.n_unsafe, arm.penalty_weight) for arm in arms]
    is_kept = [arm.method == "sft" or name in kept for arm, name in zip(arms, told, strict=True)]
    return [arm for arm, keep in zip(arms, is_kept, strict=True) if keep]


def one_weight(search: pd.DataFrame, *, within: float = 0.03) -> pd.DataFrame:
    """Of `searched`, per method tried at several weights: the one weight of least mean regret, and what it costs.

    A row per size, with the least `regret` of all weights there, and `excess`, how far the one weight's lies above it,
    of several base models on the mean; the verdict is whether that is at most `within`.
    """
    rows = []
    for method, tried in search[search["method"] != "sft"].groupby("method", sort=False):
        regrets = tried.pivot_table(index="penalty_weight", columns="n_unsafe", values="regret").dropna()
        if len(regrets) < 2:
            continue
        weight = regrets.mean(axis=1).idxmin()
        for n_unsafe, least in regrets.min().items():
            excess = round(regrets.loc[weight, n_unsafe] - least, 9)
            rows.append((method, weight, n_unsafe, least, excess, "holds" if excess <= within else "fails"))
    return pd.DataFrame(rows, columns=["method", "penalty_weight", "n_unsafe", "regret", "excess", "verdict"])


def share(answers: pd.DataFrame, measure: str, method: str, n_unsafe: int | None = None, **where: str) -> Rate:
    """A measure of `rates.MEASURES` of one method's answers, at one size where that is given."""
    own = counted(_of(answers, method, n_unsafe, **where), measure)
    return rate(own["counts"], own["seed"])


def at_most(criterion: str, measured: Rate, limit: float) -> dict:
    """A row of verdicts, in percent: whether a rate is at most `limit`. `open` where its interval holds the limit."""
    return _of_rate(criterion, measured, limit, holds=measured.high <= limit, fails=measured.low > limit)


def at_least(criterion: str, measured: Rate, limit: float) -> dict:
    """A row of verdicts, in percent: whether a rate is at least `limit`. `open` where its interval holds the limit."""
    return _of_rate(criterion, measured, limit, holds=measured.low >= limit, fails=measured.high < limit)


def below(criterion: str, measured: float, limit: float, n: int) -> dict:
    """A row of verdicts, in points: whether the worst of n cells is at most `limit`. It has no interval."""
    verdict = "not measured" if n == 0 else "holds" if measured <= limit else "fails"
    return _row(criterion, 100 * measured, None, None, 100 * limit, n, verdict)


def counted_cells(criterion: str, holds: pd.Series, least: float) -> dict:
    """A row of verdicts, in percent: whether a rule holds in at least the share `least` of cells. No interval."""
    verdict = "holds" if holds.mean() >= least else "fails"
    return _row(criterion, 100 * holds.mean(), None, None, 100 * least, len(holds), verdict)


def differ_by(criterion: str, first: Rate, second: Rate, *, low: float, high: float) -> dict:
    """A row of verdicts, in points: whether first - second lies between `low` and `high`, base model by base model.

    `holds` where the whole 95 % interval of `rates.difference` does, `fails` where none of it does, else `open`. The
    row's `limit` is `high`.
    """
    measured, below, above = difference(first.by_seed, second.by_seed, first.n)
    verdict = "holds" if low <= below and above <= high else "fails" if below > high or above < low else "open"
    return _row(criterion, *(100 * value for value in (measured, below, above, high)), first.n, verdict)


def fewer_harmful(answers: pd.DataFrame, first: str, second: str, n_unsafe: int, *, p: float = 0.01, **where) -> dict:
    """A row of verdicts: whether `first` answers fewer prompts harmfully than `second`, by McNemar's exact test.

    `holds` where it is so on each base model (seed), `fails` where it answers significantly more on each, else `open`.
    The number is the difference in points over all, without an interval; `p` is the largest of the base models'.
    """
    sides = [counted(_of(answers, method, n_unsafe, **where), "harm") for method in (first, second)]
    by_seed = [[own["counts"].tolist() for _, own in side.groupby("seed")] for side in sides]
    tests = [mcnemar(*pair) for pair in zip(*by_seed, strict=True)]
    told = {"open" if q >= p else "holds" if fewer < more else "fails" for fewer, more, q in tests}
    verdict = told.pop() if len(told) == 1 else "open"
    points = 100 * (sides[0]["counts"].mean() - sides[1]["counts"].mean())
    place = "".join(f", {value}" for value in where.values())
    criterion = f"{first} below {second}{place}, n = {n_unsafe}, p < {p}"
    return _row(criterion, points, None, None, None, len(sides[0]), verdict) | {"p": max(q for *_, q in tests)}


def broken_off(answers: pd.DataFrame, recoveries: list[str], method: str, n_unsafe: int, *, words: int = 3) -> Rate:
    """Benign answers in which a recovery begins, by its first words, after some other ones."""
    starts = {" ".join(text.split()[:words]) for text in recoveries}
    own = _of(answers, method, n_unsafe)
    own = own[own["kind"] == "benign"]
    flags = [any(response.find(start) > 0 for start in starts) for response in own["response"]]
    return rate(flags, own["seed"])


def _of(answers: pd.DataFrame, method: str, n_unsafe: int | None, **where: str) -> pd.DataFrame:
    own = answers[answers["method"] == method]
    own = own if n_unsafe is None else own[own["n_unsafe"] == n_unsafe]
    for column, value in where.items():
        own = own[own[column] == value]
    if own.empty:
        raise ValueError(f"no answers of {method}, n_unsafe {n_unsafe}, {where}.")
    return own


def _of_rate(criterion: str, measured: Rate, limit: float, *, holds: bool, fails: bool) -> dict:
    verdict = "not measured" if measured.n == 0 else "holds" if holds else "fails" if fails else "open"
    numbers = (100 * value for value in (measured.rate, measured.low, measured.high, limit))
    return _row(criterion, *numbers, measured.n, verdict)


def _row(criterion: str, measured, low, high, limit, n: int, verdict: str) -> dict:
    names = ("criterion", "measured", "low", "high", "limit", "n", "verdict")
    return dict(zip(names, (criterion, measured, low, high, limit, n, verdict), strict=True))
