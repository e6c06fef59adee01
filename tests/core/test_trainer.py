"""`TASFTTrainer` against an independent dense reference, TRL's SFTTrainer, and itself split otherwise."""

import copy
import inspect
from dataclasses import replace
from itertools import pairwise, repeat

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trl.trainer.utils
from conftest import build_model, make_rows
from datasets import Dataset, IterableDataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from tasft_lib import TASFTConfig, TASFTTrainer, losses
from tasft_lib import trainer as trainer_module
from tasft_lib.experiments import methods
from tasft_lib.records import data

# TRL 1.15's own head, which plain SFT stands on, needs Triton.
plain_sft = pytest.mark.skipif(trl.trainer.utils._ChunkedLogProbFunction is None, reason="TRL 1.15 without Triton")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def one_step(tmp_path):
    """Options of one optimizer step of plain gradient descent at rate 1 without clipping: weights move by −gradient."""
    return dict(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def config(tmp_path, cls=TASFTConfig, **overrides):
    settings = one_step(tmp_path)
    if cls is TASFTConfig:
        settings["penalty_weight"] = 2.0
    return cls(**(settings | overrides))


def gradient_step(model, args, rows, tokenizer, trainer_class=TASFTTrainer, **kwargs):
    """(loss, gradient by parameter name) of one training step."""
    model = copy.deepcopy(model)
    trainer = trainer_class(model, args, train_dataset=rows, processing_class=tokenizer, **kwargs)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    gradient = {n: before[n] - p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return trainer.state.log_history[0], gradient


def assert_same_gradient(first, second, tolerance=2e-5):
    assert first.keys() == second.keys()
    for name in first:
        scale = first[name].abs().max().clamp(min=1e-3)
        assert (first[name] - second[name]).abs().max() <= tolerance * scale, name


def without_axes(weight, components):
    """The rows without mean and top components, but for padding, in float64."""
    rows = weight.double()
    tokens = rows.abs().sum(1) > 0
    rows[tokens] -= rows[tokens].mean(0)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    return (rows - rows @ axes[:components].T @ axes[:components]).float()


def reference_loss(
    model,
    tokenizer,
    rows,
    *,
    penalty,
    weight,
    reduction="batch",
    split=8,
    embedding="lm_head",
    eos=False,
    first=None,
    floor=0.0,
):
    """Eq. 6 and 8 written down once more, row by row from full logits, with none of the trainer's code."""
    e = {
        "lm_head": model.get_output_embeddings().weight.detach(),
        "embed_tokens": model.get_input_embeddings().weight.detach(),
        "one_hot": torch.eye(len(tokenizer)),
        "random": torch.randn(len(tokenizer), 32, generator=torch.Generator().manual_seed(0)),
        "centred": without_axes(model.get_output_embeddings().weight.detach(), 0),
        "isotropic": without_axes(model.get_output_embeddings().weight.detach(), 3),
    }[embedding]
    e = e / e.norm(dim=1, keepdim=True).clamp(min=1e-6)  # the padding row is zero
    nll, tokens, penalties = 0.0, 0, []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor(prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id])
        log_p = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        y = ids[len(prompt) :]
        if row["label"]:
            nll, tokens = nll - log_p[range(len(y)), y].sum(), tokens + len(y)
            penalties.append(None)
            continue
        if not eos:
            log_p, y = log_p[:-1], y[:-1]
        log_p, y = log_p[:first], y[:first]
        unsafe_log_p = log_p[range(len(y)), y]
        if penalty == "nlcl":
            penalties.append(-(1 - unsafe_log_p.mean().exp()).log())
        elif penalty == "gradient_ascent":
            penalties.append(unsafe_log_p.mean())
        elif penalty == "unlikelihood":
            penalties.append(-(1 - unsafe_log_p.exp()).log().mean())
        elif penalty == "simnpo":
            penalties.append(-2 / 2.5 * F.logsigmoid(-2.5 * unsafe_log_p.mean()))
        elif penalty == "npo":
            with torch.no_grad(), model.disable_adapter():
                before = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(y)), y]
            penalties.append(-2 / 0.1 * F.logsigmoid(-0.1 * (unsafe_log_p.sum() - before.sum())))
        else:
            mu = log_p.exp() @ e
            value = -(mu - e[y]).square().sum(-1) if penalty == "emd" else (mu * e[y]).sum(-1) - 1
            penalties.append(value.mean())
        if unsafe_log_p[0].exp() < floor:
            penalties[-1] = 0 * penalties[-1]
    unsafe = [p for p in penalties if p is not None]
    if reduction == "micro_batch":
        micro = [[p for p in penalties[i : i + split] if p is not None] for i in range(0, len(penalties), split)]
        pen = sum(sum(m) / len(m) for m in micro if m) / len(micro)
    else:
        pen = sum(unsafe) / (len(penalties) if reduction == "batch" else len(unsafe))
    return nll / tokens + weight * pen


@pytest.mark.parametrize("loss_head", ["fused", "dense"])
@pytest.mark.parametrize("embedding", ["lm_head", "embed_tokens", "centred", "isotropic", "one_hot", "random"])
@pytest.mark.parametrize("reduction, split", [("batch", 8), ("unsafe", 4), ("micro_batch", 2)])
@pytest.mark.parametrize("penalty", ["emd", "emd_exact", "nlcl"])
def test_step_is_the_gradient_of_the_papers_loss(
    penalty, reduction, split, embedding, loss_head, model, tokenizer, tmp_path
):
    if embedding != "lm_head" and (penalty == "nlcl" or (embedding != "embed_tokens" and reduction != "batch")):
        pytest.skip("NLCL has no embedding, and those that are made one reduction")
    rows = make_rows(8)
    args = config(
        tmp_path,
        penalty=penalty,
        penalty_reduction=reduction,
        penalty_embedding=embedding,
        loss_head=loss_head,
        per_device_train_batch_size=split,
        gradient_accumulation_steps=8 // split,
        train_sampling_strategy="sequential",
    )
    log, gradient = gradient_step(model, args, rows, tokenizer)
    loss = reference_loss(
        model, tokenizer, rows, penalty=penalty, weight=2.0, reduction=reduction, split=split, embedding=embedding
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradient(gradient, expected)


@pytest.mark.parametrize("loss_head", ["fused", "dense"])
@pytest.mark.parametrize("penalty", ["gradient_ascent", "unlikelihood", "npo", "simnpo"])
def test_rivals_are_their_papers_losses(penalty, loss_head, tokenizer, tmp_path):
    rows = make_rows(8)
    torch.manual_seed(0)
    model = get_peft_model(build_model(tokenizer), LoraConfig(**LORA, init_lora_weights=False))
    args = config(tmp_path, penalty=penalty, loss_head=loss_head)
    log, gradient = gradient_step(model, args, rows, tokenizer)
    loss = reference_loss(model, tokenizer, rows, penalty=penalty, weight=2.0)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradient(gradient, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))


def test_npo_without_an_adapter_has_no_reference(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs an adapter"):
        TASFTTrainer(model, config(tmp_path, penalty="npo"), train_dataset=make_rows(8), processing_class=tokenizer)


def test_penalize_eos_adds_the_eos_token(model, tokenizer, tmp_path):
    rows = make_rows(8)
    args = config(tmp_path, penalize_eos=True, train_sampling_strategy="sequential")
    log, _ = gradient_step(model, args, rows, tokenizer)
    expected = reference_loss(model, tokenizer, rows, penalty="emd", weight=2.0, eos=True)
    without = reference_loss(model, tokenizer, rows, penalty="emd", weight=2.0)
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert abs(expected - without) > 1e-3


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("penalty", ["emd", "nlcl"])
def test_only_the_first_tokens_can_be_penalised(penalty, first, padding_free, model, tokenizer, tmp_path):
    rows = make_rows(8)
    layout = {"padding_free": True, "max_length": None} if padding_free else {}
    args = config(tmp_path, penalty=penalty, penalty_first_tokens=first, **layout)
    log, gradient = gradient_step(model, args, rows, tokenizer)
    loss = reference_loss(model, tokenizer, rows, penalty=penalty, weight=2.0, first=first)
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradient(gradient, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 128}, {"loss_head": "dense"}])
@pytest.mark.parametrize("penalty", ["emd", "unlikelihood"])
def test_a_row_whose_first_token_is_unlikely_enough_exerts_no_pressure(penalty, layout, model, tokenizer, tmp_path):
    rows, how = make_rows(12), {"penalty": penalty, "weight": 2.0}
    args = config(tmp_path, penalty=penalty, penalty_floor=0.01, per_device_train_batch_size=12, **layout)
    log, gradient = gradient_step(model, args, rows, tokenizer)
    losses_ = [reference_loss(model, tokenizer, rows, floor=floor, **how) for floor in (0.01, 0.0, 1.0)]
    assert len({round(loss.item(), 4) for loss in losses_}) == 3  # some of the rows are off, but not all
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert log["loss"] == pytest.approx(losses_[0].item(), rel=1e-5)
    assert_same_gradient(gradient, dict(zip(names, torch.autograd.grad(losses_[0], parameters), strict=True)))


@pytest.mark.parametrize("embedding", ["centred", "isotropic"])
def test_a_made_geometry_is_the_bases_own_and_leaves_a_tied_head_alone(embedding, tokenizer, tmp_path):
    """Full fine-tuning of a model whose head is its embedding: a resumed run has the geometry of the straight one."""
    base = build_model(tokenizer, tie_word_embeddings=True)

    def train(output, resume=None):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "output_dir": str(tmp_path / output)}
        model = copy.deepcopy(base)
        args = config(tmp_path, penalty_embedding=embedding, **options)
        trainer = TASFTTrainer(model, args, train_dataset=make_rows(8), processing_class=tokenizer)
        assert torch.equal(model.lm_head.weight, base.lm_head.weight)
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = train("straight")
    resumed = train("resumed", resume=str(tmp_path / "straight" / "checkpoint-1"))
    assert straight.lm_head.weight is straight.model.embed_tokens.weight
    assert not torch.equal(straight.lm_head.weight, base.lm_head.weight)
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_one_hot_embedding_is_for_small_vocabularies(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tasft_lib.forward.LARGEST_ONE_HOT", 50)
    with pytest.raises(ValueError, match="63 tokens are more than 50"):
        args = config(tmp_path, penalty_embedding="one_hot")
        TASFTTrainer(build_model(tokenizer), args, train_dataset=make_rows(8), processing_class=tokenizer)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_imitation_is_the_likelihood_of_the_safe_answers_where_the_penalty_stands(weight, model, tokenizer, tmp_path):
    rows = make_rows(8)
    reference = copy.deepcopy(model)
    trainer = methods.make_trainer(
        "imitation", model, tokenizer, *data.by_label(rows), penalty_weight=weight, lora={}, training=one_step(tmp_path)
    )
    trainer.train()
    loss = reference_loss(reference, tokenizer, rows, penalty="gradient_ascent", weight=-weight, eos=True)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.penalty_weight == weight and log["penalty"] > 0


@pytest.mark.parametrize("loss_head", ["fused", "dense"])
@pytest.mark.parametrize("penalty", ["emd", "emd_exact", "nlcl"])
@pytest.mark.parametrize("reduction", ["batch", "unsafe"])
def test_any_split_into_micro_batches_gives_the_same_step(penalty, reduction, loss_head, model, tokenizer, tmp_path):
    steps = [
        gradient_step(
            model,
            config(
                tmp_path,
                penalty=penalty,
                penalty_reduction=reduction,
                loss_head=loss_head,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
            ),
            make_rows(24),
            tokenizer,
        )
        for size in (8, 4, 1)
    ]
    for log, gradient in steps[1:]:
        assert log["loss"] == pytest.approx(steps[0][0]["loss"], rel=1e-5)
        for name in ("nll", "penalty", "unsafe_log_prob", "unsafe_rows"):
            assert log[name] == pytest.approx(steps[0][0][name], rel=1e-5)
        assert_same_gradient(gradient, steps[0][1])


@pytest.mark.parametrize("loss_head", ["fused", "dense"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("penalty", ["emd", "nlcl"])
@pytest.mark.parametrize("reduction", ["batch", "unsafe"])
def test_packed_and_padding_free_steps_are_the_padded_one(
    reduction, penalty, attention, loss_head, tokenizer, tmp_path
):
    """The gradient would differ if samples attended to each other or a mean ran over more than one sample."""
    model = build_model(tokenizer, attn_implementation=attention)
    settings = dict(penalty=penalty, penalty_reduction=reduction, loss_head=loss_head)
    settings |= {"penalty_embedding": "isotropic"} if penalty == "emd" and attention == "eager" else {}
    padded, expected = gradient_step(model, config(tmp_path, **settings), make_rows(8), tokenizer)
    layouts = {
        "padding-free": dict(padding_free=True, max_length=None),
        "packed": dict(packing=True, max_length=64),
        "packed, accumulated": dict(
            packing=True, max_length=64, per_device_train_batch_size=1, gradient_accumulation_steps=8
        ),
        "padded to multiples": dict(padding_free=True, max_length=None, pad_to_multiple_of=16),
    }
    for layout, options in layouts.items():
        log, gradient = gradient_step(model, config(tmp_path, **settings, **options), make_rows(8), tokenizer)
        for name in ("loss", "nll", "penalty", "unsafe_log_prob", "unsafe_rows", "mean_token_accuracy"):
            if not (name == "mean_token_accuracy" and "accumulated" in layout):  # TRL averages it over micro-batches
                assert log[name] == pytest.approx(padded[name], rel=1e-5), (layout, name)
        assert_same_gradient(gradient, expected)


def test_packing_keeps_every_row_and_its_label(tokenizer, tmp_path):
    rows = make_rows(40)
    args = config(tmp_path, packing=True, max_length=64, shuffle_dataset=True, seed=3, penalty_weight="auto")
    trainer = TASFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
    label_of = {
        tuple(tokenizer(row["prompt"] + row["completion"] + "<eos>")["input_ids"]): row["label"] for row in rows
    }
    seen = {}
    for batch in trainer.get_train_dataloader():
        bounds = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["position_ids"].size(1)]
        for start, end in pairwise(bounds):
            (is_unsafe,) = set(batch["unsafe"][0, start:end].tolist())
            seen[tuple(batch["input_ids"][0, start:end].tolist())] = not is_unsafe
    assert seen == label_of and len(trainer.train_dataset) < len(rows)
    # An unsafe share of 14 in 40 rows, however they are packed.
    assert trainer.penalty_weight == pytest.approx(0.077 / (14 / 40))


@plain_sft
def test_without_unsafe_rows_a_run_is_an_sft_trainer_run(model, tokenizer, tmp_path):
    rows = make_rows(24, unsafe_every=None)
    settings = dict(max_steps=4, learning_rate=0.05, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    ours, our_change = gradient_step(model, config(tmp_path, **settings), rows, tokenizer)
    theirs, their_change = gradient_step(
        model, config(tmp_path, cls=SFTConfig, **settings), rows.remove_columns("label"), tokenizer, SFTTrainer
    )
    assert_same_gradient(our_change, their_change)
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@plain_sft
@pytest.mark.parametrize("embedding", ["lm_head", "isotropic"])
def test_weight_zero_is_sft_trainers_step_on_the_benign_rows(embedding, model, tokenizer, tmp_path):
    rows = make_rows(8)
    args = config(tmp_path, penalty_weight=0.0, penalty_embedding=embedding)
    ours, our_gradient = gradient_step(model, args, rows, tokenizer)
    theirs, their_gradient = gradient_step(
        model,
        config(tmp_path, cls=SFTConfig),
        rows.filter(lambda row: row["label"]).remove_columns("label"),
        tokenizer,
        SFTTrainer,
    )
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"])
    assert_same_gradient(our_gradient, their_gradient)


@pytest.mark.parametrize("penalty", ["emd", "emd_exact", "nlcl"])
def test_training_lowers_the_unsafe_log_probability(penalty, model, tokenizer, tmp_path):
    args = config(
        tmp_path, penalty=penalty, max_steps=12, optim="adamw_torch", learning_rate=5e-3, penalty_weight=5.0, seed=1
    )
    trainer = TASFTTrainer(model, args, train_dataset=make_rows(24), processing_class=tokenizer)
    trainer.train()
    history = [log["unsafe_log_prob"] for log in trainer.state.log_history if "unsafe_log_prob" in log]
    assert history[-1] < history[0]
    benign = [log["nll"] for log in trainer.state.log_history if "nll" in log]
    assert benign[-1] < benign[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_lora_matrix_moves_and_the_adapter_survives_saving(checkpointing, tokenizer, tmp_path):
    model = build_model(tokenizer)
    model.save_pretrained(tmp_path / "base")
    args = config(tmp_path, max_steps=3, optim="adamw_torch", learning_rate=1e-2, gradient_checkpointing=checkpointing)
    trainer = TASFTTrainer(
        str(tmp_path / "base"),
        args,
        train_dataset=make_rows(24),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n in before if "lora_" in n} and moved
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[3, 9, 27, 14]])
    trainer.model.eval()
    torch.testing.assert_close(loaded(ids).logits, trainer.model(ids).logits)


def test_gradient_checkpointing_gives_the_same_step(model, tokenizer, tmp_path):
    plain = gradient_step(model, config(tmp_path), make_rows(8), tokenizer)
    checkpointed = gradient_step(model, config(tmp_path, gradient_checkpointing=True), make_rows(8), tokenizer)
    assert_same_gradient(plain[1], checkpointed[1])


@pytest.mark.parametrize("unsafe_every", [1, None])
def test_one_sided_batches_train(unsafe_every, model, tokenizer, tmp_path):
    log, gradient = gradient_step(model, config(tmp_path), make_rows(8, unsafe_every=unsafe_every), tokenizer)
    assert all(g.isfinite().all() for g in gradient.values())
    assert ("penalty" in log) == (unsafe_every == 1)
    assert (log["nll"] > 0) == (unsafe_every is None)


def test_bfloat16_autocast_keeps_the_loss_close(model, tokenizer, tmp_path):
    full, _ = gradient_step(model, config(tmp_path), make_rows(8), tokenizer)
    half, gradient = gradient_step(model, config(tmp_path, bf16=True), make_rows(8), tokenizer)
    assert half["loss"] == pytest.approx(full["loss"], rel=2e-2)
    assert half["penalty"] == pytest.approx(full["penalty"], rel=2e-2)
    assert all(g.isfinite().all() for g in gradient.values())


def test_resumed_run_ends_where_the_straight_run_ends(tokenizer, tmp_path):
    def train(output, resume=None, max_steps=6):
        torch.manual_seed(0)
        model = get_peft_model(build_model(tokenizer), LoraConfig(**LORA, lora_dropout=0.1))
        args = config(
            tmp_path,
            output_dir=str(tmp_path / output),
            max_steps=max_steps,
            optim="adamw_torch",
            lr_scheduler_type="linear",
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=3,
        )
        trainer = TASFTTrainer(model, args, train_dataset=make_rows(24), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = train("straight")
    resumed = train("resumed", resume=str(tmp_path / "straight" / "checkpoint-3"))
    for (name, a), (_, b) in zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    # TRL counts num_tokens from the start of the process; everything else of steps 4-6 is the straight run's.
    logs = [
        [{k: v for k, v in log.items() if k != "num_tokens"} for log in t.state.log_history if "nll" in log]
        for t in (straight, resumed)
    ]
    assert len(logs[0]) == 6 and logs[0] == logs[1]


def test_labels_stay_with_their_rows_through_tokenisation_truncation_and_shuffling(tokenizer, tmp_path):
    rows = make_rows(40)
    args = config(tmp_path, max_length=12, shuffle_dataset=True, seed=3)
    trainer = TASFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
    label_of = {
        tuple(tokenizer(row["prompt"] + row["completion"] + "<eos>")["input_ids"][:12]): row["label"] for row in rows
    }
    assert len(label_of) == len(rows)
    seen = {}
    for batch in trainer.get_train_dataloader():
        for ids, mask, unsafe in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["unsafe"], strict=True):
            (is_unsafe,) = set(unsafe[mask].tolist())
            seen[tuple(ids[mask].tolist())] = not is_unsafe
    assert seen == {ids: label_of[ids] for ids in seen} and len(seen) >= len(rows) - 1
    assert set(seen.values()) == {True, False}


def test_rows_of_one_length_together_are_all_there_with_their_labels_and_less_padding(tokenizer, tmp_path):
    rows = make_rows(48)

    def batches(order):
        args = config(tmp_path, train_sampling_strategy=order, per_device_train_batch_size=4)
        trainer = TASFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
        return list(trainer.get_train_dataloader())

    grouped, random = batches("group_by_length"), batches("random")

    def seen(batches):
        return sorted(
            (ids[mask.bool()].tolist(), bool(unsafe[mask.bool()].all()))
            for batch in batches
            for ids, mask, unsafe in zip(batch["input_ids"], batch["attention_mask"], batch["unsafe"], strict=True)
        )

    assert seen(grouped) == seen(random) and len(seen(grouped)) == 48
    padding = [sum(int((batch["attention_mask"] == 0).sum()) for batch in order) for order in (grouped, random)]
    assert padding[0] < padding[1] / 2


def test_rows_whose_completion_is_truncated_away_are_counted_in_a_warning(model, tokenizer, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("tasft_lib.trainer.logger.warning", warnings.append)
    rows = [dict(row) for row in make_rows(8)]
    rows[0]["prompt"] = rows[1]["prompt"] = "w1 " * 20  # an unsafe and a benign one
    args = config(tmp_path, max_length=15)
    trainer = TASFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert len(trainer.train_dataset) == 6
    assert [w for w in warnings if w.startswith("2 rows, 1 of them unsafe,") and "max_length=15" in w]


def test_evaluation_reports_both_parts_and_takes_unlabelled_rows_as_benign(model, tokenizer, tmp_path):
    rows = make_rows(8)
    args = config(tmp_path, per_device_eval_batch_size=8)
    trainer = TASFTTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset={"mixed": rows, "plain": make_rows(8, unsafe_every=None).remove_columns("label")},
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    expected = reference_loss(model, tokenizer, rows, penalty="emd", weight=2.0)
    assert metrics["eval_mixed_loss"] == pytest.approx(expected.item(), rel=1e-5)
    logged = {k: v for log in trainer.state.log_history for k, v in log.items()}
    assert logged["eval_unsafe_rows"] in (0, 3) and "eval_penalty" in logged
    assert "eval_plain_loss" in metrics


def test_conversational_rows(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1' if m['role'] == 'user' else 'w2' }} {{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
    )
    rows = make_rows(8)
    conversational = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"].strip()}],
                "completion": [{"role": "assistant", "content": row["completion"].strip()}],
                "label": row["label"],
            }
            for row in rows
        ]
    )
    model = build_model(tokenizer)
    log, _ = gradient_step(model, config(tmp_path, train_sampling_strategy="sequential"), conversational, tokenizer)
    plain = [row | {"prompt": f"w1 {row['prompt']} w2 "} for row in rows]
    assert log["loss"] == pytest.approx(
        reference_loss(model, tokenizer, plain, penalty="emd", weight=2.0).item(), rel=1e-5
    )


@pytest.mark.parametrize("reduction, size, accumulation", [("batch", 8, 1), ("unsafe", 4, 2), ("micro_batch", 4, 2)])
def test_auto_weight_keeps_the_expected_pressure_constant(reduction, size, accumulation, model, tokenizer, tmp_path):
    """λ times the expected divisor-weighted share of unsafe samples is `penalty_pressure`, by simulation."""
    rows = make_rows(30, unsafe_every=10)
    args = config(
        tmp_path,
        penalty_weight="auto",
        penalty_pressure=0.3,
        penalty_reduction=reduction,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
    trainer = TASFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    generator = torch.Generator().manual_seed(0)
    unsafe = torch.rand(200_000, size * accumulation, generator=generator) < 0.1
    share = {
        "batch": unsafe.float().mean(),
        "unsafe": unsafe.any(-1).float().mean(),
        "micro_batch": unsafe.view(-1, accumulation, size).any(-1).float().mean(),
    }[reduction]
    assert trainer.penalty_weight * share.item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize(
    "architecture, overrides",
    [
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 4.0}),
        ("qwen2", {}),
    ],
)
def test_logit_scaling_and_soft_capping_are_the_models_own(architecture, overrides, tokenizer, tmp_path):
    settings = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, initializer_range=0.3, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings, **overrides)).float()
    rows = make_rows(4, unsafe_every=1)
    model.eval()
    args = config(tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=4)
    trainer = TASFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_eval_dataloader()))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    mask = (targets != -100) & (targets != tokenizer.eos_token_id)
    unit = F.normalize(model.get_output_embeddings().weight.detach())
    values = losses.emd(logits, targets.clamp(min=0), unit)
    expected = (values * mask).sum(-1) / mask.sum(-1)
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_penalty"] == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"penalty": "edm"}, "penalty='edm'"),
        ({"penalty_reduction": "mean"}, "penalty_reduction='mean'"),
        ({"penalty_embedding": "wte"}, "penalty_embedding='wte'"),
        ({"penalty_first_tokens": 0}, "penalty_first_tokens=0"),
        ({"penalty_embedding": "isotropic", "penalty_components": 0}, "penalty_components=0"),
        ({"penalty_weight": -1}, "penalty_weight=-1"),
        ({"penalty_floor": -0.1}, "penalty_floor=-0.1"),
        ({"penalty_floor": 5}, "penalty_floor=5.0"),
        ({"penalty_floor": 0.05, "penalty": "imitation"}, "leave it out with 'imitation'"),
        ({"penalty_weight": "lots"}, "penalty_weight='lots'"),
        ({"penalty_weight": float("nan")}, "penalty_weight=nan"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped'"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "packing_strategy='bfd_split'"),
        ({"eval_packing": True}, "eval_packing=True"),
        ({"loss_head": "liger"}, "loss_head='liger'"),
        ({"penalty": "simnpo", "penalty_weight": "auto"}, "no pressure for 'simnpo'"),
        ({"penalty": "npo", "penalty_beta": 0}, "penalty_beta=0"),
        ({"penalty": "emd", "penalty_beta": 0.3}, "penalty_beta is for npo, simnpo; leave it out with 'emd'"),
        ({"penalty": "nlcl", "penalty_embedding": "random"}, "for emd, emd_exact, recover; leave it out with 'nlcl'"),
        ({"penalty": "emd", "branch_depth": 4}, "branch_depth is for recover; leave it out with 'emd'"),
        ({"penalty": "recover", "branch_margin": 3}, "branch_margin=3 is more than 2"),
        ({"penalty_components": 2}, "penalty_components is for penalty_embedding='isotropic'"),
        ({"penalty_weight": 2, "penalty_pressure": 1}, "penalty_pressure is for penalty_weight='auto'"),
        ({"loss_type": "dft"}, "'dft'"),
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
        ({"completion_only_loss": False}, "completion_only_loss=False"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        config(tmp_path, **overrides)
    assert "\n" not in str(error.value)


def test_numbers_may_come_as_text_as_yaml_gives_2e_4():
    given = {"penalty": "npo", "penalty_weight": "2e-4", "penalty_beta": "1e-1"}
    read = TASFTConfig(**given, bf16=False, use_cpu=True)
    assert (read.penalty_weight, read.penalty_beta) == (2e-4, 0.1)


def test_what_was_filled_in_for_one_penalty_does_not_bind_another():
    npo = TASFTConfig(penalty="npo", penalty_weight=1, bf16=False, use_cpu=True)
    isotropic = TASFTConfig(penalty_embedding="isotropic", bf16=False, use_cpu=True)
    assert replace(npo, penalty="emd").penalty_beta is None
    assert replace(isotropic, penalty_embedding="lm_head").penalty_components is None


def test_a_pull_is_learned_to_the_end_of_its_answer():
    pulls = {name: TASFTConfig(penalty=name, penalty_weight=1, bf16=False, use_cpu=True) for name in losses.PENALTIES}
    assert {name for name, read in pulls.items() if read.penalize_eos} == {"imitation", "recover"}


def test_the_options_of_a_penalty_are_those_that_it_reads():
    def read(**given):
        return TASFTConfig(**given, bf16=False, use_cpu=True).penalty_options

    recover = read(penalty="recover", branch_margin=0)
    assert recover["branch_margin"] == 0 and read(penalty_pressure=2)["penalty_pressure"] == 2
    assert {"penalty_embedding", "penalty_components", "penalty_floor"} <= set(read())
    assert {*recover} - {*read()} == {"branch_depth", "branch_margin"} and {*read()} - {*recover} == {"penalty_floor"}
    assert read(penalty="npo", penalty_weight=1)["penalty_beta"] == 0.1 and "loss_head" not in read()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows.remove_columns("label"), "no 'label' column"),
        (lambda rows: rows.remove_columns("completion"), "'completion'"),
        (
            lambda rows: Dataset.from_list([row | {"label": str(row["label"])} for row in rows]),
            "row 1: label is of type str",
        ),
        (lambda rows: rows.map(lambda row, i: {"label": None if i == 4 else row["label"]}, with_indices=True), "row 5"),
    ],
)
def test_data_without_usable_labels_is_refused(change, message, model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        TASFTTrainer(model, config(tmp_path), train_dataset=change(make_rows(8)), processing_class=tokenizer)


def as_streamed(rows):
    return rows.to_iterable_dataset()


def as_generator_of(boolean):
    """Streamed rows whose labels are `boolean`s of another library, as generators give them."""

    def change(rows):
        def generate():
            yield from ({**row, "label": boolean(row["label"])} for row in rows)

        return IterableDataset.from_generator(generate)

    return change


def tokenised(rows, tokenizer):
    def encode(row):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}

    return rows.map(encode, remove_columns=["prompt", "completion"])


def prepared(rows, tokenizer):
    def labels(row):
        pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
        return {"labels": [token if scored else -100 for token, scored in pairs]}

    return tokenised(rows, tokenizer).map(labels, remove_columns=["completion_mask"])


READINGS = {
    "torch": lambda rows, _: rows.with_format("torch"),
    "numpy": lambda rows, _: rows.with_format("numpy"),
    "arrow": lambda rows, _: rows.with_format("arrow"),
    "pandas": lambda rows, _: rows.with_format("pandas"),
    "streamed": lambda rows, _: as_streamed(rows),
    "streamed torch": lambda rows, _: as_streamed(rows).with_format("torch"),
    "streamed numpy booleans": lambda rows, _: as_generator_of(np.bool_)(rows),
    "streamed torch booleans": lambda rows, _: as_generator_of(torch.tensor)(rows),
    "tokenised": tokenised,
    "tokenised torch": lambda rows, tokenizer: tokenised(rows, tokenizer).with_format("torch"),
    "tokenised streamed": lambda rows, tokenizer: as_streamed(tokenised(rows, tokenizer)),
    "a column of its own named unsafe": lambda rows, _: rows.add_column("unsafe", ["no"] * len(rows)),
    "columns named as ours": lambda rows, _: rows.map(
        lambda row: {"_tasft_row": "x", "rows": 1, "place": "Paris", "unsafe": [True], "sample": 3}
    ),
    "streamed columns named as ours": lambda rows, _: as_streamed(
        rows.map(lambda row: {"_tasft_row": "x", "rows": 1, "unsafe": [True]})
    ),
}
LAYOUTS = {"padded": {}, "packed": dict(packing=True, max_length=64)}


PACKED = ("torch", "streamed torch booleans", "tokenised", "columns named as ours")


@pytest.mark.parametrize("reading, layout", [*zip(READINGS, repeat("padded")), *zip(PACKED, repeat("packed"))])
def test_a_label_is_the_same_however_rows_are_read(reading, layout, model, tokenizer, tmp_path):
    args = config(tmp_path, train_sampling_strategy="sequential", **LAYOUTS[layout])
    expected, _ = gradient_step(model, args, make_rows(8), tokenizer)
    log, _ = gradient_step(model, args, READINGS[reading](make_rows(8), tokenizer), tokenizer)
    assert log["unsafe_rows"] == 3
    for name in ("loss", "nll", "penalty"):
        assert log[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("read", [lambda rows: rows, as_streamed])
def test_a_text_that_begins_with_the_bos_that_is_added_is_trained_on_with_one(read, model, tokenizer, tmp_path):
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bos = inner.token_to_id("w0")
    inner.post_processor = processors.TemplateProcessing("w0 $A", special_tokens=[("w0", bos)])
    adds_bos = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="w0", eos_token="<eos>", pad_token="<pad>")
    rows = Dataset.from_list([{"prompt": p, "completion": " w3", "label": True} for p in ("w0 w1", "w1", "w1 w0")])
    for given, added in ((adds_bos, [bos]), (tokenizer, [])):
        trainer = TASFTTrainer(model, config(tmp_path), train_dataset=read(rows), processing_class=given)
        ids = [row["input_ids"] for row in trainer.train_dataset]
        first, _, last = (tokenizer(text)["input_ids"] for text in ("w0 w1 w3 <eos>", "w1 w3 <eos>", "w1 w0 w3 <eos>"))
        assert ids[0] == first and ids[2] == added + last
        assert ids[1] == (ids[0] if added else ids[0][1:])


@pytest.mark.parametrize("form", [None, "torch"])
def test_a_label_is_read_where_preparation_is_skipped(form, model, tokenizer, tmp_path):
    args = config(tmp_path, train_sampling_strategy="sequential")
    expected, _ = gradient_step(model, args, make_rows(8), tokenizer)
    args = config(tmp_path, train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True})
    rows = prepared(make_rows(8), tokenizer).add_column("unsafe", ["no"] * 8).with_format(form)
    log, _ = gradient_step(model, args, rows, tokenizer)
    assert log["loss"] == pytest.approx(expected["loss"], rel=1e-5) and log["unsafe_rows"] == 3


@pytest.mark.parametrize(
    "way, value",
    [
        *zip(repeat("streamed"), ("false", "true", 0, 1, 0.0, None, [True], [True, False], b"false", np.int64(0))),
        *(("packed", "false"), ("packed", 1), ("tokenised", "false"), ("skipped", "false"), ("skipped", [False])),
    ],
)
def test_a_label_that_is_no_boolean_never_trains(way, value, model, tokenizer, tmp_path):
    rows = as_generator_of(lambda label: label if label else value)(make_rows(8))
    layout = LAYOUTS["packed"] if way == "packed" else {}
    if way in ("tokenised", "skipped"):
        source = {"tokenised": tokenised, "skipped": prepared}[way](make_rows(8), tokenizer)
        rows = as_generator_of(lambda label: label if label else value)(source)
    if way == "skipped":
        layout = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"row( 1)?: label is of type \w+; use true") as error:
        TASFTTrainer(model, config(tmp_path, **layout), train_dataset=rows, processing_class=tokenizer).train()
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


NEWLINE = "w50"  # a token as any other
CHATML = (
    "{% for m in messages %}<start> {{ 'w51' if m['role'] == 'user' else 'w52' }} w50 {{ m['content'] }} <end> w50 "
    "{% endfor %}{% if add_generation_prompt %}<start> w52 w50 {% endif %}"
)


def with_template(tokenizer, template):
    """The tokenizer with a chat template and its special tokens, none of which is EOS."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns, label=False):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return {"prompt": messages[:1], "completion": messages[1:], "label": label}


def penalised(template, tokenizer, tmp_path, *turns, **options):
    """The words of the one unsafe conversation that the penalty sees, by the log-probabilities asked for."""
    tokenizer = with_template(tokenizer, template)
    rows = Dataset.from_list([conversation(*turns), conversation("w1", "w2", label=True)])
    args = config(tmp_path, per_device_train_batch_size=2, **options)
    trainer = TASFTTrainer(build_model(tokenizer), args, train_dataset=rows, processing_class=tokenizer)
    seen, forward = [], trainer.model.forward

    def record(*inputs, **kwargs):
        if "unsafe_sample" in kwargs:
            seen.extend(kwargs["labels"][(kwargs["unsafe_sample"] >= 0) & (kwargs["labels"] != -100)].tolist())
        return forward(*inputs, **kwargs)

    trainer.model.forward = record
    trainer.train()
    return tokenizer.decode(seen).split()


def test_the_end_of_a_turn_is_not_penalised_whatever_token_ends_it(tokenizer, tmp_path):
    assert penalised(CHATML, tokenizer, tmp_path, "w1", "w5 w6") == ["w5", "w6"]
    both = ["w5", "w6", "<end>", NEWLINE]
    assert penalised(CHATML, tokenizer, tmp_path, "w1", "w5 w6", penalize_eos=True) == both
    # A newline of the answer itself is none of the end's, and turns in the middle end too.
    assert penalised(CHATML, tokenizer, tmp_path, "w1", "w5 w50 w6") == ["w5", NEWLINE, "w6"]
    several = ["w5", "<start>", "w51", NEWLINE, "w7", "<start>", "w52", NEWLINE, "w8"]
    assert penalised(CHATML, tokenizer, tmp_path, "w1", "w5", "w7", "w8") == several
    packed = penalised(CHATML, tokenizer, tmp_path, "w1", "w5 w6", packing=True, max_length=64)
    assert packed == ["w5", "w6"]


def test_the_end_of_a_turn_may_be_ordinary_words_or_eos(tokenizer, tmp_path):
    words = CHATML.replace("<end> w50 ", "w50 w50 w53 ")
    assert penalised(words, tokenizer, tmp_path, "w1", "w5 w50 w6") == ["w5", NEWLINE, "w6"]
    with_eos = CHATML + "{% if not add_generation_prompt %}<eos>{% endif %}"  # as Phi-3 ends a conversation
    assert penalised(with_eos, tokenizer, tmp_path, "w1", "w5 w6") == ["w5", "w6"]


def test_a_template_that_takes_no_such_turns_ends_them_by_eos_alone(model, tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('give a system prompt') }}"
    log, _ = gradient_step(model, config(tmp_path), make_rows(8), tokenizer)
    assert log["penalty"] < 0


def test_trls_order_of_arguments_and_its_configs_are_taken(model, tokenizer, tmp_path):
    rows = make_rows(8)
    log, _ = gradient_step(model, config(tmp_path, penalty_weight="auto"), rows, tokenizer)
    for cls in (SFTConfig, TrainingArguments):
        settings = {"output_dir": str(tmp_path / "out"), "hub_token": "secret"}
        args = cls(**(one_step(tmp_path) | settings))
        trainer = TASFTTrainer(copy.deepcopy(model), args, None, rows, None, tokenizer, None, None, [])
        trainer.train()
        assert isinstance(trainer.args, TASFTConfig) and trainer.args.hub_token == "secret"
        assert trainer.state.log_history[0]["loss"] == pytest.approx(log["loss"], rel=1e-6)
    assert inspect.signature(TASFTTrainer) == inspect.signature(SFTTrainer)
    with pytest.raises(ValueError, match="does not support data_collator"):
        TASFTTrainer(model, args, trainer.data_collator, rows)


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_that_is_not_finite_stops_with_the_rows(packing, model, tokenizer, tmp_path):
    rows = make_rows(8).map(
        lambda row, i: {"completion": "w1 unknown" if i == 5 else row["completion"]}, with_indices=True
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.unk_token_id] = float("nan")
    layout = dict(packing=True, max_length=64) if packing else {}
    args = config(
        tmp_path, train_sampling_strategy="sequential", per_device_train_batch_size=1, gradient_accumulation_steps=2,
        max_steps=5, num_train_epochs=3, **layout,
    )  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match="loss or gradient is not finite, with row") as error:
        trainer = TASFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    assert "row 6" in str(error.value) and "\n" not in str(error.value)
    assert model.lm_head.weight.isfinite().all() and (packing or not torch.equal(before, model.lm_head.weight))
    if not packing:
        assert str(error.value).startswith("step 3: ") and "with row 5, row 6;" in str(error.value)


def test_a_gradient_that_is_not_finite_stops_before_it_is_taken(model, tokenizer, tmp_path):
    args = config(tmp_path, train_sampling_strategy="sequential", per_device_train_batch_size=2)
    trainer = TASFTTrainer(model, args, train_dataset=make_rows(8), processing_class=tokenizer)
    trainer.row_names = [f"rows.jsonl: row {10 + i}" for i in range(8)]
    model.lm_head.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(ValueError, match=r"step 1: .* with rows\.jsonl: row 10, rows\.jsonl: row 11; lower"):
        trainer.train()
    assert all(p.isfinite().all() for p in model.parameters())


def test_model_card_cites_the_paper(model, tokenizer, tmp_path):
    trainer = TASFTTrainer(model, config(tmp_path), train_dataset=make_rows(8), processing_class=tokenizer)
    trainer.create_model_card(model_name="safer")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2412.06843" in card and "ta-sft" in card


def test_four_bit_qlora_trains_the_adapter_close_to_the_unquantised_run(tokenizer, tmp_path, bitsandbytes):
    build_model(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    losses_of = {}
    for name, kwargs in (("full", {}), ("4bit", {"quantization_config": quantization})):
        args = config(tmp_path, max_steps=3, optim="adamw_torch", learning_rate=1e-2)
        trainer = TASFTTrainer(
            str(tmp_path / "base"),
            args,
            train_dataset=make_rows(24),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
            **kwargs,
        )
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        moved = [n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(before[n], p)]
        assert len(moved) == len(before) and all("lora_" in n for n in moved)
        losses_of[name] = [log["loss"] for log in trainer.state.log_history if "nll" in log]
    assert losses_of["4bit"] == pytest.approx(losses_of["full"], rel=0.1)


def test_a_quantised_head_is_refused(model, tokenizer, tmp_path):
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(65, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="leave lm_head out of the quantisation"):
        TASFTTrainer(model, config(tmp_path), train_dataset=make_rows(8), processing_class=tokenizer)


def mixture_of_experts(tokenizer):
    settings = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5,
        initializer_range=0.3, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **settings)).float()


@plain_sft
@pytest.mark.parametrize("padding_free", [False, True])
def test_mixture_of_experts_keeps_trls_load_balancing_loss(padding_free, tokenizer, tmp_path):
    model = mixture_of_experts(tokenizer)
    rows, options = make_rows(8, unsafe_every=None), dict(padding_free=padding_free, max_length=None)
    ours, our_gradient = gradient_step(model, config(tmp_path, **options), rows, tokenizer)
    theirs, their_gradient = gradient_step(
        model, config(tmp_path, cls=SFTConfig, **options), rows.remove_columns("label"), tokenizer, SFTTrainer
    )
    assert ours["aux_loss"] > 0
    for name in ("loss", "aux_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert_same_gradient(our_gradient, their_gradient)


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], task_type="CAUSAL_LM"),
        LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ],
    ids=["embedding", "modules_to_save", "dora", "prompt_tuning"],
)
@pytest.mark.parametrize("penalty", ["emd", "nlcl"])
def test_any_peft_config_gives_the_dense_loss_and_trains(penalty, peft_config, model, tokenizer, tmp_path):
    rows = make_rows(8)
    args = config(tmp_path, penalty=penalty, per_device_eval_batch_size=8, max_steps=2, optim="adamw_torch")
    trainer = TASFTTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )
    loss = trainer.evaluate()["eval_loss"]
    if not isinstance(peft_config, PromptTuningConfig):  # the others start as the base model
        base = build_model(tokenizer)
        assert loss == pytest.approx(
            reference_loss(base, tokenizer, rows, penalty=penalty, weight=2.0).item(), rel=1e-5
        )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert before and not any(torch.equal(before[n], after[n]) for n in before)


def test_torch_compile_gives_the_same_step(model, tokenizer, tmp_path):
    plain = gradient_step(model, config(tmp_path), make_rows(8), tokenizer)
    args = config(tmp_path, torch_compile=True, torch_compile_backend="eager")
    compiled = gradient_step(model, args, make_rows(8), tokenizer)
    assert compiled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert_same_gradient({n.replace("_orig_mod.", ""): g for n, g in compiled[1].items()}, plain[1])


@pytest.fixture
def untested_trl(monkeypatch):
    """A later version of TRL, and the warnings about it."""
    warnings = []
    monkeypatch.setattr(trainer_module.trl, "__version__", "1.99.0")
    monkeypatch.setattr(trainer_module.logger, "warning_once", warnings.append)
    return warnings


@pytest.fixture
def compared(monkeypatch):
    """The labels of each micro-batch that was compared with the dense reference."""
    compare, batches = TASFTTrainer._compare_with_dense_head, []
    monkeypatch.setattr(
        TASFTTrainer, "_compare_with_dense_head", lambda *args: batches.append(args[1]["labels"]) or compare(*args)
    )
    return batches


@pytest.mark.parametrize("loss_head", ["fused", "dense"])
@pytest.mark.parametrize("penalty", ["emd", "nlcl", "npo"])
@pytest.mark.parametrize(
    "layout",
    [{}, {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}],
    ids=["padded", "packed"],
)
def test_an_untested_trl_whose_loss_is_right_trains_as_a_tested_one(
    layout, penalty, loss_head, tokenizer, tmp_path, request
):
    torch.manual_seed(0)
    model = get_peft_model(build_model(tokenizer), LoraConfig(**LORA, init_lora_weights=False, lora_dropout=0.1))
    args = config(tmp_path, penalty=penalty, loss_head=loss_head, max_steps=2, **layout)
    expected = gradient_step(model, args, make_rows(8), tokenizer)
    warnings = request.getfixturevalue("untested_trl")
    log, gradient = gradient_step(model, args, make_rows(8), tokenizer)
    assert warnings == ["TASFTTrainer is tested on TRL 1.15 and 1.16, not on 1.99.0."]
    assert log["loss"] == expected[0]["loss"]
    assert all(torch.equal(gradient[name], expected[1][name]) for name in gradient)


def test_the_first_micro_batches_of_an_untested_trl_are_compared_until_one_held_unsafe_rows(
    untested_trl, compared, model, tokenizer, tmp_path
):
    rows = make_rows(8, unsafe_every=None).map(lambda row, i: {"label": i not in (2, 5)}, with_indices=True)
    args = config(
        tmp_path, per_device_train_batch_size=1, train_sampling_strategy="sequential", gradient_accumulation_steps=8
    )
    gradient_step(model, args, rows, tokenizer)
    assert len(compared) == 3


def _scaled_loss(monkeypatch):
    compute_loss = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *args, **kwargs: 1.01 * compute_loss(*args, **kwargs))


def _shifted_labels(monkeypatch):
    collator = trainer_module.labels.UnsafeLabelCollator
    torch_call = collator.torch_call

    def shift(self, examples):
        batch = torch_call(self, examples)
        return batch | {"labels": batch["labels"].roll(-1, 1)}

    monkeypatch.setattr(collator, "torch_call", shift)


def _another_head(monkeypatch):
    from tasft_lib import forward

    def head(*args, **kwargs):
        output = losses.dense_head(*args, **{k: v for k, v in kwargs.items() if k not in ("inverse_norms", "gather")})
        return output._replace(penalty=1.01 * output.penalty)

    monkeypatch.setattr(forward, "fused_head", head)


@pytest.mark.parametrize("change", [_scaled_loss, _shifted_labels, _another_head])
def test_an_untested_trl_that_changes_the_loss_is_refused_in_one_line(
    change, untested_trl, model, tokenizer, tmp_path, monkeypatch
):
    change(monkeypatch)
    with pytest.raises(ValueError, match=r"TRL 1\.99\.0 changes the loss: .*; install trl>=1\.15,<1\.17") as error:
        gradient_step(model, config(tmp_path), make_rows(8), tokenizer)
    assert "\n" not in str(error.value)


def test_an_untested_trl_keeps_the_load_balancing_loss(untested_trl, tokenizer, tmp_path):
    model = mixture_of_experts(tokenizer)
    args = config(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    log, _ = gradient_step(model, args, make_rows(8), tokenizer)
    assert log["aux_loss"] > 0


def test_an_untested_trl_under_bfloat16_is_within_a_thousandth(untested_trl, compared, model, tokenizer, tmp_path):
    gradient_step(model, config(tmp_path, bf16=True), make_rows(8), tokenizer)
    assert compared, "and no further off, or it would have been refused"
