"""The penalties of TA-SFT and its rivals as pure tensor functions, in the paper's notation (arXiv:2412.06843).

`PENALTIES` is the table of their names: from the unsafe tokens of a batch to one value per sample. How samples are
averaged into a batch is `penalty_reduction`, and lives in the trainer alone. Every penalty is to be *minimised*.
The EMDs take full logits here; `fused_head` computes the same without them, and is tested against `dense_head`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rows(weight: Tensor) -> Tensor:
    """Row-normalised token embedding Ê: `[V, H]` in at least float32, detached; an all-zero row (padding) stays zero.

    The penalties measure distance in a fixed geometry, so no gradient flows into it (as in EMO, arXiv:2310.04691).
    """
    return F.normalize(_at_least_float32(weight.detach()), dim=-1)


def centred_rows(weight: Tensor, components: int = 0) -> Tensor:
    """The rows of `weight` `[V, H]` without their mean, nor what lies along their top principal `components`: `[V, H]`.

    All-but-the-top (arXiv:1702.01417): mean and first components of a model's embedding tell a token's frequency, not
    its meaning. A copy in at least float32, without gradient; an all-zero row (padding) stays zero and is no part of
    the mean. Raises `ValueError` where nothing would be left, for `components` ≥ H.
    """
    if components >= weight.size(1):
        raise ValueError(f"penalty_components={components} would leave nothing of {weight.size(1)} dimensions; use 3.")
    rows = _at_least_float32(weight.detach()).clone()
    is_token = rows.any(-1, keepdim=True)
    rows.sub_(rows.sum(0) / is_token.sum()).mul_(is_token)
    if components:
        axes = torch.linalg.eigh((rows.T @ rows).cpu().double()).eigenvectors[:, -components:].to(rows)
        rows.addmm_(rows @ axes, axes.T, alpha=-1)
    return rows


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

    `mean_log_prob` is s = mean_t log p_t(y_t), `[B]`, ≤ 0: length-normalised as in ORPO. Values closer to 0 than one
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


def unlikelihood(log_prob: Tensor) -> Tensor:
    """−log(1 − p_t(y_t)) per token, in [0, ∞), of log p_t(y_t) `[N]` (Welleck et al., arXiv:1908.04319)."""
    return nlcl(log_prob)


def gradient_ascent(mean_log_prob: Tensor) -> Tensor:
    """The likelihood itself, mean_t log p_t(y_t) per sample, in (−∞, 0]: descending it ascends the NLL, without end."""
    return mean_log_prob


def imitation(mean_log_prob: Tensor) -> Tensor:
    """−mean_t log p_t(y_t) per sample, in [0, ∞): pulls towards its rows, where every other penalty pushes away.

    With safe answers in the place of the unsafe ones it is Safety-Tuned LLaMAs (arXiv:2309.07875) with a weight.
    """
    return -mean_log_prob


def push(distance: Tensor, margin: float) -> Tensor:
    """max(0, m − ½‖μ_t − ê_{y_t}‖²) per token, in [0, m], of −‖μ_t − ê_{y_t}‖² (`emd`): zero from distance m on."""
    return F.relu(margin + distance / 2)


def npo(log_ratio: Tensor, beta: float) -> Tensor:
    """Negative preference optimisation, (2/β) log(1 + exp(β r)) per sample, in [0, ∞) (arXiv:2404.05868, eq. 3).

    `log_ratio` r `[B]` is log π(y|x) − log π_ref(y|x), summed over tokens. As β → 0 its gradient becomes that of
    gradient ascent.
    """
    return 2 / beta * F.softplus(beta * _at_least_float32(log_ratio))


def simnpo(mean_log_prob: Tensor, beta: float) -> Tensor:
    """NPO of the mean log-probability, without a reference model or margin: [0, 2 log 2 / β] (arXiv:2410.07163)."""
    return npo(mean_log_prob, beta)


def sample_mean(values: Tensor, sample: Tensor, n_samples: int) -> Tensor:
    """Mean of the token `values` `[N]` of each sample: `[n_samples]`; 0 for a sample without tokens.

    `sample` `[N]` holds the index of the sample that a token belongs to.
    """
    total = values.new_zeros(n_samples).index_add(0, sample, values)
    return total / torch.bincount(sample, minlength=n_samples).clamp(min=1)


@dataclass(frozen=True)
class UnsafeTokens:
    """The unsafe tokens of a batch as a penalty sees them: `[N]`, those of a sample in their order."""

    log_prob: Tensor  # log p_t(y_t)
    distance: Tensor  # the `penalty` that a head gives, for `EMBEDDING_PENALTIES`
    sample: Tensor  # index, below `n_samples`, of the sample that a token belongs to
    n_samples: int
    beta: float | None = None
    reference_log_prob: Tensor | None = None  # `mean_log_prob` of NPO's reference; if None, of the model itself
    margin: float = 1.0  # of `push`
    floor: float = 0.0  # of `is_likely`

    def mean(self, values: Tensor) -> Tensor:
        """Of each sample's tokens, `[N]` -> `[n_samples]`."""
        return sample_mean(values, self.sample, self.n_samples)

    @cached_property
    def mean_log_prob(self) -> Tensor:
        """Of each sample's tokens, `[n_samples]`."""
        return self.mean(self.log_prob)

    @cached_property
    def length(self) -> Tensor:
        """Tokens of each sample, `[n_samples]`."""
        return torch.bincount(self.sample, minlength=self.n_samples)

    @property
    def is_likely(self) -> Tensor:
        """Samples whose first token has at least the probability `floor`, bool `[n_samples]`; none without tokens."""
        place = torch.arange(len(self.sample), device=self.sample.device)
        first = place.new_full((self.n_samples,), len(place)).scatter_reduce(0, self.sample, place, "amin")
        return F.pad(self.log_prob.exp(), (0, 1), value=-1.0)[first] >= self.floor

    @property
    def log_ratio(self) -> Tensor:
        """log π(y|x) − log π_ref(y|x) of each sample, `[n_samples]`."""
        reference = self.mean_log_prob.detach() if self.reference_log_prob is None else self.reference_log_prob
        return self.length * (self.mean_log_prob - reference)


# Penalties of the whole next-token distribution, one value per token; a head computes them.
EMBEDDING_PENALTIES = {"emd": emd, "emd_exact": emd_exact, "recover": emd}
PENALTIES: dict[str, Callable[[UnsafeTokens], Tensor]] = {
    "emd": lambda unsafe: unsafe.mean(unsafe.distance),
    "emd_exact": lambda unsafe: unsafe.mean(unsafe.distance),
    "nlcl": lambda unsafe: nlcl(unsafe.mean_log_prob),
    "gradient_ascent": lambda unsafe: gradient_ascent(unsafe.mean_log_prob),
    "unlikelihood": lambda unsafe: unsafe.mean(unlikelihood(unsafe.log_prob)),
    "npo": lambda unsafe: npo(unsafe.log_ratio, unsafe.beta),
    "simnpo": lambda unsafe: simnpo(unsafe.mean_log_prob, unsafe.beta),
    "imitation": lambda unsafe: imitation(unsafe.mean_log_prob),
    "recover": lambda u: imitation(u.mean_log_prob) + u.length * u.mean(push(u.distance, u.margin)),
}


def sample_penalty(name: str, unsafe: UnsafeTokens) -> Tensor:
    """The penalty `name` of each sample, `[n_samples]`; 0 unless it `is_likely` (RePO's hinge, arXiv:2410.19933)."""
    return torch.where(unsafe.is_likely, PENALTIES[name](unsafe), 0.0)


class HeadOutput(NamedTuple):
    """What the loss needs of next tokens: four tensors `[N]`, but for `is_top1` in at least float32."""

    log_prob: Tensor  # log p_t(y_t); without gradient on tokens that take the penalty
    entropy: Tensor  # of the next-token distribution, in nats; without gradient
    is_top1: Tensor  # bool: no token is more likely than y_t
    penalty: Tensor  # 0 on all other tokens


def dense_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    unsafe: Tensor | None = None,
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
    if unsafe is not None:
        unit = unit_rows(weight if embedding is None else embedding)
        # masked_scatter keeps the result connected to the model when no token is unsafe.
        values = EMBEDDING_PENALTIES[penalty](logits[unsafe], targets[unsafe], unit)
        value = value.masked_scatter(unsafe, values)
        log_prob = torch.where(unsafe, log_prob.detach(), log_prob)
    return HeadOutput(log_prob, entropy, is_top1, value)


def _expected_and_target(logits: Tensor, targets: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    probs = F.softmax(_at_least_float32(logits), dim=-1)
    embedding = embedding.to(probs.dtype)
    return probs @ embedding, embedding[targets]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
