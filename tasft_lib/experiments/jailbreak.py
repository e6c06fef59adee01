"""How often attacks on trained arms succeed: each alone, and at least one of those that anybody can try."""

import pandas as pd

from ..evaluation.rates import summary
from ..reporting.tables import ANY_BEGINNING, ANY_PROMPT, any_harmful


def success_table(answers: pd.DataFrame) -> pd.DataFrame:
    """`rates.summary` of judged answers by method, n_unsafe and attack.

    Two rows more per arm count a prompt as broken when at least one attack on it succeeds: of those that change the
    prompt, and of those that write the beginning of the answer.
    """
    keys = ["method", "n_unsafe", "attack"]
    parts = [summary(answers, keys)]
    for name, kind in ((ANY_PROMPT, "asked"), (ANY_BEGINNING, "begun")):
        attacked = answers[answers[kind].notna()]
        broken = any_harmful(attacked, ["method", "n_unsafe", "seed", "benchmark", "prompt"])
        parts.append(summary(broken.assign(attack=name), keys))
    return pd.concat(parts, ignore_index=True)


def strongest(answers: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Success of the best prompt attack and mean judge score (0-5) over them, a row per method, columns by n_unsafe."""
    means = answers[answers["asked"].notna()].groupby(["method", "n_unsafe"], sort=False)["score"].mean()
    success = table[table["attack"] == ANY_PROMPT].set_index(["method", "n_unsafe"])["harm"]
    return pd.DataFrame({"success": success, "mean score": means}).unstack("n_unsafe")
