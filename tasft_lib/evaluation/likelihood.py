"""How likely a model finds completions after their prompts, token by token, from one forward pass."""

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation import evaluating
from ..losses import token_log_probs
from ..saft.activations import WINDOW, Encoded, batches, context_length, encode
from ..storage.files import progress_bar

LOGITS = 2**28  # of a batch at once, 1 GB in float32: of a small model they take more memory than all the rest


def completion_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_length: int | None = None,
    max_tokens: int | None = None,
    ending: list[int] | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Tensor]:
    """log p(y_t | x, y_<t) of the tokens of each completion y after its prompt x: `[tokens]` a row, nats, on the CPU.

    `rows`, `max_length` and how rows are batched: see `activations.activations`. Empty where the prompt alone fills
    `max_length`.

    Args:
        max_tokens: tokens of a completion that are read, from its start; by default all.
        ending: tokens that are left out where it ends in them; by default its end token is read.
    """
    values = [torch.empty(0)] * len(rows)
    window, vocabulary = WINDOW * batch_size, model.config.get_text_config().vocab_size
    with (
        progress_bar(total=len(rows), desc="loss", unit="row", progress=progress) as bar,
        evaluating(model),
        torch.inference_mode(),
    ):
        for first in range(0, len(rows), window):
            last = min(first + window, len(rows))
            whole = encode(tokenizer, rows, first, last, max_length or context_length(model), end=True)
            encoded = [_cut(row, ending or [], max_tokens) for row in whole]
            fitting = max(1, LOGITS // (vocabulary * max(len(row.ids) for row in encoded)))
            for chosen, ids, mask in batches(encoded, min(batch_size, fitting), model.device):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                for i, row_ids, row_logits in zip(chosen, ids, logits, strict=True):
                    begin, stop = encoded[i].prompt_tokens, len(encoded[i].ids)
                    scored = slice(max(begin, 1) - 1, stop - 1)
                    log_probs = token_log_probs(row_logits[scored], row_ids[1:].to(row_logits.device)[scored])
                    values[first + i] = log_probs.cpu()
                bar.update(len(chosen))
    return values


def completion_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> list[float]:
    """Mean negative log-likelihood of each completion and its end token, in nats per token.

    `rows`, `max_length`: see `activations.activations`. nan where the prompt alone fills `max_length`.
    """
    options = {"max_length": max_length, "batch_size": batch_size, "progress": progress}
    return [-log_probs.mean().item() for log_probs in completion_log_probs(model, tokenizer, rows, **options)]


def _cut(row: Encoded, ending: list[int], max_tokens: int | None) -> Encoded:
    """The row without `ending` at its end, and without what follows the first `max_tokens` of its completion."""
    ids, begin = row.ids, row.prompt_tokens
    if ending and ids[begin:][-len(ending) :] == ending:
        ids = ids[: -len(ending)]
    return Encoded(ids[: None if max_tokens is None else begin + max_tokens], begin)
