"""The penalty `target` against a numeric optimiser, autograd, a loss written down once more, and plain SFT."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_model, make_rows
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize
from test_trainer import LORA, assert_same_gradient, config, gradient_step, plain_sft

from tasft_lib import TASFTConfig, TASFTTrainer, losses


def case(tokens: int = 1, vocabulary: int = 7, embedding: torch.Tensor | None = None):
    generator = torch.Generator().manual_seed(0)
    reference, logits = 2 * torch.randn(2, tokens, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    rows = torch.randn(vocabulary, 4, generator=generator, dtype=torch.float64) if embedding is None else embedding
    return reference, logits, targets, losses.unit_rows(rows)


@pytest.mark.parametrize("rows", [None, torch.eye(7, dtype=torch.float64)], ids=["dense", "one_hot"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0, 10.0])
def test_it_is_where_cosine_and_distance_from_the_reference_are_least(beta, rows):
    reference, _, targets, embedding = case(embedding=rows)
    cosine, log_ref = (embedding @ embedding[targets[0]]).numpy(), reference[0].log_softmax(-1).numpy()

    def objective(z):
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        return beta * p @ cosine + p @ (np.log(p) - log_ref)

    best = minimize(objective, log_ref, method="BFGS", options={"gtol": 1e-9})
    expected = losses.target_distribution(reference, targets, embedding, beta)[0].numpy()
    assert objective(expected) <= best.fun + 1e-10 and best.fun == pytest.approx(objective(expected), abs=1e-7)
    found = np.exp(best.x - best.x.max())
    np.testing.assert_allclose(found / found.sum(), np.exp(expected), atol=1e-4)


def test_with_one_hot_rows_the_logit_of_the_unsafe_token_falls_by_beta():
    reference, _, targets, embedding = case(5, embedding=torch.eye(7, dtype=torch.float64))
    undial = (reference - 3 * F.one_hot(targets, 7)).log_softmax(-1)
    torch.testing.assert_close(losses.target_distribution(reference, targets, embedding, 3.0), undial)


def test_its_gradient_is_what_the_model_has_more_than_the_target():
    reference, logits, targets, embedding = case(4)
    logits.requires_grad_()
    goal = losses.target_distribution(reference, targets, embedding, 3.0)
    value = losses.target(logits, targets, embedding, reference=reference, beta=3.0)
    torch.testing.assert_close(value, F.kl_div(logits.log_softmax(-1), goal, log_target=True, reduction="none").sum(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(gradient, logits.detach().softmax(-1) - goal.exp())
    assert torch.autograd.gradcheck(
        lambda z: losses.target(z, targets, embedding, reference=reference, beta=3.0), logits
    )
    assert losses.target(goal, targets, embedding, reference=reference, beta=3.0).abs().max() < 1e-12


@pytest.mark.parametrize("embedding", ["lm_head", "random", "one_hot"])
def test_a_step_is_the_gradient_of_the_loss_with_the_adapter_off_as_reference(embedding, tokenizer, tmp_path):
    rows, beta, weight = make_rows(8), 3.0, 2.0
    torch.manual_seed(0)
    model = get_peft_model(build_model(tokenizer), LoraConfig(**LORA, init_lora_weights=False))
    args = config(tmp_path, penalty="target", penalty_beta=beta, penalty_embedding=embedding)
    log, gradient = gradient_step(model, args, rows, tokenizer)
    e = {
        "lm_head": model.get_output_embeddings().weight.detach(),
        "random": torch.randn(len(tokenizer), 32, generator=torch.Generator().manual_seed(0)),
        "one_hot": torch.eye(len(tokenizer)),
    }[embedding]
    e = e / e.norm(dim=1, keepdim=True).clamp(min=1e-6)
    nll, tokens, penalty = 0.0, 0, 0.0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor(prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id])
        log_p, y = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1), ids[len(prompt) :]
        if row["label"]:
            nll, tokens = nll - log_p[range(len(y)), y].sum(), tokens + len(y)
            continue
        with torch.no_grad(), model.disable_adapter():
            before = model(ids[None]).logits[0, len(prompt) - 1 : -1].softmax(-1)
        goal = before * torch.exp(-beta * e[y] @ e.T)
        goal = goal / goal.sum(-1, keepdim=True)
        penalty += (goal * (goal.log() - log_p)).sum(-1)[:-1].mean()  # the end of the turn is not penalised
    loss = nll / tokens + weight * penalty / len(rows)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradient(gradient, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))


@plain_sft
def test_without_a_weight_it_is_plain_sft(tokenizer, tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows, steps = make_rows(8), {"max_steps": 4, "learning_rate": 0.05}
    gradients = []
    for weight in (1e-9, 0.0):
        torch.manual_seed(0)
        model = get_peft_model(build_model(tokenizer), LoraConfig(**LORA, init_lora_weights=False))
        args = config(tmp_path, penalty="target", penalty_weight=weight, **steps)
        gradients.append(gradient_step(model, args, rows, tokenizer)[1])
    torch.manual_seed(0)
    model = get_peft_model(build_model(tokenizer), LoraConfig(**LORA, init_lora_weights=False))
    benign = rows.filter(lambda row: row["label"]).remove_columns("label")
    plain = gradient_step(model, config(tmp_path, SFTConfig, **steps), benign, tokenizer, SFTTrainer)[1]
    for gradient in gradients:
        assert_same_gradient(gradient, plain)


def test_it_has_no_fused_head_and_no_reference_without_an_adapter(model, tokenizer, tmp_path):
    assert TASFTConfig(penalty="target", penalty_weight=1, output_dir=str(tmp_path)).loss_head == "dense"
    with pytest.raises(ValueError, match="needs an adapter"):
        TASFTTrainer(model, config(tmp_path, penalty="target"), train_dataset=make_rows(8), processing_class=tokenizer)
