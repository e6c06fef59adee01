"""The fused head against `losses.dense_head` and autograd, and what it promises to spend."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tasft_lib.fused_head import fused_head, inverse_row_norms
from tasft_lib.losses import centred_rows, dense_head

PENALTIES = ["emd", "emd_exact"]
N, H, V = 23, 6, 37
HEAD = ("hidden", "weight", "bias")


def case(*, unsafe: float = 0.5, n: int = N, h: int = H, v: int = V, dtype=torch.float64) -> dict:
    """Inputs of a head, and what a loss asks of each token; targets are likely often enough to be top-1 at times."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(n, h), 2 * normal(v, h) / h**0.5, normal(v)
    likely = (hidden @ weight.T + bias).argmax(-1)
    targets = torch.where(torch.rand(n, generator=generator) < 0.3, likely, torch.randint(v, (n,), generator=generator))
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": bias.to(dtype),
        "targets": targets,
        "unsafe": torch.rand(n, generator=generator) < unsafe,
        "asked": torch.rand(2, n, generator=generator, dtype=torch.float64),
    }


def run(head, inputs: dict, trained: tuple[str, ...] = (), **options):
    """(outputs by name, gradients by name) of Σ asked · (−log p, penalty)."""
    inputs = dict(inputs)
    asked = inputs.pop("asked")
    inputs |= {name: inputs[name].detach().clone().requires_grad_() for name in trained}
    output = head(**inputs, **options)
    loss = (asked[1] * output.penalty - asked[0] * output.log_prob).sum()
    gradients = torch.autograd.grad(loss, [inputs[name] for name in trained]) if trained else ()
    return {k: v.detach() for k, v in output._asdict().items()}, dict(zip(trained, gradients, strict=True))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("trained", [("hidden",), ("weight", "bias"), HEAD], ids="+".join)
@pytest.mark.parametrize(
    "transform",
    [{}, {"logit_scale": 0.7}, {"softcap": 3.0}, {"logit_scale": 1.3, "softcap": 2.0}],
    ids=["plain", "scaled", "capped", "both"],
)
@pytest.mark.parametrize("geometry", ["lm_head", "embed_tokens", "isotropic"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_values_and_gradients_are_the_dense_ones(penalty, geometry, transform, trained):
    options = {"penalty": penalty} | transform
    cached = {}
    if geometry == "embed_tokens":  # of another width, as in OPT-350m
        generator = torch.Generator().manual_seed(1)
        options["embedding"] = torch.randn(V, H + 3, dtype=torch.float64, generator=generator)
    elif geometry == "isotropic":
        options["embedding"] = centred_rows(case()["weight"], 2)
    if geometry != "lm_head":
        cached = {"inverse_norms": inverse_row_norms(options["embedding"])}
    expected = run(dense_head, case(), trained, **options)
    for chunk_size in (1, 5, N, None):
        actual = run(fused_head, case(), trained, **options, **cached, chunk_size=chunk_size)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("unsafe", [0.0, 1.0])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_sided_batches(penalty, unsafe, bias):
    inputs = case(unsafe=unsafe) | ({} if bias else {"bias": None})
    trained = HEAD if bias else HEAD[:2]
    expected, actual = (run(head, inputs, trained, penalty=penalty) for head in (dense_head, fused_head))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_a_penalty_of_log_probabilities_is_plain_torch_on_the_output():
    """NLCL on samples of tokens, by linearity: with `unsafe` left out, every log p carries its gradient."""
    from tasft_lib import losses

    inputs = case()
    sample = torch.arange(N) % 3

    def nlcl(head):
        hidden = inputs["hidden"].clone().requires_grad_()
        log_prob = head(hidden, inputs["weight"], inputs["targets"], bias=inputs["bias"]).log_prob
        return torch.autograd.grad(losses.nlcl(losses.sample_mean(log_prob, sample, 3)).sum(), hidden)

    torch.testing.assert_close(nlcl(fused_head), nlcl(dense_head), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trained", [("hidden",), HEAD], ids="+".join)
@pytest.mark.parametrize("head", [fused_head, dense_head])
def test_no_token_at_all_gives_zeros_that_are_connected_to_the_model(head, trained):
    output, gradients = run(head, case(n=0), trained)
    assert all(value.shape == (0,) for value in output.values())
    assert not any(gradient.any() for gradient in gradients.values())
    assert gradients["hidden"].shape == (0, H)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_without_gradients_the_values_are_the_same_and_cost_no_gradient(penalty, context):
    inputs = case()
    expected, _ = run(fused_head, inputs, HEAD, penalty=penalty)
    with context(), FlopCounterMode(display=False) as counter:
        output, _ = run(fused_head, inputs, penalty=penalty)
    torch.testing.assert_close(output, expected)
    assert counter.get_total_flops() == 2 * H * V * (N + inputs["unsafe"].sum())


@pytest.mark.parametrize("penalty, products", [("emd_exact", 3), ("emd", 4)])
def test_products_per_token(penalty, products):
    """2 for a log-probability, 3 or 4 for a penalty; training the head takes the tile again and one more."""
    inputs = case() | {"bias": None}
    unsafe = inputs["unsafe"].sum().item()
    frozen = 2 * (N - unsafe) + products * unsafe
    again = 1 * (N - unsafe) + (products - 1) * unsafe
    for trained, expected in ((("hidden",), frozen), (("hidden", "weight"), frozen + again + N)):
        with FlopCounterMode(display=False) as counter:
            run(fused_head, inputs, trained, penalty=penalty, chunk_size=8)
        assert counter.get_total_flops() == 2 * H * V * expected


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_tensor_is_larger_than_a_chunk_of_logits(penalty, softcap, dtype):
    inputs = case(n=90, h=3, v=301, dtype=dtype)
    with LargestTensor() as dense:
        run(dense_head, inputs, HEAD, penalty=penalty, softcap=softcap)
    with LargestTensor() as fused:
        run(fused_head, inputs, HEAD, penalty=penalty, softcap=softcap, chunk_size=10)
    assert dense.numel >= 90 * 301
    assert fused.numel == 10 * 301


def test_backward_may_run_twice():
    inputs = case()
    asked = inputs.pop("asked")
    inputs |= {name: inputs[name].requires_grad_() for name in HEAD}
    output = fused_head(**inputs)
    loss = (asked[0] * output.log_prob + asked[1] * output.penalty).sum()
    first, second = (
        torch.autograd.grad(factor * loss, [inputs[name] for name in HEAD], retain_graph=True) for factor in (1, 3)
    )
    torch.testing.assert_close(tuple(3 * gradient for gradient in first), second)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_float32_gradient_is_exact_to_five_digits(penalty):
    exact = case(n=200, h=16, v=2000)
    _, expected = run(dense_head, exact, HEAD, penalty=penalty)
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in exact.items()}
    _, gradients = run(fused_head, inputs, HEAD, penalty=penalty)
    for name in HEAD:
        assert gradients[name].dtype == torch.float32
        assert relative_error(gradients[name], expected[name]) <= 1e-5, name


def trl_head(hidden, weight, targets, bias, unsafe):
    kernel = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL 1.15 without Triton", exc_type=ImportError)
    log_prob, *_ = kernel.ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 1.0, 512, None, 1.0, ("log_probs",)
    )
    return dense_head(hidden, weight, targets, bias=bias)._replace(log_prob=log_prob)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_bfloat16_log_prob_gradient_is_as_exact_as_trls(autocast):
    """Against float64 on the same bfloat16 numbers. TRL rounds the logits, we do not."""
    inputs = case(n=300, h=64, v=2000, unsafe=0, dtype=torch.bfloat16) | {"bias": None}
    exact = {k: v.double() if k in ("hidden", "weight") else v for k, v in inputs.items()}
    _, expected = run(dense_head, exact, ("hidden",))
    if autocast:
        inputs |= {"hidden": inputs["hidden"].float(), "weight": inputs["weight"].float()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, theirs = run(trl_head, inputs, ("hidden",))
        _, ours = run(fused_head, inputs, ("hidden",))
    assert ours["hidden"].dtype == inputs["hidden"].dtype
    error, their_error = (relative_error(g["hidden"], expected["hidden"]) for g in (ours, theirs))
    assert error <= min(their_error, 1e-2)


@pytest.mark.parametrize("trained", [("hidden",), HEAD], ids="+".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_low_precision_gradients(penalty, dtype, trained):
    inputs = case(n=200, h=64, v=2000, dtype=dtype)
    exact = {k: v.double() if k in HEAD else v for k, v in inputs.items()}
    _, expected = run(dense_head, exact, trained, penalty=penalty)
    output, gradients = run(fused_head, inputs, trained, penalty=penalty)
    assert output["log_prob"].dtype == torch.float32
    for name in trained:
        assert gradients[name].dtype == dtype
        assert relative_error(gradients[name], expected[name]) <= 1e-2, name


def test_float16_gradients_do_not_underflow_before_the_loss_scaler_multiplies():
    inputs = case(dtype=torch.float16)
    _, expected = run(dense_head, {k: v.double() if k in HEAD else v for k, v in inputs.items()}, ("hidden",))
    inputs["hidden"].requires_grad_()
    asked = inputs.pop("asked")
    output = fused_head(**inputs)
    loss = 2**-20 * (asked[1] * output.penalty - asked[0] * output.log_prob).sum()
    (gradient,) = torch.autograd.grad(2**20 * loss, inputs["hidden"])
    assert relative_error(gradient, expected["hidden"]) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("certainty", ["p→1", "p→0"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_finite_at_the_extremes(penalty, certainty, dtype):
    inputs = case(dtype=dtype)
    inputs["hidden"] = 1e3 * inputs["hidden"]
    logits = (inputs["hidden"] @ inputs["weight"].T).float()
    inputs["targets"] = logits.argmax(-1) if certainty == "p→1" else logits.argmin(-1)
    output, gradients = run(fused_head, inputs, HEAD, penalty=penalty)
    assert all(value.isfinite().all() for value in [*output.values(), *gradients.values()])
    assert (output["entropy"] >= 0).all() and (output["log_prob"] <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_an_all_zero_embedding_row_stays_zero(penalty, dtype):
    inputs = case(unsafe=1.0, dtype=dtype)
    inputs["weight"][3] = 0
    inputs["targets"][:5] = 3
    assert inverse_row_norms(inputs["weight"])[3] == 0
    exact = {k: v.double() if k in HEAD else v for k, v in inputs.items()}
    reference, expected = run(dense_head, exact, ("hidden",), penalty=penalty)
    output, gradients = run(fused_head, inputs, ("hidden",), penalty=penalty)
    torch.testing.assert_close(output["penalty"].double(), reference["penalty"], rtol=5e-3, atol=5e-3)
    assert relative_error(gradients["hidden"], expected["hidden"]) <= (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("head", [fused_head, dense_head])
def test_equally_likely_tokens(head):
    output, _ = run(head, case(unsafe=0) | {"weight": torch.zeros(V, H, dtype=torch.float64), "bias": None})
    assert output["is_top1"].all()
    torch.testing.assert_close(output["entropy"], torch.full((N,), float(V), dtype=torch.float64).log())


def test_inside_torch_compile():
    inputs = case()

    def gradient_of(hidden, **rest):
        _, gradients = run(fused_head, {"hidden": hidden.tanh(), **rest}, ("hidden",))
        return gradients["hidden"]

    torch.testing.assert_close(torch.compile(gradient_of, backend="eager")(**inputs), gradient_of(**inputs))
