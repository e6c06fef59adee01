"""What one forward pass says of training rows: activations of chosen layers."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation import evaluating
from ..records import forms, tokens
from ..storage.files import progress_bar
from ..storage.integrity import is_sealed, keep_if_whole, seal

POOLINGS = ("last", "mean")
WINDOW = 64  # batches that are tokenised, sorted by length and written together


def n_layers(model: PreTrainedModel) -> int:
    """How many decoder layers the model has."""
    return len(_decoder_layers(model))


def middle_layer(model: PreTrainedModel) -> int:
    """The layer that is read where nobody chooses one: 2 of 3, 16 of 32."""
    return (n_layers(model) + 1) // 2


def check_poolings(poolings: tuple[str, ...]) -> None:
    """Refuse a pooling that there is not."""
    if unknown := set(poolings) - set(POOLINGS):
        raise ValueError(f"pooling {unknown.pop()!r} is none of {', '.join(POOLINGS)}.")


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

    One pass for all layers, which ends at the deepest of them; no output head. Rows are batched by length and padded on
    the right, where causal attention never looks, so a row's activation does not depend on its batch (up to rounding).

    Args:
        rows: `prompt` and `completion`, text or messages (then in the tokenizer's chat template); read together, as TRL
            reads them for training, but text without the end token.
        layers: 1 to `n_layers(model)`; the first setting is (layers[0], poolings[0]), the second (layers[0],
            poolings[1]).
        poolings: "last" (the paper's reading: the last token) and "mean" (over the completion's tokens; the last one
            where none of them is left within `max_length`).
        max_length: tokens read of a row, from its start; by default the model's context.
        file: file the result is appended to, so that a run that was cut off goes on from there and a complete one is
            read back; the result is then a view of the file. Name it after all that determines the content, and let one
            process write at a time.
        progress: show a bar.

    Raises `ValueError` for layers that don't exist, an unknown pooling and a row without tokens.
    """
    blocks = _decoder_layers(model)
    if wrong := [layer for layer in layers if not 1 <= layer <= len(blocks)]:
        raise ValueError(f"layer {wrong[0]}: the model has the layers 1 to {len(blocks)}.")
    check_poolings(poolings)
    shape = (len(layers) * len(poolings), model.config.get_text_config().hidden_size)
    window = WINDOW * batch_size
    done = _rows_in(file, shape, len(rows), window)
    # With a file, only a window is in memory.
    result = np.empty((len(rows) if file is None else 0, *shape), np.float32)
    with (
        _pooled_states(blocks, layers, poolings) as run,
        progress_bar(total=len(rows), initial=done, desc="activations", unit="row", progress=progress) as bar,
        evaluating(model),
        torch.inference_mode(),
    ):
        for first in range(done, len(rows), window):
            last = min(first + window, len(rows))
            encoded = encode(tokenizer, rows, first, last, max_length or context_length(model))
            part = np.empty((last - first, *shape), np.float32) if file is not None else result[first:last]
            for chosen, ids, mask in batches(encoded, batch_size, model.device):
                starts = torch.tensor([min(encoded[i].prompt_tokens, len(encoded[i].ids) - 1) for i in chosen])
                states = run(model, ids, mask, starts.to(model.device)).numpy()
                if not np.isfinite(states).all():
                    row = next(i for i, state in zip(chosen, states, strict=True) if not np.isfinite(state).all())
                    what = "its activation is not finite; load the model in float32 or bfloat16, or remove the row."
                    raise ValueError(f"{forms.places(rows)[first + row]}: {what}")
                part[chosen] = states
                bar.update(len(chosen))
            if file is not None:
                _append(file, part)
    if file is not None and len(rows):
        if not is_sealed(file) or done < len(rows):
            seal(file)
        return np.memmap(file, np.float32, "r", shape=(len(rows), *shape))
    return result


def token_lengths(tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> np.ndarray:
    """`[n]`: tokens of prompt and completion, as `activations` reads them, uncut."""
    parts = [np.empty(0, int)]
    for first in range(0, len(rows), 1024):
        encoded = encode(tokenizer, rows, first, min(first + 1024, len(rows)), None)
        parts.append(np.array([len(row.ids) for row in encoded]))
    return np.concatenate(parts)


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens the model can read; None where it has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Encoded:
    """Tokens of a row, and how many of them are the prompt's."""

    ids: list[int]
    prompt_tokens: int


def encode(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, first: int, last: int, max_length: int | None, end: bool = False
) -> list[Encoded]:
    """Rows `first` to `last`, prompt and completion in one, as TRL's SFTTrainer tokenises them (`end`: with EOS).

    The completion begins where prompt and row part, which is before the prompt's end where a token spans both.
    """
    chosen = rows.select(range(first, last))
    if not forms.is_chat(rows):
        prompts, completions = chosen["prompt"][:], chosen["completion"][:]
        closing = tokenizer.eos_token if end and tokenizer.eos_token else ""
        closed = [c if c.endswith(closing) else c + closing for c in completions]
        asked = tokenizer(prompts)["input_ids"]
        whole = tokenizer([p + c for p, c in zip(prompts, closed, strict=True)])["input_ids"]
    else:
        pairs = zip(chosen, forms.places(chosen, first=first + 1), strict=True)
        asked, whole = zip(*(tokens.chat_ids(row, tokenizer, place) for row, place in pairs), strict=True)
    if empty := [i for i, ids in enumerate(whole) if not ids]:
        place = forms.places(chosen, first=first + 1)[empty[0]]
        raise ValueError(f"{place}: the tokenizer makes no token of its text; remove the row.")
    return [Encoded(ids[:max_length], _common(prompt, ids)) for prompt, ids in zip(asked, whole, strict=True)]


def _common(prompt: list[int], whole: list[int]) -> int:
    if whole[: len(prompt)] == prompt:
        return len(prompt)
    return next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))


def batches(
    encoded: list[Encoded], batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Places of the rows, ids and mask `[B, T]`, longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = pad_sequence([torch.tensor(encoded[i].ids) for i in chosen], batch_first=True)
        ends = torch.tensor([len(encoded[i].ids) for i in chosen])
        mask = torch.arange(ids.size(1)) < ends[:, None]
        yield chosen, ids.to(device), mask.to(device)


def _pool(states: Tensor, pooling: str, starts: Tensor, mask: Tensor) -> Tensor:
    """`[B, d]` in float32 from `[B, T, d]`: the last token of the mask, or the mean from `starts` to there."""
    starts, mask = starts.to(states.device), mask.to(states.device)
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1].float()
    inside = mask & (torch.arange(states.size(1), device=states.device) >= starts[:, None])
    return (states.float() * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    found = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise ValueError(f"{type(model).__name__}: no list of {count} decoder layers found; SAFT reads their outputs.")
    return found[0]


class _DeepestReached(Exception):
    """Ends a forward pass whose further layers nobody asked for."""


@contextmanager
def _pooled_states(blocks: nn.ModuleList, layers: list[int], poolings: tuple[str, ...]) -> Iterator[Callable]:
    """A function `(model, ids, mask, starts)` that gives `[B, layers · poolings, d]` on the CPU, of one forward pass.

    Layers are pooled as soon as they are known: the states of all of them would be the largest thing in memory.
    """
    pooled: dict[int, list[Tensor]] = {}
    batch: dict[str, Tensor] = {}

    def keep(layer: int) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            pooled[layer] = [_pool(states, pooling, **batch) for pooling in poolings]
            if layer == max(layers):
                raise _DeepestReached

        return hook

    def run(model: PreTrainedModel, ids: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
        batch.update(starts=starts, mask=mask)
        with suppress(_DeepestReached):
            model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
        return torch.stack([values.cpu() for layer in layers for values in pooled[layer]], 1)

    handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in set(layers)]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _rows_in(file: Path | None, shape: tuple[int, int], wanted: int, window: int) -> int:
    """How many rows are in the file already, in whole windows: what a kill tore off is cut away and made again."""
    if file is None or not keep_if_whole(file):
        return 0
    row_bytes = 4 * shape[0] * shape[1]
    done = file.stat().st_size // row_bytes
    done = wanted if done >= wanted else done // window * window
    if file.stat().st_size != done * row_bytes:
        os.truncate(file, done * row_bytes)
    return done


def _append(file: Path, part: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        stream.write(part.tobytes())
