"""Two AdamW states: the sum of two separate runs' steps; plain AdamW where there is no penalty; λ drops out."""

import pytest
import torch
from conftest import build_model, make_rows
from test_trainer import assert_same_gradient, config, gradient_step
from torch.optim import AdamW

from tasft_lib import TASFTConfig, TASFTTrainer
from tasft_lib.moments import TwoStates, keep_gradient

STEPS, RATIO, CLIP = 12, 0.5, 0.3


def trained(tokenizer, tmp_path, rows=None, *, resume=None, **options):
    how = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6, "weight_decay": 0.1, "max_grad_norm": 1.0}
    args = config(tmp_path, **how | {"penalty": "nlcl"} | options)
    rows = make_rows(24, unsafe_every=6) if rows is None else rows
    trainer = TASFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_equal(first, second):
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_step_is_the_sum_of_the_steps_of_two_optimizers_and_decays_once():
    """Both run on their own parameters, and get the gradients at the common ones; a third of the steps is unsafe."""
    torch.manual_seed(0)
    matrix, target = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    theta = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    apart = [torch.nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(2)]
    decay = 0.1
    both = TwoStates([theta], ratio=RATIO, max_norm=CLIP, lr=0.01, weight_decay=decay)
    single = [AdamW([parameter], lr=rate, weight_decay=0) for parameter, rate in zip(apart, (0.01, 0.005), strict=True)]
    for step in range(STEPS):
        rate = 0.01 * (1 - step / STEPS)  # a schedule
        benign, penalty = (matrix @ theta - target).square().sum(), 100 * (theta * target).sum().exp()
        gradients = [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in (benign, penalty)]
        before = [parameter.detach().clone() for parameter in (theta, *apart)]
        both.zero_grad()
        if step % 3 == 1:
            keep_gradient(penalty, [theta])
        benign.backward()
        both.param_groups[0]["lr"] = rate
        both.step()
        for optimizer, parameter, gradient, factor in zip(single, apart, gradients, (1, RATIO), strict=True):
            optimizer.param_groups[0]["lr"] = factor * rate
            parameter.grad = gradient
        apart[1].grad *= CLIP / apart[1].grad.norm() if apart[1].grad.norm() > CLIP else 1
        single[0].step()
        if step % 3 == 1:
            single[1].step()
        moved = [parameter.detach() - old for parameter, old in zip((theta, *apart), before, strict=True)]
        torch.testing.assert_close(moved[0], moved[1] + moved[2] - rate * decay * before[0], rtol=1e-4, atol=1e-9)
        assert torch.equal(theta.grad, gradients[0]) and getattr(theta, "penalty_grad", None) is None


def test_without_a_penalty_it_is_plain_adamw(tokenizer, tmp_path):
    assert_equal(
        trained(tokenizer, tmp_path, penalty_weight=0), trained(tokenizer, tmp_path, penalty_weight=0, penalty_adam=1.0)
    )
    benign = make_rows(24, unsafe_every=None)
    assert_equal(trained(tokenizer, tmp_path, benign), trained(tokenizer, tmp_path, benign, penalty_adam=1.0))


def test_the_first_step_is_the_sum_of_the_two_gradients_signs(tokenizer, tmp_path):
    """Adam's first step is η sign(g). The gradients are those of plain gradient descent, with λ = 0 and without."""
    rows, model = make_rows(8), build_model(tokenizer)
    _, benign = gradient_step(model, config(tmp_path, penalty_weight=0), rows, tokenizer)
    _, total = gradient_step(model, config(tmp_path, penalty_weight=2.0), rows, tokenizer)
    for micro_batch in (8, 2):
        how = {"optim": "adamw_torch", "learning_rate": 1e-3, "penalty_adam": RATIO, "adam_epsilon": 1e-12}
        how |= {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 8 // micro_batch}
        _, moved = gradient_step(model, config(tmp_path, penalty_weight=2.0, **how), rows, tokenizer)
        for name in benign:
            penalty = total[name] - benign[name]
            clear = (benign[name].abs() > 1e-4) & (penalty.abs() > 1e-4)
            expected = 1e-3 * (benign[name].sign() + RATIO * penalty.sign())
            assert clear.float().mean() > 0.1 or name.endswith("norm.weight")
            torch.testing.assert_close(moved[name][clear], expected[clear], rtol=1e-3, atol=1e-6)


def test_lambda_drops_out_where_nothing_is_clipped(tokenizer, tmp_path):
    how = {"penalty_adam": 1.0, "max_grad_norm": 0, "adam_epsilon": 1e-12, "learning_rate": 1e-3}
    few, many = (trained(tokenizer, tmp_path, penalty_weight=weight, **how) for weight in (1.0, 1024.0))
    start = dict(build_model(tokenizer).named_parameters())
    assert_same_gradient(*({name: end[name] - start[name] for name in end} for end in (few, many)), tolerance=1e-3)
    plain = trained(tokenizer, tmp_path, penalty_weight=1024.0, **how | {"penalty_adam": 0.0})
    assert any((plain[name] - few[name]).abs().max() > 1e-3 for name in few)


def test_a_resumed_run_goes_on_with_both_states(tokenizer, tmp_path):
    how = {"penalty_adam": 1.0, "save_strategy": "steps", "save_steps": 3}
    straight = trained(tokenizer, tmp_path, output_dir=str(tmp_path / "straight"), **how)
    checkpoint = str(tmp_path / "straight" / "checkpoint-3")
    assert_equal(straight, trained(tokenizer, tmp_path, output_dir=str(tmp_path / "on"), resume=checkpoint, **how))


@pytest.mark.parametrize("options", [{"optim": "sgd"}, {"fp16": True, "bf16": False}, {"penalty_adam": -1}])
def test_what_it_cannot_do_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="penalty_adam"):
        TASFTConfig(output_dir=str(tmp_path), use_cpu=True, **{"penalty_adam": 1.0, "optim": "adamw_torch"} | options)
