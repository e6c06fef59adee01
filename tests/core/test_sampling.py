"""Steps with a set number of unsafe rows: how many, which, what λ weighs there, and the same after a resume."""

import pytest
import torch
from conftest import build_model, make_rows
from peft import LoraConfig, get_peft_model
from test_trainer import LORA, assert_same_gradient, config, gradient_step

from tasft_lib import TASFTTrainer
from tasft_lib.sampling import StratifiedSampler, share_of_loss


def steps_of(sampler, size):
    rows = list(sampler)
    assert len(rows) == len(sampler)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@pytest.mark.parametrize("n_benign, n_unsafe, size, s", [(50, 3, 8, 2), (48, 20, 8, 2), (5, 7, 8, 3), (30, 2, 6, 5)])
def test_every_step_has_as_many_unsafe_rows_and_all_rows_have_their_turn(n_benign, n_unsafe, size, s):
    labels = [i >= n_unsafe for i in range(n_benign + n_unsafe)]
    at = {"epoch": 0}
    sampler = StratifiedSampler(labels, step_size=size, unsafe_per_batch=s, seed=3, epoch=lambda: at["epoch"])
    epochs, visits = [], []
    for at["epoch"] in range(3):
        steps = steps_of(sampler, size)
        assert all(sum(row < n_unsafe for row in step) == s for step in steps)
        assert sorted(row for step in steps for row in step if row >= n_unsafe) == list(range(n_unsafe, len(labels)))
        assert all(len(step) == size for step in steps[:-1])
        epochs.append(steps)
        for step in steps:
            visits += [row for row in step if row < n_unsafe]
            times = [visits.count(row) for row in range(n_unsafe)]
            assert max(times) - min(times) <= 1
    assert epochs[0] != epochs[1]
    at["epoch"] = 1
    assert steps_of(sampler, size) == epochs[1]  # whatever came before: a resumed run has the straight one's rows
    other = StratifiedSampler(labels, step_size=size, unsafe_per_batch=s, seed=4, epoch=lambda: 0)
    assert steps_of(other, size) != epochs[0]


@pytest.mark.parametrize("reduction", ["batch", "unsafe", "micro_batch"])
@pytest.mark.parametrize("s, micro_batch, micro_batches", [(2, 8, 1), (2, 4, 4), (5, 4, 4), (1, 2, 3)])
def test_auto_keeps_its_pressure_whatever_the_share_of_the_rows(s, micro_batch, micro_batches, reduction):
    """λ times what the sum of the penalties is divided by, in every step; no expectation is needed."""
    size = micro_batch * micro_batches
    sampler = StratifiedSampler([True] * 70 + [False] * 3, step_size=size, unsafe_per_batch=s, seed=0, epoch=lambda: 0)
    options = {"micro_batch": micro_batch, "micro_batches": micro_batches, "unsafe_per_batch": s}
    share = share_of_loss(3 / 73, reduction, **options)
    for step in steps_of(sampler, size)[:-1]:
        micro = [[row >= 70 for row in step[i : i + micro_batch]] for i in range(0, size, micro_batch)]
        weights = {"batch": s / size, "unsafe": 1.0, "micro_batch": sum(map(any, micro)) / micro_batches}
        assert share == pytest.approx(weights[reduction])


def test_a_step_is_counted_over_all_its_micro_batches_and_is_the_same_however_it_is_split(tokenizer, tmp_path):
    logs, gradients = [], []
    for size in (8, 4, 2):
        options = {"unsafe_per_batch": 2, "per_device_train_batch_size": size}
        args = config(tmp_path, penalty="nlcl", gradient_accumulation_steps=8 // size, **options)
        log, gradient = gradient_step(build_model(tokenizer), args, make_rows(24, unsafe_every=8), tokenizer)
        assert log["unsafe_rows"] == 2
        logs.append(log)
        gradients.append(gradient)
    for log, gradient in zip(logs[1:], gradients[1:], strict=True):
        for name in ("loss", "nll", "penalty"):
            assert log[name] == pytest.approx(logs[0][name], rel=1e-5)
        assert_same_gradient(gradient, gradients[0])


def test_a_resumed_run_sees_the_rows_of_the_straight_one_and_ends_where_it_ends(tokenizer, tmp_path):
    """Resumed in the middle of an epoch and at its end; five steps an epoch, of two micro-batches."""

    def train(output, resume=None):
        torch.manual_seed(0)
        model = get_peft_model(build_model(tokenizer), LoraConfig(**LORA, lora_dropout=0.1))
        options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "unsafe_per_batch": 2}
        options |= {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-2}
        args = config(tmp_path, output_dir=str(tmp_path / output), optim="adamw_torch", **options)
        trainer = TASFTTrainer(model, args, train_dataset=make_rows(25, unsafe_every=5), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / "straight" / resume))
        return trainer

    straight = train("straight")
    assert {log["unsafe_rows"] for log in straight.state.log_history if "nll" in log} == {2}
    assert straight.state.epoch == pytest.approx(12 / 5)
    for checkpoint in ("checkpoint-5", "checkpoint-10"):
        for (name, a), (_, b) in zip(
            straight.model.named_parameters(), train("resumed", checkpoint).model.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), (checkpoint, name)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"unsafe_per_batch": -1}, "unsafe_per_batch=-1"),
        ({"unsafe_per_batch": 1, "packing": True}, "as does packing"),
        ({"unsafe_per_batch": 1, "train_sampling_strategy": "group_by_length"}, "'group_by_length'"),
        ({"unsafe_per_batch": 1, "accelerator_config": {"split_batches": True}}, "as does split_batches"),
        ({"unsafe_per_batch": 8}, "no benign row in steps of 8"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(options, message, model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        trainer = TASFTTrainer(
            model, config(tmp_path, **options), train_dataset=make_rows(8), processing_class=tokenizer
        )
        trainer.train()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows, message", [(make_rows(8, unsafe_every=None), "no row is unsafe"), (None, "streamed")])
def test_rows_that_cannot_be_stratified_are_refused_in_one_line(rows, message, model, tokenizer, tmp_path):
    rows = rows or make_rows(8).to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        TASFTTrainer(
            model, config(tmp_path, unsafe_per_batch=1), train_dataset=rows, processing_class=tokenizer
        ).train()
