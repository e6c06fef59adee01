"""An adapter merged into its base, saved as one model that vLLM, llama.cpp's converter and transformers read."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import load_weights, put_on
from ..storage.checkpoints import check_tokens, check_weights
from ..storage.files import model_identity, whole, write_json
from .card import RECORD, read_record, write_card
from .hub import model_files

# Largest difference of logits, relative to their spread, that rounding explains. Merging rounds W + BA once to the type
# of W: 2^-24, 2^-11 and 2^-8 of a weight, which layers add up.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SEQUENCES, _LENGTH = 4, 16


def merge_adapter(
    adapter: Path,
    base: str,
    revision: str | None,
    output: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str | torch.dtype = "auto",
) -> tuple[float, float]:
    """Merge the adapter into its unquantised base, save both as one model in `output` (a new folder), and compare.

    The saved folder is loaded again and its logits, on random tokens, are compared with those of base and adapter side
    by side. Returns the relative difference, and that between the base with and without adapter, which is to be much
    larger. The folder is there whole and checked, or not at all.

    Args:
        base, revision: what the adapter was trained on; of a 4-bit base the checkpoint that was quantised.
        dtype: of the weights; "auto" is the base checkpoint's.

    Raises:
        ValueError: `output` exists, the base is itself quantised, tokenizer and embeddings do not fit, or the logits
            differ by more than rounding explains, or by more than the adapter does.
    """
    _refuse_existing(output)
    weights = load_weights(base, revision, dtype=dtype, device="cpu")
    if getattr(weights.config, "quantization_config", None) is not None:
        raise ValueError(f"{base}: this base is quantised, and merging would round twice; give the unquantised one")
    model = put_on(weights, adapter)
    check_tokens(weights, tokenizer, adapter)
    tokens = _tokens(weights.config.get_text_config().vocab_size)
    with torch.inference_mode():
        side_by_side = model(input_ids=tokens).logits.float()
        with model.disable_adapter():
            effect = _relative(model(input_ids=tokens).logits.float(), side_by_side)
    _own_weights(weights)
    merged = model.merge_and_unload(safe_merge=True)
    _let_be_saved(merged)
    _untie(merged)
    with whole(output) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        dtype = merged.dtype
        del model, merged, weights
        difference = _difference(folder, tokens, side_by_side, dtype)
        smallest = TOLERANCE[torch.float32]
        if not difference <= min(TOLERANCE.get(dtype, smallest), max(effect, smallest)):
            raise ValueError(
                f"{adapter}: merged into {base} it gives other logits than beside it: a relative difference of "
                f"{difference:.2g} for {dtype}, where the adapter makes {effect:.2g}; nothing was saved, try --dtype "
                "float32"
            )
        record = read_record(adapter) | {
            "merged": {
                "adapter": model_identity(str(adapter)),
                "dtype": str(dtype).removeprefix("torch."),
                "difference": difference,
                "effect": effect,
                "tokens": tokens.numel(),
            }
        }
        record.setdefault("base_model", base if not os.path.isdir(base) else Path(base).name)
        record.setdefault("base_model_revision", revision)
        write_json(folder / RECORD, record)
        write_card(folder, name=output.name)
    return difference, effect


def copy_model(
    source: Path, output: Path, *, tokenizer: PreTrainedTokenizerBase, dtype: str | torch.dtype = "auto"
) -> None:
    """A fully tuned model into a new folder: byte by byte, or with another `dtype` loaded and saved in that.

    Checkpoints, samples, logs and optimizer states stay behind. Raises ValueError as `merge_adapter` does.
    """
    _refuse_existing(output)
    check_weights(source, tokenizer=tokenizer)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    stored = config.get("dtype") or config.get("torch_dtype")
    with whole(output) as folder:
        folder.mkdir()
        if dtype in ("auto", stored) or str(dtype).removeprefix("torch.") == stored:
            for file in model_files(source):
                shutil.copy2(file, folder / file.name)
        else:
            model = load_weights(source, dtype=dtype, device="cpu")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for name in (RECORD, "README.md"):
                if (source / name).exists():
                    shutil.copy2(source / name, folder / name)
        if not (folder / "README.md").exists():
            write_card(folder, name=output.name)


def _let_be_saved(model: PreTrainedModel) -> None:
    """Some published generation configs set sampling options without sampling, which save_pretrained refuses."""
    config = model.generation_config
    if not config.do_sample and any(getattr(config, name, None) is not None for name in ("temperature", "top_p")):
        config.do_sample = True


def _own_weights(model: PreTrainedModel) -> None:
    """Where head or embedding has an adapter of its own, a weight of its own to merge it into."""
    for layer in (model.get_output_embeddings(), model.get_input_embeddings()):
        if hasattr(layer, "base_layer"):
            layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.detach().clone())


def _untie(model: PreTrainedModel) -> None:
    """A head that was trained apart from the embedding is no longer tied to it, whatever the base's config says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head.weight is not embedding.weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _tokens(vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(0))


def _difference(folder: Path, tokens: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    saved = load_weights(folder, dtype=dtype, device="cpu")
    with torch.inference_mode():
        logits = saved(input_ids=tokens).logits.float()
    return _relative(logits, expected)


def _relative(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over the spread of the expected logits."""
    return ((logits - expected).square().mean().sqrt() / expected.std()).item()


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise ValueError(f"{output} exists already; remove it or choose another --output_dir.")
    output.parent.mkdir(parents=True, exist_ok=True)
