"""`TASFTForward`: lets a causal LM's forward return benign log-probabilities and the penalty of each unsafe sample.

It stands before the forward of TRL's fused head (`trl.trainer.utils.add_fused_lm_head`), so the losses are part of the
wrapped model's forward (DDP, FSDP, autocast, PEFT).
"""

from dataclasses import dataclass
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from .branches import two_targets
from .config import MADE_EMBEDDINGS, TASFTConfig
from .fused_head import fused_head, inverse_row_norms
from .losses import EMBEDDING_PENALTIES, HeadOutput, UnsafeTokens, centred_rows, dense_head, sample_penalty

LARGEST_ONE_HOT = 16_384  # tokens; a gigabyte


@dataclass
class TASFTOutput(FusedCausalLMOutput):
    """TRL's fused output on the benign rows, and per sample what the unsafe rows give (0 for benign rows)."""

    penalty: Tensor | None = None
    unsafe_log_prob: Tensor | None = None
    # By `losses.dense_head` from the same hidden states, if asked for: [Σ log p of benign tokens, Σ penalty].
    dense_sums: Tensor | None = None


class TASFTForward:
    """A causal LM's forward that makes the losses of `args`; `replace_forward` puts it in the model's place.

    Raises `ValueError` for a quantised output head, and for a one-hot embedding of more than 16,384 tokens.
    """

    def __init__(self, model: PreTrainedModel, args: TASFTConfig):
        self.args, self.config, self.trl_forward = args, model.config.get_text_config(), model.forward
        self.made_embedding = self.inverse_norms = None
        if not model.get_output_embeddings().weight.is_floating_point():
            raise ValueError(
                "The output head is quantised, and the loss needs its weights; leave lm_head out of the quantisation "
                "(llm_int8_skip_modules or modules_to_not_convert)."
            )
        if args.penalty_embedding == "one_hot" and self.config.vocab_size > LARGEST_ONE_HOT:
            raise ValueError(
                'penalty_embedding="one_hot" holds a square matrix of the vocabulary, and '
                f'{self.config.vocab_size:,} tokens are more than {LARGEST_ONE_HOT:,}; use "random".'
            )
        if args.penalty in EMBEDDING_PENALTIES and args.penalty_embedding in MADE_EMBEDDINGS:
            self.made_embedding = self._make_embedding(model.get_output_embeddings())

    @classmethod
    def replace_forward(cls, model: PreTrainedModel, args: TASFTConfig) -> None:
        """Let `model(..., fused_lm_head=True, unsafe_sample=...)` return a `TASFTOutput`."""
        losses = cls(model, args)

        # Trainer and generate read the signature of the model's own forward; torch.compile binds functions alone.
        @wraps(type(model).forward)
        def forward(model, *inputs, **kwargs):
            return losses(model, *inputs, **kwargs)

        model.forward = MethodType(forward, model)

    def __call__(
        self,
        model: PreTrainedModel,
        *inputs,
        fused_lm_head: bool = False,
        unsafe_sample: Tensor | None = None,
        n_samples: int | None = None,
        pushed: Tensor | None = None,
        reference_log_prob: Tensor | None = None,
        with_dense: bool = False,
        **kwargs,
    ):
        """A `TASFTOutput` where TRL asks for the fused head and tells unsafe samples; else what TRL's forward returns.

        Args:
            unsafe_sample: `[B, T]`: index, below `n_samples`, of the unsafe sample of a position; −1 elsewhere.
            pushed: `[B, T]`: the token that a branch is pushed away from (see `branches`); negative elsewhere.
            reference_log_prob: `[n_samples]`, the `unsafe_log_prob` of NPO's reference model.
            with_dense: whether `TASFTOutput.dense_sums` is wanted.
        """
        if not fused_lm_head or unsafe_sample is None:
            return self.trl_forward(*inputs, fused_lm_head=fused_lm_head, **kwargs)
        labels = kwargs.pop("labels")
        backbone = model.base_model(*inputs, **kwargs)

        # Looked up on each call, since FSDP and PEFT replace the module.
        lm_head = model.get_output_embeddings()
        weight, bias = _whole(lm_head.weight), _whole(lm_head.bias)
        # Prompt tuning puts virtual tokens in front of the hidden states and of the labels.
        unsafe_sample = F.pad(unsafe_sample, (labels.size(1) - unsafe_sample.size(1), 0), value=-1)
        unsafe_sample, labels = unsafe_sample[:, 1:].to(weight.device), labels[:, 1:].to(weight.device)
        scored = labels != -100
        sample, targets = unsafe_sample[scored], labels[scored]
        unsafe, benign = sample >= 0, scored & (unsafe_sample < 0)
        hidden = backbone.last_hidden_state[:, :-1].to(weight.device)[scored]

        scale, softcap = _logit_scale_and_softcap(self.config)
        options = {"bias": bias, "logit_scale": scale, "softcap": softcap}
        if self.args.penalty in EMBEDDING_PENALTIES:
            options |= {"unsafe": unsafe, "penalty": self.args.penalty, "embedding": self._embedding(model, weight)}

        head, reference = self._head, _dense_head_in_pieces
        if pushed is not None:
            pushed = F.pad(pushed, (labels.size(1) + 1 - pushed.size(1), 0), value=-100)[:, 1:]
            pushed = pushed.to(weight.device)[scored]
            head, reference = (partial(two_targets, of, pushed) for of in (head, reference))
        beta, margin, floor = self.args.penalty_beta, self.args.branch_margin, self.args.penalty_floor
        samples = (sample[unsafe], n_samples, beta, reference_log_prob, margin, floor)
        output = head(hidden, weight, targets, **options)
        tokens = UnsafeTokens(output.log_prob[unsafe], output.penalty[unsafe], *samples)
        dense_sums = aux_loss = None
        if with_dense:
            dense = reference(hidden, weight, targets, **options)
            dense_tokens = UnsafeTokens(dense.log_prob[unsafe], dense.penalty[unsafe], *samples)
            penalty = sample_penalty(self.args.penalty, dense_tokens)
            dense_sums = torch.stack([dense.log_prob[~unsafe].sum(), penalty.sum()])
        if kwargs.get("output_router_logits"):
            experts = (self.config.num_experts, self.config.num_experts_per_tok)
            aux_loss = load_balancing_loss_func(backbone.router_logits, *experts, kwargs.get("attention_mask"))
        # masked_scatter keeps the result connected to the model when no token is scored.
        log_probs, entropy, is_top1 = (
            values.new_zeros(scored.shape).masked_scatter(benign, values[~unsafe]) for values in output[:3]
        )
        return TASFTOutput(
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=benign,
            aux_loss=aux_loss,
            penalty=sample_penalty(self.args.penalty, tokens),
            unsafe_log_prob=tokens.mean_log_prob.detach(),
            dense_sums=dense_sums,
        )

    def _head(self, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> HeadOutput:
        if self.args.loss_head == "dense":
            return dense_head(hidden, weight, targets, **options)
        embedding, norms = options.get("embedding"), None
        # In full fine-tuning the geometry is that of the current weights; elsewhere its norms are kept.
        if embedding is not None and not embedding.requires_grad:
            if self.inverse_norms is None:
                with maybe_gather_lm_head_ctx(embedding):
                    self.inverse_norms = inverse_row_norms(embedding)
            norms = self.inverse_norms
        return fused_head(hidden, weight, targets, **options, inverse_norms=norms, gather=maybe_gather_lm_head_ctx)

    def _embedding(self, model: PreTrainedModel, weight: Tensor) -> Tensor:
        """The matrix in whose rows the penalty measures distance: `[V, any]`."""
        match self.args.penalty_embedding:
            case "lm_head":
                return weight
            case "embed_tokens":
                return _whole(model.get_input_embeddings().weight)
        self.made_embedding = self.made_embedding.to(weight.device)
        return self.made_embedding

    def _make_embedding(self, head: Module) -> Tensor:
        match self.args.penalty_embedding:
            case "one_hot":
                return torch.eye(head.out_features)
            case "random":
                return torch.randn(head.out_features, head.in_features, generator=torch.Generator().manual_seed(0))
        # Under FSDP the first rank alone may have read the weights.
        weight = broadcast(head.weight.detach().to(PartialState().device, copy=True))
        components = self.args.penalty_components if self.args.penalty_embedding == "isotropic" else 0
        return centred_rows(weight, components).to(weight.dtype)


def _dense_head_in_pieces(hidden, weight, targets, *, unsafe=None, bias=None, embedding=None, **options) -> HeadOutput:
    """`losses.dense_head` in float32 on numbers as the fused head sees them, without gradient, 256 tokens at a time."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.no_grad(), torch.autocast(device, enabled=False):
        hidden, weight = (x.to(dtype).to(torch.promote_types(dtype, torch.float32)) for x in (hidden, weight))
        options |= {"bias": None if bias is None else bias.to(weight.dtype), "embedding": embedding}
        pieces = [
            dense_head(hidden[i], weight, targets[i], unsafe=None if unsafe is None else unsafe[i], **options)
            for i in torch.arange(len(hidden), device=hidden.device).split(256)
        ]
    return HeadOutput(*(torch.cat(values) for values in zip(*pieces, strict=True)))


def _whole(parameter: Tensor | None) -> Tensor | None:
    """A parameter that FSDP2 has sharded, gathered; any other as it is. Its gradient is averaged over ranks."""
    if not isinstance(parameter, DTensor):
        return parameter
    # By default the gradient would be taken to be the same on every rank.
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _logit_scale_and_softcap(config) -> tuple[float, float | None]:
    """What a model does to its logits after the head: scaling (Cohere, Granite, ...) and soft-capping (Gemma 2)."""
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)
