"""λ by parity: the float64 reference's, however a step is split, after a resume too; up to auto's, and down again."""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_model
from datasets import Dataset
from test_branches import options, places_of, prepared, recover_rows, reference
from test_trainer import assert_same_gradient, config
from transformers import TrainerState

from tasft_lib import TASFTTrainer
from tasft_lib.weight import Parity

STEPS, RATE = 4, 0.2


def trained(rows, tokenizer, tmp_path, **changes):
    settings = options(penalty_weight="parity", max_steps=STEPS, learning_rate=RATE) | changes
    torch.manual_seed(0)
    args = config(tmp_path, **settings)
    trainer = TASFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


def weights_of(trainer):
    return [log["penalty_weight"] for log in trainer.state.log_history if "penalty_weight" in log]


@pytest.fixture(scope="module")
def rows():
    return recover_rows()


@pytest.fixture(scope="module")
def expected(rows, tokenizer, tmp_path_factory):
    """(λ after each step, parameters at the end) of gradient descent in float64, all rows in each step."""
    places = places_of(prepared(rows, tokenizer, tmp_path_factory.mktemp("rows")), rows, tokenizer)
    model = build_model(tokenizer).double()
    largest = len(rows) / rows["label"][:].count(False)  # a pressure of 1 by their share
    weight, weights, pulls, nlls = 0.0, [], [], []
    for _ in range(STEPS):
        nll, penalty, pull = reference(model, tokenizer, rows, places)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(nll + weight * penalty, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= RATE * gradient
        pulls, nlls = [*pulls, pull.item()], [*nlls, nll.item()]
        recent = 0.9 ** np.arange(len(pulls))[::-1]
        gap = np.average(pulls, weights=recent) - np.average(nlls, weights=recent)
        weight = min(max(weight + 0.05 * largest * gap, 0), largest)
        weights.append(weight)
    assert len(set(weights)) > 2 and max(weights) > 0
    return weights, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"loss_head": "dense"},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "logging_steps": 2},
        {"packing": True, "max_length": 64},
    ],
)
def test_its_steps_are_the_references_however_a_step_is_split(layout, rows, expected, tokenizer, tmp_path):
    weights, parameters = expected
    trainer = trained(rows, tokenizer, tmp_path, **layout)
    every = layout.get("logging_steps", 1)
    assert weights_of(trainer) == pytest.approx(weights[every - 1 :: every], rel=1e-4)
    assert_same_gradient({n: p.detach().double() for n, p in trainer.model.named_parameters()}, parameters, 1e-4)


def test_a_resumed_run_goes_on_with_lambda_and_its_averages(rows, tokenizer, tmp_path):
    """From a checkpoint between two lines of the log."""
    how = {"max_steps": 6, "per_device_train_batch_size": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    how |= {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / "straight")}
    straight = trained(rows, tokenizer, tmp_path, **how)
    args = config(tmp_path, **options(penalty_weight="parity") | how | {"output_dir": str(tmp_path / "resumed")})
    resumed = TASFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.penalty_weight == straight.penalty_weight > 0
    assert weights_of(resumed) == weights_of(straight)
    for (name, a), (_, b) in zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_it_falls_once_recoveries_are_likelier_than_answers(tokenizer, tmp_path):
    benign = [{"prompt": "w1 ", "completion": f"w{i}", "label": True, "recovery": None} for i in range(2, 18)]
    unsafe = {"prompt": "w1 w2 ", "completion": "w30 w31 w32", "label": False, "recovery": "w40 w41"}
    rows = Dataset.from_list(benign + [unsafe] * 8)
    how = {"max_steps": 40, "per_device_train_batch_size": 24, "optim": "adamw_torch", "learning_rate": 1e-2}
    trainer = trained(rows, tokenizer, tmp_path, **how)
    weights, last = weights_of(trainer), trainer.state.log_history[-2]
    assert -last["unsafe_log_prob"] < last["nll"] and weights[0] < max(weights) > 2 * weights[-1]


def test_it_is_autos_at_most_and_rests_where_a_step_says_nothing(tmp_path):
    sums = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
    accelerator = SimpleNamespace(device="cpu", reduce=lambda values, how: values)
    trainer = SimpleNamespace(penalty_weight=4.0, _sums=sums, accelerator=accelerator)
    parity, state = Parity(trainer), TrainerState()
    parity.on_train_begin(None, state, None)

    def step(nll, log_prob, unsafe_rows):
        parity.on_step_begin(None, state, None)
        sums["train"] += torch.tensor([10 * nll, 10, 0, unsafe_rows * log_prob, unsafe_rows])
        parity.on_step_end(None, state, None)
        return trainer.penalty_weight

    assert [step(1.0, -6.0, 2) for _ in range(5)] == pytest.approx([1.0, 2.0, 3.0, 4.0, 4.0])
    assert step(1.0, 0.0, 0) == step(float("nan"), -6.0, 2) == 4.0
    sums.clear()  # a line was logged
    assert step(1.0, 0.0, 40) < 4.0
    assert [step(1.0, 0.0, 40) for _ in range(40)][-1] == 0.0
