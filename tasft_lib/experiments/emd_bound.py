"""What the EMD penalties measure, on a model's own next-token distributions (TA-SFT, eq. 3-5 and Prop. 1)."""

from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.optimize import linprog
from scipy.sparse import eye, kron, vstack
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import losses
from ..labels import end_of_turn
from ..records.tokens import chat_ids

# Distance 1 − cos to the unsafe token, in [0, 2]; the token itself has a bin of its own.
DISTANCES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 2.0)
# Places in an answer, from and up to: the first token decides whether a refusal begins.
PARTS = {"first token": (0, 1), "tokens 2-5": (1, 5), "later": (5, 10**6)}
# By logits [n, V], targets [n] and unit rows [V, H]: [n].
TOKEN_PENALTIES = {
    "gradient_ascent": lambda logits, targets, unit: losses.token_log_probs(logits, targets),
    "unlikelihood": lambda logits, targets, unit: losses.unlikelihood(losses.token_log_probs(logits, targets)),
    "emd": losses.emd,
    "emd_exact": losses.emd_exact,
}


@torch.no_grad()
def unsafe_token_distributions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, *, n_tokens: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(P `[n, V]`, y `[n]`, place `[n]`): next-token distributions, unsafe tokens, and which token (0, 1, ...) of its
    completion each is, at up to `n_tokens` places.

    `rows` has `prompt` and `completion`, text or messages; places are drawn by `seed` from all of them. Raises
    ValueError where no completion has a token.
    """
    places = [(i, t) for i, row in enumerate(rows) for t in range(len(_tokens(tokenizer, row)[1]))]
    if not places:
        raise ValueError("no unsafe row has a token in its completion.")
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:n_tokens].tolist()
    wanted: dict[int, list[int]] = {}
    for i, t in sorted(places[j] for j in order):
        wanted.setdefault(i, []).append(t)
    model.eval()
    probs, targets, at = [], [], []
    for i, tokens in wanted.items():
        prompt, completion = _tokens(tokenizer, rows[i])
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        probs.append(logits[tokens].softmax(-1).cpu())
        targets.append(torch.tensor(completion)[tokens])
        at.append(torch.tensor(tokens))
    return torch.cat(probs), torch.cat(targets), torch.cat(at)


def earth_movers_distance(p: np.ndarray, q: np.ndarray, cost: np.ndarray) -> float:
    """min over couplings of `p` and `q` `[n]` of the transport cost `[n, n]`, by linear programming (eq. 3)."""
    n = len(p)
    ones = np.ones((1, n))
    marginals = vstack([kron(eye(n), ones), kron(ones, eye(n))], format="csr")
    # HiGHS' presolve takes probabilities below its tolerance for a contradiction.
    result = linprog(
        cost.ravel(), A_eq=marginals, b_eq=np.concatenate([p, q]), method="highs", options={"presolve": False}
    )
    if not result.success:
        raise RuntimeError(f"the linear program was not solved: {result.message}")
    return result.fun


def bounds_table(probs: Tensor, targets: Tensor, unit: Tensor, *, support: int = 30) -> pd.DataFrame:
    """The EMD to the one-hot unsafe token by linear program, and what stands in for it, one row per token.

    Each distribution is cut to the target and its most likely tokens, `support` in all, and renormalised, for the
    program's size. Columns: emd (the program), exact (1 − μ·ê_y), jensen (½‖μ − ê_y‖²), paper (Prop. 1:
    ‖μ − ê_y‖² / (2|V|²), with |V| the size of the cut support).
    """
    rows = []
    for p, y in zip(probs.double(), targets, strict=True):
        likely = p.topk(min(support, len(p))).indices
        kept = torch.cat([y[None], likely[likely != y]])[:support]
        q = p[kept] / p[kept].sum()
        e = unit[kept].double()
        one_hot = np.eye(len(kept))[0]
        cost = (1 - e @ e.T).numpy()
        squared = (q @ e - e[0]).square().sum().item()
        rows.append(
            {
                "emd": earth_movers_distance(q.numpy(), one_hot, cost),
                "exact": (1 - (q @ e) @ e[0]).item(),
                "jensen": squared / 2,
                "paper": squared / (2 * len(kept) ** 2),
            }
        )
    return pd.DataFrame(rows)


def mass_by_distance(probs: Tensor, targets: Tensor, unit: Tensor) -> pd.DataFrame:
    """Mean probability mass by distance 1 − cos from the unsafe token: one row per bin, columns distance and mass."""
    distance = 1 - unit[targets] @ unit.T
    inner = torch.tensor(DISTANCES[1:-1])
    bins = torch.bucketize(distance, inner, right=True).add_(1).scatter_(1, targets[:, None], 0)
    mass = torch.zeros(len(probs), len(DISTANCES)).scatter_add_(1, bins, probs).mean(0)
    names = ["itself", *(f"{low:g}-{high:g}" for low, high in pairwise(DISTANCES))]
    return pd.DataFrame({"distance": names, "mass": mass.tolist()})


def summary(probs: Tensor, targets: Tensor, unit: Tensor) -> dict[str, float]:
    """Means over tokens: p of the unsafe token, expected distance from it (the exact EMD), ‖μ − ê_y‖², entropy."""
    expected = probs @ unit
    target = unit[targets]
    return {
        "p_unsafe": probs.gather(1, targets[:, None]).mean().item(),
        "emd_exact": (1 - (expected * target).sum(-1)).mean().item(),
        "squared_distance": (expected - target).square().sum(-1).mean().item(),
        "entropy": torch.special.entr(probs).sum(-1).mean().item(),
    }


def by_part(
    probs: Tensor, targets: Tensor, place: Tensor, unit: Tensor, *, method: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(`summary`, `mass_by_distance`) of `unsafe_token_distributions`, for each of `PARTS`, with method and part."""
    means, mass = [], []
    for part, (start, end) in PARTS.items():
        inside = (place >= start) & (place < end)
        row = {"method": method, "part": part, "n_tokens": int(inside.sum())}
        means.append(row | summary(probs[inside], targets[inside], unit))
        mass.append(mass_by_distance(probs[inside], targets[inside], unit).assign(method=method, part=part))
    return pd.DataFrame(means), pd.concat(mass, ignore_index=True)


def push_by_part(probs: Tensor, targets: Tensor, place: Tensor, unit: Tensor, *, method: str) -> pd.DataFrame:
    """How hard penalties push on the unsafe token's logit, at a model's own distributions: for each of `PARTS` the mean
    |∂ penalty of the token / ∂ its logit|, of penalties in `TOKEN_PENALTIES`, with p of the token.

    Arguments as from `unsafe_token_distributions`; `method` is whose distributions they are. That of gradient ascent,
    1 − p, is NLCL's, NPO's and SimNPO's up to a factor of the row. Columns method, penalty, part, p, push.
    """
    rows = []
    for penalty, of_tokens in TOKEN_PENALTIES.items():
        logits = probs.clamp_min(torch.finfo(probs.dtype).tiny).log().requires_grad_()
        (gradient,) = torch.autograd.grad(of_tokens(logits, targets, unit).sum(), logits)
        push = gradient.gather(1, targets[:, None]).squeeze(1).abs()
        for part, (start, end) in PARTS.items():
            inside = (place >= start) & (place < end)
            p = probs[inside].gather(1, targets[inside, None]).mean().item()
            rows.append([method, penalty, part, p, push[inside].mean().item()])
    return pd.DataFrame(rows, columns=["method", "penalty", "part", "p", "push"])


def _tokens(tokenizer: PreTrainedTokenizerBase, row: dict) -> tuple[list[int], list[int]]:
    """Token ids of (prompt, completion), without what ends a turn."""
    if isinstance(row["prompt"], str):
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        return tokenizer(row["prompt"])["input_ids"], completion
    prompt, whole = chat_ids(row, tokenizer, "D_unsafe")
    return prompt, whole[len(prompt) : len(whole) - len(end_of_turn(tokenizer, tokenizer, None))]
