"""Likelihoods of completions: the model's own, whatever the batch."""

import numpy as np
import pytest
import torch
from conftest import make_rows
from datasets import Dataset
from test_activations import CHAT, MODELS, llama

from tasft_lib.evaluation import likelihood
from tasft_lib.evaluation.likelihood import completion_loss


@pytest.mark.parametrize("at_once", [likelihood.LOGITS, 1])
@pytest.mark.parametrize("make", MODELS)
def test_losses_are_the_models_own(make, at_once, tokenizer, monkeypatch):
    """However few rows the logits of a batch leave room for."""
    monkeypatch.setattr(likelihood, "LOGITS", at_once)
    model, rows = make(tokenizer), make_rows(13)
    found = completion_loss(model, tokenizer, rows, batch_size=4)
    for row, value in zip(rows, found, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + "<eos>")["input_ids"]])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        with torch.no_grad():
            assert value == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-5)
    full = [i for i, row in enumerate(rows) if len(row["prompt"].split()) >= 4]
    cut = completion_loss(model, tokenizer, rows, max_length=4)
    assert full and np.flatnonzero(np.isnan(cut)).tolist() == full


def test_chat_rows_are_read_in_the_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    model = llama(tokenizer)
    chat = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "w5 w6"}], "completion": [{"role": "assistant", "content": "w7 w8"}]}]
    )
    # The text ends in the end token already, but for a space.
    text = Dataset.from_list([{"prompt": "w1 w5 w6 <eos> w2 ", "completion": "w7 w8 <eos>"}])
    np.testing.assert_allclose(completion_loss(model, tokenizer, chat), completion_loss(model, tokenizer, text))


@pytest.mark.parametrize("is_training", [True, False])
def test_a_model_is_left_in_the_mode_it_was_in(is_training, tokenizer):
    model = llama(tokenizer).train(is_training)
    completion_loss(model, tokenizer, make_rows(5))
    assert model.training is is_training
