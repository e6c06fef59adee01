"""Along which axis EMD's distance lies: how alike token embeddings are, and what a token's frequency has to do with it.
For `emd_bound`.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..losses import centred_rows, unit_rows


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> pd.Series:
    """How often each token stands in `texts`, by token id, the most frequent first; special tokens left out."""
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    counts = Counter(token for text in ids for token in text if token not in set(tokenizer.all_special_ids))
    return pd.Series(dict(counts.most_common()), name="count")


def geometries(weight: Tensor, components: int) -> dict[str, Tensor]:
    """Unit rows `[V, H]` of an output embedding as `penalty_embedding` makes them: lm_head, centred, isotropic."""
    made = {"lm_head": weight, "centred": centred_rows(weight), "isotropic": centred_rows(weight, components)}
    return {name: unit_rows(rows).cpu() for name, rows in made.items()}


def mean_cosines(units: dict[str, Tensor], counts: pd.Series) -> pd.DataFrame:
    """A token's mean cosine with all tokens of `counts`, in each geometry: geometry, rank (from 1), mean_cosine."""
    tables = []
    for name, unit in units.items():
        seen = unit[torch.tensor(counts.index.to_numpy())]
        means = (seen @ seen.mean(0)).numpy()
        tables.append(pd.DataFrame({"geometry": name, "rank": np.arange(1, len(seen) + 1), "mean_cosine": means}))
    return pd.concat(tables, ignore_index=True)


def axis_table(units: dict[str, Tensor], counts: pd.Series) -> pd.DataFrame:
    """One row per geometry: what its distances say of frequency.

    Columns: geometry; mean_cosine and sd_cosine, of two tokens; mean_by_rank and component_by_rank, Spearman's
    correlation of the log of a token's rank, without sign, with its cosine to the mean row and with its place on the
    first principal component.
    """
    rows = []
    for name, unit in units.items():
        seen = unit[torch.tensor(counts.index.to_numpy())].double()
        mean, squares = seen.mean(0), seen.T @ seen / len(seen)
        of_pairs = (mean @ mean).item()
        spread = max(squares.square().sum().item() - of_pairs**2, 0.0) ** 0.5
        first = torch.linalg.eigh(squares - mean.outer(mean)).eigenvectors[:, -1]
        ranks = np.arange(len(seen))
        by_rank = [abs(spearmanr(ranks, (seen @ axis).numpy()).statistic) for axis in (mean, first)]
        row = {"geometry": name, "tokens": len(seen), "mean_cosine": of_pairs, "sd_cosine": spread}
        rows.append(row | {"mean_by_rank": by_rank[0], "component_by_rank": by_rank[1]})
    return pd.DataFrame(rows)


def neighbours(
    units: dict[str, Tensor], counts: pd.Series, tokenizer: PreTrainedTokenizerBase, ranks: list[int], n: int = 5
) -> pd.DataFrame:
    """Of the words at those ranks, the `n` nearest and farthest tokens of `counts`: geometry, rank, token, nearest,
    farthest. A word is a token of three letters or more; ranks count words, from 1, and those beyond the last are left
    out.
    """
    tokens = counts.index.to_numpy()
    texts = [tokenizer.decode([token]) for token in tokens]
    words = [i for i, text in enumerate(texts) if len(text.strip()) > 2 and text.strip().isalpha()]
    places = {rank: words[rank - 1] for rank in ranks if rank <= len(words)}
    rows = []
    for name, unit in units.items():
        seen = unit[torch.tensor(tokens)]
        for rank, place in places.items():
            order = (seen @ seen[place]).argsort(descending=True).tolist()
            order.remove(place)
            shown = {
                column: " ".join(repr(texts[i]) for i in chosen)
                for column, chosen in (("nearest", order[:n]), ("farthest", order[: -n - 1 : -1]))
            }
            rows.append({"geometry": name, "rank": rank, "token": texts[place], **shown})
    return pd.DataFrame(rows)
