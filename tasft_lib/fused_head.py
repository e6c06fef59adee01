"""TA-SFT's losses straight from the hidden states and the output head, with no `[N, V]` tensor (arXiv:2412.06843).

Tokens pass through the head in chunks, and each token's gradient by its hidden state is formed in the same pass as its
value (`_Tiles` derives the formulas), so backward only scales it. Counted in products of a token with a `[V, H]`
matrix, a token's log-probability costs 2 (logits, gradient), `emd_exact` 3 (cosines with the target's embedding as
well) and `emd` 4 (and μ). Where the head itself is trained, backward projects the tokens once more: 2 products, and 4
in all, as in TRL's head. A penalty of log-probabilities (NLCL) is plain torch on `log_prob`: autograd brings the
derivative by it, and that times the token's row is the token's gradient. The dense reference is `losses.dense_head`.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor

from .losses import HeadOutput


def inverse_row_norms(weight: Tensor) -> Tensor:
    """1 / ‖w‖ for the rows of `weight` `[V, H]`: `[V]` in at least float32, detached; 0 for an all-zero row.

    All that the row-normalised embedding Ê needs beside the matrix itself, since Êᵀp = Wᵀ(p / ‖w‖).
    """
    norms = torch.linalg.vector_norm(weight.detach(), dim=-1, dtype=torch.promote_types(weight.dtype, torch.float32))
    return torch.where(norms > 0, 1 / norms.clamp(min=1e-12), 0)


@torch.compiler.disable
def fused_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    unsafe: Tensor | None = None,
    penalty: str = "emd",
    bias: Tensor | None = None,
    embedding: Tensor | None = None,
    inverse_norms: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    gather: Callable = lambda *parameters: nullcontext(),
) -> HeadOutput:
    """Log-probability, entropy and penalty of next tokens; values and gradients are those of `losses.dense_head`.

    The gradient flows to `hidden`, `weight` and `bias`, not into the penalty's geometry.

    Args:
        hidden: last hidden states of the scored positions, `[N, H]`. Matrix products run in its dtype (under autocast,
            in autocast's), sums in at least float32.
        weight: `lm_head.weight`, `[V, H]`.
        targets: y, the next tokens, `[N]`.
        unsafe: `[N]`, bool: tokens that take the `penalty`, and whose `log_prob` then carries no gradient.
        penalty: `"emd_exact"`, or one of the bound (`"emd"`, `"recover"`).
        bias: `lm_head.bias`, `[V]`.
        embedding: matrix `[V, any]` whose normalised rows are the penalty's geometry; `weight` if None.
        inverse_norms: `inverse_row_norms` of that matrix, computed here if None; worth keeping where it is frozen.
        logit_scale, softcap: what the model does to its logits, softcap · tanh(logit_scale · z / softcap).
        chunk_size: tokens projected at a time; by default about as few as keep the matrix products fast.
        gather: context manager over parameters during which they are whole (DeepSpeed ZeRO-3).
    """
    settings = SimpleNamespace(
        penalty=penalty,
        embedding=weight if embedding is None else embedding,
        inverse_norms=inverse_norms,
        scale=logit_scale,
        softcap=softcap,
        chunk_size=chunk_size,
        gather=gather,
        differentiable=torch.is_grad_enabled(),
    )
    if unsafe is None:
        unsafe = torch.zeros_like(targets, dtype=torch.bool)
    return HeadOutput(*_FusedHead.apply(hidden, weight, bias, targets, unsafe, settings))


class _FusedHead(torch.autograd.Function):
    """`forward` forms each token's gradient by its hidden state; `backward` scales it, and trains the head."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, unsafe, settings):
        ctx.set_materialize_grads(False)
        trains_hidden, *trains_head = (settings.differentiable and needed for needed in ctx.needs_input_grad[:3])
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with settings.gather(weight, bias, settings.embedding), torch.autocast(device, enabled=False):
            tiles = _Tiles(hidden, weight, bias, targets, unsafe, settings, ctx.dtype)
            rows = tiles.rows() if trains_hidden else tiles.values()
        ctx.settings, ctx.hidden_dtype, ctx.trains_head = settings, hidden.dtype, any(trains_head)
        ctx.save_for_backward(rows, unsafe, *((hidden, weight, bias, targets) if ctx.trains_head else ()))
        ctx.mark_non_differentiable(tiles.entropy, tiles.is_top1)
        return tiles.log_prob, tiles.entropy, tiles.is_top1, tiles.penalty

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, by_log_prob, _by_entropy, _by_top1, by_penalty):
        rows, unsafe, *inputs = ctx.saved_tensors
        zero = torch.zeros(unsafe.shape, device=unsafe.device)
        # Rows are of −log p and of the penalty.
        coefficient = torch.where(
            unsafe, zero if by_penalty is None else by_penalty, zero if by_log_prob is None else -by_log_prob
        )
        by_hidden = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_hidden = (rows * coefficient[:, None]).to(ctx.hidden_dtype)
        if ctx.trains_head:
            hidden, weight, bias, targets = inputs
            settings, autocast = ctx.settings, torch.autocast(hidden.device.type, enabled=False)
            with settings.gather(weight, bias, settings.embedding), autocast:
                tiles = _Tiles(hidden, weight, bias, targets, unsafe, settings, ctx.dtype)
                by_weight = torch.zeros_like(weight, dtype=tiles.exact)
                by_bias = None if bias is None else torch.zeros_like(bias, dtype=tiles.exact)
                for chunk, by_logits in tiles.gradients():
                    by_logits.mul_(coefficient[chunk, None] * settings.scale)
                    _add_product(by_weight, by_logits.t(), hidden[chunk].to(ctx.dtype))
                    if by_bias is not None:
                        by_bias.add_(by_logits.sum(0))
            by_weight = by_weight.to(weight.dtype)
            by_bias = None if bias is None else by_bias.to(bias.dtype)
        return by_hidden, by_weight, by_bias, None, None, None


class _Tiles:
    """A pass of all tokens through the head in `[chunk, V]` tiles; fills in the four values per token as it goes.

    A token has hidden state h and target y. The head W `[V, H]` gives it logits z = s·(W h + b), or c·tanh of that / c
    where they are capped, and p = softmax(z). The embedding E has rows e_w, of unit length ê_w = e_w / ‖e_w‖.

    Gradients. Each loss ℓ of a token is differentiated by z, and one product with W makes of that the token's row:

        ∂ℓ/∂h = s · Wᵀ (c′ ∘ ∂ℓ/∂z),  with c′ = 1 − (z/c)² where logits are capped, and 1 elsewhere.

        −log p_y:      ∂ℓ/∂z_w = p_w − 1[w = y]
        EMD bound:     ℓ = −‖μ − ê_y‖²,  μ = Σ_w p_w ê_w,  ∂ℓ/∂μ = −2 (μ − ê_y)
        exact EMD:     ℓ = μ·ê_y − 1,    ∂ℓ/∂μ = ê_y
        either EMD:    g_w = ∂ℓ/∂p_w = ê_w · ∂ℓ/∂μ,  ∂ℓ/∂z_w = p_w (g_w − ḡ),  ḡ = Σ_v p_v g_v

    For the exact EMD ḡ = μ·ê_y, so its value is ḡ − 1 and μ is never needed. Unit rows are never formed either:
    with i_w = 1 / ‖e_w‖, μ = Eᵀ (i ∘ p) and g = i ∘ (E ∂ℓ/∂μ).

    Entropy, without gradient: H = −log p_y + z_y − Σ_w p_w z_w = −log p_y − Σ_w (p_w − 1[w = y]) z_w. On a benign token
    the bracket is ∂ℓ/∂z. So where logits are not capped the sum is row · h + s b · ∂ℓ/∂z: no look at the tile of z, and
    p may take its memory.
    """

    def __init__(self, hidden, weight, bias, targets, unsafe, settings, dtype):
        self.dtype, self.exact = dtype, torch.promote_types(dtype, torch.float32)
        self.hidden, self.weight, self.targets, self.settings = hidden, weight.to(dtype), targets, settings
        self.bias = None if bias is None else bias.to(self.exact) * settings.scale
        # A tile of constant size, of few enough tokens to be small and enough of them to keep products fast.
        size = 6 * 2**20 if hidden.device.type == "cpu" else 2**26
        self.chunk_size = settings.chunk_size or max(128, size // len(weight))
        self.buffers = {}
        self.benign, self.unsafe = (~unsafe).nonzero().squeeze(1), unsafe.nonzero().squeeze(1)
        self.embedding, self.inverse_norms = settings.embedding, settings.inverse_norms
        if len(self.unsafe):
            if self.inverse_norms is None:
                self.inverse_norms = inverse_row_norms(self.embedding)
            self.embedding = self.weight if self.embedding is weight else self.embedding.to(dtype)
            self.inverse_norms = self.inverse_norms.to(self.exact)
        self.log_prob = torch.zeros(targets.shape, dtype=self.exact, device=hidden.device)
        self.entropy, self.penalty = torch.zeros_like(self.log_prob), torch.zeros_like(self.log_prob)
        self.is_top1 = torch.zeros_like(self.log_prob, dtype=torch.bool)

    def values(self) -> None:
        """The values alone."""
        for chunk in self.chunks(self.benign):
            probs, logits, _ = self.softmax(chunk, keep_logits=True)
            self.set_entropy(chunk, probs, logits)
        for chunk in self.chunks(self.unsafe):
            probs, logits, _ = self.softmax(chunk, keep_logits=True)
            scratch = self.set_entropy(chunk, probs, logits)
            target = self.unit_target(chunk)
            self.penalty[chunk], _ = self.penalty_of(self.mean_embedding(probs, scratch), target)

    def rows(self) -> Tensor:
        """The values, and the gradient of each token's −log p or penalty by its hidden state: `[N, H]`."""
        rows = torch.empty_like(self.hidden, dtype=self.exact)
        for chunk in self.chunks(self.benign):
            by_logits = self.nll_gradient(chunk)
            rows[chunk] = row = _product(by_logits, self.weight, self.settings.scale)
            if self.settings.softcap is None:
                self.set_entropy_by_row(chunk, row, by_logits)
        for chunk in self.chunks(self.unsafe):
            rows[chunk] = _product(self.penalty_gradient(chunk), self.weight, self.settings.scale)
        return rows

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Token indices and c′ ∘ ∂ℓ/∂z `[n, V]` of their −log p or penalty, in memory that the next chunk takes."""
        for chunk in self.chunks(self.benign):
            yield chunk, self.nll_gradient(chunk)
        for chunk in self.chunks(self.unsafe):
            yield chunk, self.penalty_gradient(chunk)

    def nll_gradient(self, chunk: Tensor) -> Tensor:
        """c′ ∘ ∂(−log p_y)/∂z. Sets the entropy only where logits are capped."""
        capped = self.settings.softcap is not None
        probs, logits, cap_slope = self.softmax(chunk, keep_logits=capped)
        if capped:
            self.set_entropy(chunk, probs, logits)
        gradient = probs.scatter_add_(1, self.targets[chunk, None], probs.new_full((len(chunk), 1), -1))
        return gradient if cap_slope is None else gradient.mul_(cap_slope)

    def penalty_gradient(self, chunk: Tensor) -> Tensor:
        """c′ ∘ ∂ℓ/∂z of the penalty ℓ. Sets the penalty and the entropy."""
        probs, logits, cap_slope = self.softmax(chunk, keep_logits=True)
        scratch = self.set_entropy(chunk, probs, logits)
        target = self.unit_target(chunk)
        if self.settings.penalty == "emd_exact":
            by_mean = target
        else:
            self.penalty[chunk], by_mean = self.penalty_of(self.mean_embedding(probs, scratch), target)
        weighted = _project(by_mean, self.embedding, scratch).mul_(self.inverse_norms).mul_(probs)  # p_w g_w
        mean = weighted.sum(-1)  # ḡ
        if self.settings.penalty == "emd_exact":
            self.penalty[chunk] = mean - 1
        gradient = weighted.addcmul_(probs, mean[:, None], value=-1)
        return gradient if cap_slope is None else gradient.mul_(cap_slope)

    def penalty_of(self, mean: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty `[n]` and its derivative by μ `[n, H]`, from μ and ê_y."""
        if self.settings.penalty != "emd_exact":
            difference = mean - target
            return -difference.square().sum(-1), -2 * difference
        return (mean * target).sum(-1) - 1, target

    def mean_embedding(self, probs: Tensor, scratch: Tensor) -> Tensor:
        """μ, `[n, H]`. Overwrites `scratch` `[n, V]`."""
        return _product(torch.mul(probs, self.inverse_norms, out=scratch), self.embedding)

    def unit_target(self, chunk: Tensor) -> Tensor:
        """ê_y, `[n, H]`."""
        targets = self.targets[chunk]
        return self.embedding[targets].to(self.exact) * self.inverse_norms[targets, None]

    def chunks(self, tokens: Tensor) -> Iterator[Tensor]:
        return iter(tokens.chunk(-(-len(tokens) // self.chunk_size)) if len(tokens) else ())

    def softmax(self, chunk: Tensor, keep_logits: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """p, z if kept, and c′ if capped, each `[n, V]`. Sets `log_prob` and `is_top1`."""
        cap = self.settings.softcap
        cap_slope = None
        hidden = self.hidden[chunk].to(self.dtype)
        logits = _project(hidden, self.weight, self.buffer("logits", chunk), self.settings.scale)
        if self.bias is not None:
            logits.add_(self.bias)
        if cap is not None:
            logits.div_(cap).tanh_()
            cap_slope = torch.mul(logits, logits, out=self.buffer("cap_slope", chunk)).neg_().add_(1)
            logits.mul_(cap)
        target_logit = logits.gather(1, self.targets[chunk, None])
        probs = self.buffer("probs", chunk) if keep_logits else logits
        # A few rows at a time, so that they stay in the cache of a CPU.
        rows = max(1, 2**18 // logits.size(1)) if logits.device.type == "cpu" else len(logits)
        blocks = zip(logits.split(rows), probs.split(rows), strict=True)
        top, norm = (torch.cat(parts) for parts in zip(*(_softmax(*block) for block in blocks), strict=True))
        self.log_prob[chunk] = (target_logit - top - norm.log()).squeeze(1)
        self.is_top1[chunk] = (target_logit >= top).squeeze(1)
        return probs, logits if keep_logits else None, cap_slope

    def set_entropy(self, chunk: Tensor, probs: Tensor, logits: Tensor) -> Tensor:
        """H from the tile of z. Returns its memory `[n, V]`, overwritten and free for other use."""
        target_logit = logits.gather(1, self.targets[chunk, None]).squeeze(1)
        scratch = torch.mul(probs, logits, out=logits)
        self.entropy[chunk] = (target_logit - scratch.sum(-1) - self.log_prob[chunk]).clamp(min=0)
        return scratch

    def set_entropy_by_row(self, chunk: Tensor, row: Tensor, by_logits: Tensor) -> None:
        """H of benign tokens whose logits are not capped, from their row and ∂(−log p_y)/∂z."""
        excess = (row * self.hidden[chunk].to(self.dtype)).sum(-1)
        if self.bias is not None:
            excess += by_logits @ self.bias
        self.entropy[chunk] = (-self.log_prob[chunk] - excess).clamp(min=0)

    def buffer(self, name: str, chunk: Tensor) -> Tensor:
        """An uninitialised `[n, V]` tile; memory is taken once per name."""
        if name not in self.buffers:
            rows = min(self.chunk_size, len(self.targets))
            self.buffers[name] = self.log_prob.new_empty(rows, len(self.weight))
        return self.buffers[name][: len(chunk)]


def _softmax(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax into `out`, which may be `logits`; returns the largest logit and Σ exp(z − largest), `[n, 1]` each."""
    # torch.softmax would lose two digits on the CPU: it sums over the vocabulary in plain order.
    top = logits.amax(-1, keepdim=True)
    norm = torch.sub(logits, top, out=out).exp_().sum(-1, keepdim=True)
    out.mul_(1 / norm)
    return top, norm


# On a GPU matrix products take factors of low precision and keep the result in float32. Elsewhere they would round it
# to that precision, so there the matrix of low precision is raised to float32, a block of the vocabulary at a time.
_BLOCK = 4096


def _project(a: Tensor, matrix: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """scale · a @ matrixᵀ into `out`, `[n, V]`, for `matrix` `[V, H]`."""
    if matrix.dtype == out.dtype:
        return torch.addmm(out, a.to(out.dtype), matrix.t(), beta=0, alpha=scale, out=out)
    if out.is_cuda:
        return torch.addmm(out, a.to(matrix.dtype), matrix.t(), out_dtype=out.dtype, beta=0, alpha=scale, out=out)
    a = a.to(out.dtype)
    for block, columns in zip(matrix.split(_BLOCK), out.split(_BLOCK, dim=1), strict=True):
        torch.addmm(columns, a, block.to(out.dtype).t(), beta=0, alpha=scale, out=columns)
    return out


def _product(a: Tensor, matrix: Tensor, scale: float = 1.0) -> Tensor:
    """scale · a @ matrix, `[n, H]`, in the dtype of `a` `[n, V]`, for `matrix` `[V, H]`."""
    out = a.new_empty(len(a), matrix.size(1))
    if matrix.dtype == out.dtype:
        return torch.addmm(out, a, matrix, beta=0, alpha=scale, out=out)
    if out.is_cuda:
        return torch.addmm(out, a.to(matrix.dtype), matrix, out_dtype=out.dtype, beta=0, alpha=scale, out=out)
    out.zero_()
    for block, columns in zip(matrix.split(_BLOCK), a.split(_BLOCK, dim=1), strict=True):
        out.addmm_(columns, block.to(out.dtype), alpha=scale)
    return out


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in the dtype of `total`, from a factor `b` that may be of lower precision."""
    if total.is_cuda and b.dtype != total.dtype:
        torch.addmm(total, a.to(b.dtype), b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b.to(total.dtype), out=total)
