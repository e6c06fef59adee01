"""The penalties of TA-SFT as pure tensor functions, in the notation of the paper (arXiv:2412.06843).

Everything here is unreduced: `emd` and `emd_exact` give one value per token, `nlcl` one per sample. How samples are
averaged into a batch is `penalty_reduction`, and lives in the trainer alone. Every penalty is to be *minimised*.
All take full logits; `fused_head` computes the same without them, and is tested against `dense_head`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rows(weight: Tensor) -> Tensor:
    """Row-normalised token embedding Ê: `[V, H]` in at least float32, detached; an all-zero row (padding) stays zero.

    The penalties measure distance in a fixed geometry, so no gradient flows into it (as in EMO, arXiv:2310.04691).
    """
    return F.normalize(_at_least_float32(weight.detach()), dim=-1)


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p_t(y_t) of `targets` `[...]` under `logits` `[..., V]`: `[...]`, in (-inf, 0]."""
    log_probs = F.log_softmax(_at_least_float32(logits), dim=-1)
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def emd(logits: Tensor, targets: Tensor, embedding: Tensor) -> Tensor:
    """The paper's EMD penalty −‖μ_t − ê_{y_t}‖² per token, with μ_t = Êᵀ softmax(z_t) (eq. 5, Prop. 1).

    Args:
        logits: z, `[..., V]`, after the model's own scaling and soft-capping.
        targets: y, `[...]`, ids of the unsafe tokens.
        embedding: Ê, `[V, H]`, unit rows (see `unit_rows`).

    Returns `[...]` in [−4, 0]: 0 where all mass sits on the unsafe token.
    """
    expected, target = _expected_and_target(logits, targets, embedding)
    return -(expected - target).square().sum(-1)


def emd_exact(logits: Tensor, targets: Tensor, embedding: Tensor) -> Tensor:
    """The negative earth mover's distance itself, −(1 − μ_t·ê_{y_t}) per token, in [−2, 0]; arguments as `emd`.

    With one-hot Q there is exactly one coupling, so EMD(P, δ_y) = Σ_w P(w)·(1 − ê_w·ê_y) needs no bound (eq. 3 with
    the cosine cost of eq. 4). Unlike `emd` it does not also reward concentrated next-token mass.
    """
    expected, target = _expected_and_target(logits, targets, embedding)
    return -(1 - (expected * target).sum(-1))


def nlcl(mean_log_prob: Tensor) -> Tensor:
    """Negative log of the complementary likelihood, −log(1 − exp(s)) per sample (eq. 7), in [0, ∞).

    `mean_log_prob` is s = mean_t log p_t(y_t), `[B]`, ≤ 0: length-normalised as in ORPO. Of a single token's log p it
    is the unlikelihood loss (Welleck et al., 2019). Values closer to 0 than one
    rounding error of the dtype are taken as that, so value and gradient stay finite at p = 1.
    """
    s = _at_least_float32(mean_log_prob)
    s = s.clamp(max=-torch.finfo(s.dtype).eps)
    # Two branches of log(1 − exp(s)), each accurate where the other cancels. Both see only safe arguments, because
    # torch.where lets a NaN gradient of the branch not taken through.
    near_zero = s > -0.6931471805599453
    small = torch.where(near_zero, s, -1.0)
    large = torch.where(near_zero, -1.0, s)
    return -torch.where(near_zero, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def npo(log_ratio: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation, (2/β) log(1 + exp(β r)) per sample, in [0, ∞) (arXiv:2404.05868, eq. 3).

    `log_ratio` r `[B]` is log π(y|x) − log π_ref(y|x), summed over tokens; with the mean log-probability of the tokens
    in its place it is SimNPO without margin (arXiv:2410.07163). As β → 0 its gradient becomes that of gradient ascent.
    """
    return 2 / beta * F.softplus(beta * _at_least_float32(log_ratio))


def sample_mean(values: Tensor, sample: Tensor, n_samples: int) -> Tensor:
    """Mean of the token `values` `[N]` of each sample: `[n_samples]`; 0 for a sample without tokens.

    `sample` `[N]` holds the index of the sample that a token belongs to.
    """
    total = values.new_zeros(n_samples).index_add(0, sample, values)
    return total / torch.bincount(sample, minlength=n_samples).clamp(min=1)


class HeadOutput(NamedTuple):
    """What the loss needs of next tokens: four tensors `[N]`, but for `is_top1` in at least float32."""

    log_prob: Tensor  # log p_t(y_t); without gradient on penalised tokens
    entropy: Tensor  # of the next-token distribution, in nats; without gradient
    is_top1: Tensor  # bool: no token is more likely than y_t
    penalty: Tensor  # 0 on tokens that are not penalised


def dense_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    penalized: Tensor | None = None,
    penalty: str = "emd",
    bias: Tensor | None = None,
    embedding: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> HeadOutput:
    """The reference: full logits `[N, V]`, the functions above, and autograd. Arguments as `fused_head.fused_head`."""
    logits = logit_scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_prob = token_log_probs(logits, targets)
    with torch.no_grad():
        log_probs = F.log_softmax(_at_least_float32(logits), dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        is_top1 = logits.gather(-1, targets[:, None]).squeeze(-1) >= logits.amax(-1)
    value = torch.zeros_like(log_prob)
    if penalized is not None:
        unit = unit_rows(weight if embedding is None else embedding)
        penalty_of = {"emd": emd, "emd_exact": emd_exact}[penalty]
        # masked_scatter keeps the result connected to the model when no token is penalised.
        value = value.masked_scatter(penalized, penalty_of(logits[penalized], targets[penalized], unit))
        log_prob = torch.where(penalized, log_prob.detach(), log_prob)
    return HeadOutput(log_prob, entropy, is_top1, value)


def _expected_and_target(logits: Tensor, targets: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    probs = F.softmax(_at_least_float32(logits), dim=-1)
    embedding = embedding.to(probs.dtype)
    return probs @ embedding, embedding[targets]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
