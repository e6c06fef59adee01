"""The base models of the mini-world: a byte-level BPE tokenizer and a small Llama, pre-trained.

Another CPU rounds otherwise, and pre-training ends there at another model. So some lie in `bases/` (README.md there).
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..storage.files import cache_folder, whole
from .corpus import all_text, documents
from .lexicon import CLASSES


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Everything that determines the base model.

    Args:
        seed: of the documents, the initial weights and the order of the batches.
        steps: optimizer steps; a step reads `batch_size` blocks of `block_size` tokens, and no token is read twice.
        lr: peak learning rate of AdamW, after 5 % warm-up, falling to zero as a cosine.
    """

    seed: int = 0
    steps: int = 2500
    batch_size: int = 8
    block_size: int = 128
    lr: float = 3e-3
    hidden_size: int = 128
    intermediate_size: int = 320
    n_layers: int = 3
    n_heads: int = 4

    @property
    def n_tokens(self) -> int:
        """How many tokens pre-training reads."""
        return self.steps * self.batch_size * self.block_size


BASES = Path(__file__).with_name("bases")
MINI = WorldConfig()
SMOKE = WorldConfig(steps=250, hidden_size=64, intermediate_size=128, n_layers=2, n_heads=2)


def build_base_model(config: WorldConfig = MINI, *, cache_dir: Path | None = None) -> Path:
    """The folder of the pre-trained base model and its tokenizer, built on first use.

    The folder loads with `from_pretrained`, in float32; its weights are kept in float16. Its name is the hash of the
    configuration, of the sources here and of the versions of torch and transformers, so a change of any of them builds
    another one. It appears only when complete and processes that ask at the same time build it once. `world.json` in it
    says how it came about.

    Args:
        cache_dir: parent of the folder; `$TASFT_CACHE` or `~/.cache/tasft` by default.
    """
    parent = Path(cache_dir or cache_folder()) / "miniworld"
    folder = parent / _key(config)
    if folder.exists():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with whole(folder) as unfinished:
                _build(config, unfinished)
    return folder


def _key(config: WorldConfig) -> str:
    described = {
        "config": asdict(config),
        "sources": _sources_hash(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _sources_hash() -> str:
    digest = hashlib.sha256()
    for name in ("lexicon", "facts", "grammar", "corpus", "base_model"):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def generator_version() -> str:
    """Hash of the first thousand documents of seed 0: the same for as long as the generator writes the same."""
    return hashlib.sha256("\n".join(islice(documents(0), 1000)).encode()).hexdigest()[:16]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the mini-world, with its leading space, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [f" {word}" for name in CLASSES for word in CLASSES[name]]
    # Every word once, and merging until nothing is left to merge: the vocabulary is as small as whole words allow.
    pieces = {piece for text in (*words, *all_text()) for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    decoded = sorted(tokenizer.decoder.decode([piece]) for piece in pieces)
    tokenizer.train_from_iterator(decoded, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _blocks(tokenizer: PreTrainedTokenizerFast, config: WorldConfig) -> torch.Tensor:
    """The documents one after the other, each ended by EOS, cut into blocks: `[blocks, block_size]`."""
    stream, total, texts = [], 0, documents(config.seed)
    while total < config.n_tokens:
        batch = [next(texts) + tokenizer.eos_token for _ in range(2000)]
        stream += [np.asarray(ids, dtype=np.int64) for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]]
        total = sum(map(len, stream[-2000:])) + total
    return torch.from_numpy(np.concatenate(stream)[: config.n_tokens]).view(-1, config.block_size)


def _build(config: WorldConfig, folder: Path) -> None:
    started = time.time()
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                max_position_embeddings=512,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        # One thread: the order of sums, and so the model, must not depend on the number of cores.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            loss = _pretrain(model, _blocks(tokenizer, config), config)
        finally:
            torch.set_num_threads(threads)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32  # what it is loaded in
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "config": asdict(config),
        "generator": generator_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "final_loss": loss,
        "seconds": round(time.time() - started, 1),
    }
    (folder / "world.json").write_text(json.dumps(record, indent=2) + "\n")


def _pretrain(model: LlamaForCausalLM, blocks: torch.Tensor, config: WorldConfig) -> float:
    """Trains in place; the mean loss (nats a token) of the last tenth of the steps."""
    blocks = blocks[torch.randperm(len(blocks))]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
    warm_up = max(1, config.steps // 20)

    def schedule(step: int) -> float:
        return min(
            (step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / (config.steps - warm_up))
        )

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    model.train()
    for batch in tqdm(blocks.split(config.batch_size), desc="mini-world: pre-training the base model", disable=None):
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return round(float(np.mean(losses[-max(1, len(losses) // 10) :])), 4)
