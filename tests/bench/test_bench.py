"""`tasft bench` measures what it says. No timing is asserted here: `notebooks/13_performance.ipynb` has the numbers."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tasft_lib import cli
from tasft_lib.bench import contenders, measure

KEYS = {
    "time_ratio_vs_trl_sft",
    "time_ratio_vs_dense_tasft",
    "memory_ratio_vs_trl_sft",
    "memory_ratio_vs_dense_tasft",
    "max_relative_grad_error",
    "spread",
}


def test_head_as_json(capsys):
    command = "bench head --vocab 3000 --hidden 32 --tokens 256 --unsafe 0.25 --dtype float32 --repeats 2 --json"
    assert cli.main([*command.split(), "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= KEYS
    assert all(math.isfinite(result[key]) and result[key] > 0 for key in KEYS - {"spread"})
    assert result["max_relative_grad_error"] <= 1e-5 and result["max_relative_grad_error_trl_sft"] <= 1e-5
    for name, (low, high) in result["spread"].items():
        assert low <= high and name in KEYS
    # The one thing that no noise can hide: full logits, their softmax and its gradient at the least.
    assert result["peak_bytes"]["dense_tasft"] >= 3 * 256 * 3000 * 4


def test_step_as_text(capsys):
    command = "bench step --geometry tiny --batch_size 2 --unsafe 0.5 --repeats 1 --device cpu"
    assert cli.main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "against trl_sft",
        "against dense_tasft",
        "largest relative gradient error",
    ]


@pytest.mark.parametrize(
    "flags, told",
    [
        (f"{kind} --{count} 0", f"argument --{count}: '0': give a whole number, 1 or more")
        for kind, counts in {
            "head": ("repeats", "threads", "vocab", "hidden", "tokens"),
            "step": ("repeats", "threads", "batch_size", "sequence_length"),
            "saft": ("repeats", "threads", "rows", "batch_size", "hidden"),
        }.items()
        for count in counts
    ]
    + [
        (f"head --unsafe {share}", f"argument --unsafe: '{share}': give a number from 0 to 1")
        for share in ("1.5", "nan", "half")
    ],
)
def test_a_number_that_nothing_can_be_measured_with_is_refused_at_once(flags, told, capsys, monkeypatch):
    for kind in ("head", "step", "saft"):
        monkeypatch.setattr(measure, kind, lambda **_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as usage:
        cli.main(["bench", *flags.split()])
    assert usage.value.code == 2 and told in capsys.readouterr().err


SETTINGS = dict(vocab=500, hidden=16, tokens=90, unsafe=0.3, device="cpu")


@pytest.mark.parametrize("penalty", ["emd", "emd_exact", "nlcl"])
def test_contenders_have_the_loss_that_they_are_compared_on(penalty):
    """Every contender's gradient is the float64 reference's, which in turn is autograd's on the whole batch at once."""
    settings = SETTINGS | {"penalty": penalty, "dtype": "float64"}
    for name in contenders.CONTENDERS:
        exact = contenders.exact_head_gradient(settings, plain=name == contenders.TRL)
        # TRL's statistics are float32 whatever the input.
        assert contenders.relative_error(contenders.head_contender(settings, name)(), exact) <= (
            1e-5 if name == contenders.TRL else 1e-9
        ), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("penalty", ["emd", "emd_exact", "nlcl"])
def test_gradient_error_is_within_the_promised_bounds(penalty, dtype):
    settings = SETTINGS | {"penalty": penalty, "dtype": dtype}
    errors = {}
    for name in (contenders.OURS, contenders.TRL):
        exact = contenders.exact_head_gradient(settings, plain=name == contenders.TRL)
        errors[name] = contenders.relative_error(contenders.head_contender(settings, name)(), exact)
    assert errors[contenders.OURS] <= (1e-5 if dtype == "float32" else 1e-2)
    if dtype == "bfloat16":  # both end in a bfloat16 gradient, whose rounding alone is 2⁻⁹
        assert errors[contenders.OURS] <= max(errors[contenders.TRL], 2**-9)


def test_saft_as_json_and_as_text(capsys, monkeypatch):
    monkeypatch.setattr(measure, "FIT_ROWS", (1_000, 20_000))
    command = "bench saft --geometry tiny --rows 20 --batch_size 8 --hidden 256 --repeats 1 --device cpu"
    assert cli.main([*command.split(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["time_ratio_vs_forward_passes"] > 0 and set(result["seconds"]) == {"saft_filter", "forward_passes"}
    few, many = (result["fit_peak_bytes"][str(n)] for n in measure.FIT_ROWS)
    # 20,000 activations are 20 MB, in float64 twice that.
    assert many - few < 7 * 2**20
    # Measured once, told twice.
    peaks = {int(n): size for n, size in result["fit_peak_bytes"].items()}
    monkeypatch.setattr(measure, "saft", lambda **_: result | {"fit_peak_bytes": peaks})
    assert cli.main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("against the forward passes: time x") and lines[1].startswith("fit and scores of 1,000")


def test_the_forward_passes_are_those_that_the_filter_makes(monkeypatch):
    """Same batches, same layers, same states: what is left over is the filter's own work."""
    settings = dict(geometry="tiny", rows=30, batch_size=7, device="cpu", dtype="float32")
    seen = {}

    def record(name, contender):
        original = LlamaDecoderLayer.forward
        seen[name] = []

        def forward(self, states, *args, **kwargs):
            seen[name].append((tuple(states.shape), states.double().abs().sum().item()))
            return original(self, states, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(LlamaDecoderLayer, "forward", forward)
            contender()

    for name in (contenders.SAFT, contenders.FORWARD):
        record(name, contenders.saft_contender(settings, name))
    shapes, forward_shapes = ([shape for shape, _ in seen[name]] for name in seen)
    assert shapes == forward_shapes and len(shapes) == 5, "five batches, one layer of two"
    for (_, ours), (_, theirs) in zip(*seen.values(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_line_is_fitted():
    fit = measure.linear_fit([1, 2, 3], [5.0, 7.0, 9.0])
    assert fit == pytest.approx({"slope": 2, "intercept": 3, "r_squared": 1})


def test_operations_of_products_are_counted_where_the_result_has_a_type_of_its_own():
    out, a, b = torch.zeros(3, 5), torch.ones(3, 4), torch.ones(4, 5)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: measure.addmm_flops}) as counter:
        torch.addmm(out, a, b, beta=0, out=out)
    assert counter.get_total_flops() == 2 * 3 * 4 * 5
    # `out_dtype` is on GPUs alone, and comes as a fourth argument beside the shape of the result.
    assert measure.addmm_flops(out.shape, a.shape, b.shape, torch.float32, out_shape=out.shape) == 2 * 3 * 4 * 5
