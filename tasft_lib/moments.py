"""Two AdamW states for one set of parameters: moments of the benign loss's gradient, and moments of the penalty's.

With one state Adam divides the sum of both gradients by the root of one running mean of its square. Where few rows are
unsafe the penalty's gradient is rare and large, the benign one frequent and small; each is then scaled by the other's
history, and one clipping factor shrinks both. With two states a step is

    θ ← (1 − η w) θ − η Adam(∇NLL) − ρ η Adam(λ ∇penalty)        ρ: `penalty_adam`, w: weight decay, once

- Each gradient is clipped on its own, at the trainer's `max_grad_norm`: by the norm of the sum, a step with an unsafe
  row would lose its benign part, which is what the two states are to prevent.
- The penalty's moments advance, and its part of a step is made, in steps with an unsafe row alone. With zeros for the
  others its second moment would measure how rare unsafe rows are, and a stale direction would be followed meanwhile.
- Adam's step does not change when its gradient is multiplied by a constant. So λ > 0 acts by the clipping and by Adam's
  ε alone, and ρ stands where λ stood.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW


class TwoStates(AdamW):
    """AdamW of each parameter's `grad`, and another one, without weight decay, of its `penalty_grad` (`keep_gradient`).

    The second has `ratio` times the learning rate, and leaves everything alone in a step without a `penalty_grad`.

    Args:
        max_norm: at which the penalty's gradient is clipped over all parameters; 0: never.
        options: of `AdamW`, for both.

    `step` raises `RuntimeError` for a penalty's gradient that is not finite.
    """

    def __init__(self, params: Any, *, ratio: float, max_norm: float, **options: Any):
        super().__init__(params, **options)
        self.ratio, self.max_norm = ratio, max_norm
        self.second = AdamW([group | {"weight_decay": 0.0} for group in self.param_groups], **options)

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if all(getattr(parameter, "penalty_grad", None) is None for parameter in parameters):
            return loss
        benign = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad, parameter.penalty_grad = getattr(parameter, "penalty_grad", None), None
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm or torch.inf, error_if_nonfinite=True)
        for group, own in zip(self.param_groups, self.second.param_groups, strict=True):
            own["lr"] = self.ratio * group["lr"]  # which a schedule moves
        self.second.step()
        for parameter, gradient in zip(parameters, benign, strict=True):
            parameter.grad = gradient
        return loss

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"second": self.second.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.second.load_state_dict(state_dict["second"])
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "second"})


def keep_gradient(loss: Tensor, parameters: Iterable[Parameter]) -> Tensor:
    """Add the gradient of `loss` to each parameter's `penalty_grad`; returns the loss without a gradient.

    The graph is kept, for the other loss. Under DDP and FSDP such a gradient would be that of one rank.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        before = getattr(parameter, "penalty_grad", None)
        if gradient is not None:
            parameter.penalty_grad = gradient if before is None else before + gradient
    return loss.detach()
