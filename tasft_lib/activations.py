"""What one forward pass says of training rows: activations of chosen layers, and the loss of the completion."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .losses import token_log_probs

POOLINGS = ("last", "mean")
WINDOW = 64  # batches that are sorted by length and written together


def n_layers(model: PreTrainedModel) -> int:
    """How many decoder layers the model has."""
    return len(_decoder_layers(model))


def activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    layers: list[int],
    poolings: tuple[str, ...] = ("last",),
    max_length: int | None = None,
    batch_size: int = 16,
    file: Path | None = None,
    progress: bool = True,
) -> np.ndarray:
    """`[rows, layers · poolings, d]`, float32: the residual stream after each decoder layer, pooled over the tokens.

    One pass for all layers, without the output head; rows are batched by length and padded on the right, where causal
    attention never looks, so a row's activation does not depend on its batch (up to rounding).

    Args:
        rows: `prompt` and `completion`, text or messages (then in the tokenizer's chat template); read together, as in
            training, without the end token.
        layers: 1 to `n_layers(model)`; the first setting is (layers[0], poolings[0]), the second (layers[0],
            poolings[1]).
        poolings: "last" (the paper's reading: the last token) and "mean" (over the completion's tokens).
        max_length: tokens read of a row, from its start; by default the model's context.
        file: file the result is appended to, so that a run that was cut off goes on from there and a complete one is
            read back; the result is then a view of the file. Name it after all that determines the content.
        progress: show a bar.

    Raises `ValueError` for layers that don't exist and for an unknown pooling.
    """
    model.eval()
    blocks = _decoder_layers(model)
    if wrong := [layer for layer in layers if not 1 <= layer <= len(blocks)]:
        raise ValueError(f"layer {wrong[0]}: the model has the layers 1 to {len(blocks)}.")
    if unknown := set(poolings) - set(POOLINGS):
        raise ValueError(f"pooling {unknown.pop()!r} is none of {', '.join(POOLINGS)}.")
    shape = (len(layers) * len(poolings), model.config.get_text_config().hidden_size)
    done = _rows_in(file, shape, len(rows))
    encoded = _encode(tokenizer, rows, max_length or _context(model))
    parts = []
    with (
        _hidden_states(blocks, layers) as states,
        tqdm(total=len(rows), initial=done, desc="activations", unit="row", disable=not progress) as bar,
        torch.inference_mode(),
    ):
        for first in range(done, len(rows), window := WINDOW * batch_size):
            part = np.empty((min(window, len(rows) - first), *shape), np.float32)
            # Longest first: what does not fit in memory fails at once.
            order = sorted(range(len(part)), key=lambda i: -len(encoded[first + i].ids))
            for start in range(0, len(part), batch_size):
                chosen = order[start : start + batch_size]
                batch = [encoded[first + i] for i in chosen]
                ids = pad_sequence([torch.tensor(row.ids) for row in batch], batch_first=True)
                ends = torch.tensor([len(row.ids) for row in batch])
                starts = torch.tensor([min(row.prompt_tokens, len(row.ids) - 1) for row in batch])
                mask = torch.arange(ids.size(1)) < ends[:, None]
                model.get_decoder()(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
                pooled = [_pool(states[layer], p, starts, ends) for layer in layers for p in poolings]
                part[chosen] = torch.stack([values.cpu() for values in pooled], 1).numpy()
                bar.update(len(chosen))
            parts.append(part)
            if file is not None:
                _append(file, parts.pop())
    if file is not None:
        return np.memmap(file, np.float32, "r", shape=(len(rows), *shape))
    return np.concatenate(parts) if parts else np.empty((0, *shape), np.float32)


@torch.inference_mode()
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

    `rows`, `max_length`: see `activations`. nan where the prompt alone fills `max_length`.
    """
    model.eval()
    end = [tokenizer.eos_token_id]
    encoded = [
        Encoded((row.ids + end)[: max_length or _context(model)], row.prompt_tokens)
        for row in _encode(tokenizer, rows, max_length or _context(model))
    ]
    values = []
    for start in tqdm(range(0, len(rows), batch_size), desc="loss", unit="batch", disable=not progress):
        batch = encoded[start : start + batch_size]
        padded = pad_sequence([torch.tensor(row.ids) for row in batch], batch_first=True)  # on the right: never seen
        logits = model(padded.to(model.device)).logits[:, :-1].float().cpu()
        log_probs = token_log_probs(logits, padded[:, 1:])
        for per_token, row in zip(log_probs, batch, strict=True):
            values.append(-per_token[row.prompt_tokens - 1 : len(row.ids) - 1].mean().item())
    return values


@dataclass(frozen=True)
class Encoded:
    """Tokens of a row, and how many of them are the prompt's."""

    ids: list[int]
    prompt_tokens: int


def _encode(tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_length: int) -> list[Encoded]:
    """Prompt and completion as training sees them."""
    prompts, completions = rows["prompt"][:], rows["completion"][:]
    if prompts and not isinstance(prompts[0], str):
        read = tokenizer.apply_chat_template
        whole = read([p + c for p, c in zip(prompts, completions, strict=True)], return_dict=True)["input_ids"]
        asked = read(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
        return [Encoded(ids[:max_length], len(prompt)) for ids, prompt in zip(whole, asked, strict=True)]
    asked = tokenizer(prompts)["input_ids"]
    answers = tokenizer(completions, add_special_tokens=False)["input_ids"]
    return [Encoded((p + a)[:max_length], len(p)) for p, a in zip(asked, answers, strict=True)]


def _pool(states: Tensor, pooling: str, starts: Tensor, ends: Tensor) -> Tensor:
    """`[B, d]` from `[B, T, d]`: the token before `ends`, or the mean from `starts` to there."""
    starts, ends = starts.to(states.device), ends.to(states.device)
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), ends - 1].float()
    position = torch.arange(states.size(1), device=states.device)
    inside = (position >= starts[:, None]) & (position < ends[:, None])
    return (states.float() * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)


def _context(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise ValueError(f"{type(model).__name__}: no list of {count} decoder layers found; SAFT reads their outputs.")
    return found[0]


@contextmanager
def _hidden_states(blocks: nn.ModuleList, layers: list[int]) -> Iterator[dict[int, Tensor]]:
    """A dict that each forward pass fills: layer -> what it put out, `[B, T, d]`."""
    states: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in set(layers)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _rows_in(file: Path | None, shape: tuple[int, int], wanted: int) -> int:
    """How many rows are in the file already; what a killed run left of a further one is cut off."""
    if file is None or not file.exists():
        return 0
    row_bytes = 4 * shape[0] * shape[1]
    done = min(file.stat().st_size // row_bytes, wanted)
    os.truncate(file, done * row_bytes)
    return done


def _append(file: Path, part: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        stream.write(part.tobytes())
