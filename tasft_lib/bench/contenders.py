"""What `bench` measures: loss head and whole steps of TA-SFT, TRL's plain SFT, TA-SFT on full logits; SAFT's filter.

A contender is a function that does its work once. `settings` are those of `measure.head`, `measure.step` or
`measure.saft`.
"""

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from .. import losses
from ..fused_head import fused_head, inverse_row_norms
from ..losses import dense_head

OURS, TRL, DENSE = CONTENDERS = ("fused_tasft", "trl_sft", "dense_tasft")
TOKENS_PER_WORD = 3  # of the random words that SAFT is timed on
SAFT, FORWARD = "saft_filter", "forward_passes"
# Models by name for `step`: (vocabulary, hidden, intermediate, layers, heads, key/value heads).
GEOMETRIES = {
    "tiny": (512, 64, 128, 2, 4, 4),
    "small": (32000, 512, 1376, 4, 8, 8),
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8),
}


def _head_inputs(settings: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets and which tokens are unsafe, on the device and in the dtype."""
    generator = torch.Generator().manual_seed(0)
    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    tokens, vocab, hidden = settings["tokens"], settings["vocab"], settings["hidden"]
    # Logits of a few units, as of a trained model: a softmax neither uniform nor one-hot.
    weight = torch.randn(vocab, hidden, generator=generator).mul_(2 / math.sqrt(hidden)).to(device, dtype)
    states = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator).to(device)
    unsafe = torch.zeros(tokens, dtype=torch.bool, device=device)
    unsafe[torch.randperm(tokens, generator=generator)[: round(settings["unsafe"] * tokens)].to(device)] = True
    return states, weight, targets, unsafe


def head_contender(settings: dict, name: str) -> Callable[[], Tensor]:
    """A function that computes the contender's loss and returns its gradient by the hidden states, `[T, H]`."""
    states, weight, targets, unsafe = _head_inputs(settings)
    norms = inverse_row_norms(weight)

    def loss(leaf: Tensor) -> Tensor:
        if name == TRL:
            chunk = 32768  # what TRL's trainers pass
            outputs = ("log_probs", "entropy", "is_top1")
            log_prob, *_ = ChunkedLogProbFunction.apply(leaf, weight, None, targets, 1.0, chunk, None, 1.0, outputs)
            return -log_prob.mean()
        head = partial(fused_head, inverse_norms=norms) if name == OURS else dense_head
        output = head(leaf, weight, targets, **_penalty(settings, unsafe))
        return _tasft_loss(output.log_prob, output.penalty, unsafe, settings["penalty"])

    def run() -> Tensor:
        leaf = states.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return run


def _penalty(settings: dict, unsafe: Tensor) -> dict:
    """What a head is told of the penalty; nothing of NLCL, which needs log-probabilities alone."""
    return {} if settings["penalty"] == "nlcl" else {"unsafe": unsafe, "penalty": settings["penalty"]}


def _tasft_loss(log_prob: Tensor, penalty: Tensor, unsafe: Tensor, name: str) -> Tensor:
    """Mean NLL of the benign tokens plus the penalty of the unsafe ones, taken as one sample; from a head's output."""
    if name == "nlcl":
        value = losses.nlcl(log_prob[unsafe].mean()) if unsafe.any() else 0.0
    else:
        value = penalty.sum() / unsafe.sum().clamp(min=1)
    return value - log_prob[~unsafe].sum() / (~unsafe).sum().clamp(min=1)


def exact_head_gradient(settings: dict, *, plain: bool) -> Tensor:
    """Of TA-SFT's loss, or of plain SFT's, by `dense_head` in float64; a few tokens at a time, for its memory."""
    states, weight, targets, unsafe = _head_inputs(settings)
    unsafe = torch.zeros_like(unsafe) if plain else unsafe
    matrix = weight.double()

    def head(chunk: Tensor, leaf: Tensor) -> losses.HeadOutput:
        return dense_head(leaf, matrix, targets[chunk], **_penalty(settings, unsafe[chunk]))

    # The head's outputs for all tokens; what the loss's gradient by each of them is; from there, token by token, back
    # to the hidden states.
    chunks = torch.arange(len(states), device=states.device).split(64)
    with torch.no_grad():
        outputs = [head(chunk, states[chunk].double()) for chunk in chunks]
    log_prob = torch.cat([output.log_prob for output in outputs]).requires_grad_()
    penalty = torch.cat([output.penalty for output in outputs]).requires_grad_()
    loss = _tasft_loss(log_prob, penalty, unsafe, settings["penalty"])
    by_log_prob, by_penalty = torch.autograd.grad(loss, (log_prob, penalty), materialize_grads=True)
    rows = []
    for chunk in chunks:
        leaf = states[chunk].double().requires_grad_()
        output = head(chunk, leaf)
        total = (output.log_prob * by_log_prob[chunk] + output.penalty * by_penalty[chunk]).sum()
        rows.append(torch.autograd.grad(total, leaf)[0])
    return torch.cat(rows)


def relative_error(gradient: Tensor, exact: Tensor) -> float:
    """Largest over rows of ‖g − g₆₄‖ / ‖g₆₄‖."""
    return ((gradient.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


def benchmark_rows(settings: dict, n: int = 512) -> list[dict]:
    """Tokenised rows, the share `unsafe` of them labelled False; lengths as of Alpaca's words and marks."""
    generator = torch.Generator().manual_seed(0)

    def lengths(median: float, spread: float, low: int, high: int) -> list[int]:
        draws = torch.randn(n, generator=generator).mul(spread).exp().mul(median)
        return draws.round().clamp(low, high).int().tolist()

    template = 36
    prompts = [template + length for length in lengths(17, 0.5, 4, 100)]
    answers = lengths(40, 1.2, 2, 400)
    if settings["sequence_length"] is not None:
        prompts = [settings["sequence_length"] // 4] * n
        answers = [settings["sequence_length"] - prompts[0]] * n
    vocab = GEOMETRIES[settings["geometry"]][0]
    unsafe = set(torch.randperm(n, generator=generator)[: round(settings["unsafe"] * n)].tolist())
    rows = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.randint(3, vocab, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "label": i not in unsafe})
    return rows


def _llama(settings: dict, dtype: str, depth: int | None = None):
    """A random Llama, the same one every time; `depth` is how many of its layers it has (default: all)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocab, hidden, intermediate, layers, heads, kv_heads = GEOMETRIES[settings["geometry"]]
    with torch.device(settings["device"]):
        return LlamaForCausalLM._from_config(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=depth or layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                max_position_embeddings=8192,
                pad_token_id=0,
                eos_token_id=2,
            ),
            dtype=getattr(torch, dtype),
        )


def _trainer(settings: dict, name: str, dtype: str):
    """A trainer of the contender on a random model, with LoRA matrices that are not at their zero start."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from ..config import TASFTConfig
    from ..models import load_weights
    from ..trainer import TASFTTrainer

    disable_progress_bars()
    model = _llama(settings, dtype)
    with tempfile.TemporaryDirectory() as folder:
        if settings["load_in_4bit"]:
            model.save_pretrained(folder)
            model = load_weights(folder, dtype=dtype, load_in_4bit=True)
    options = dict(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=settings["batch_size"],
        bf16=False,
        use_cpu=settings["device"] == "cpu",
        gradient_checkpointing=settings["gradient_checkpointing"],
        max_length=None,
        optim="adamw_torch",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = _tokenizer()
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    rows = Dataset.from_list(benchmark_rows(settings))
    shared = dict(train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    if name == TRL:
        return SFTTrainer(model, SFTConfig(**options), **shared)
    options |= dict(penalty=settings["penalty"], penalty_weight=1.0, loss_head="dense" if name == DENSE else "fused")
    return TASFTTrainer(model, TASFTConfig(**options), **shared)


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "<eos>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def step_contender(settings: dict, name: str) -> Callable[[], None]:
    """A function that takes the next optimizer step, as the loop of transformers' Trainer does."""
    trainer = _trainer(settings, name, settings["dtype"])
    trainer.create_optimizer()
    trainer.model_wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    loader = trainer.get_train_dataloader()

    def endless():
        while True:
            yield from loader

    batches = endless()

    def run() -> None:
        _gradient(trainer, batches)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _gradient(trainer, batches) -> None:
    (batch,), num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
    trainer.training_step(trainer.model_wrapped, batch, num_items)


def _step_errors(settings: dict) -> dict[str, float]:
    """The gradient of the first step in the dtype against float64, of plain SFT by TRL's own head in float64."""

    weights = _trainer(settings, OURS, settings["dtype"]).model.state_dict()

    def gradients(name: str, dtype: str) -> list[Tensor]:
        trainer = _trainer(settings, name, dtype)
        trainer.model.load_state_dict(weights)  # random numbers differ between dtypes
        trainer.current_gradient_accumulation_steps = 1
        _gradient(trainer, iter(trainer.get_train_dataloader()))
        return [p.grad.double() for p in trainer.model.parameters() if p.requires_grad]

    exact = {DENSE: gradients(DENSE, "float64"), TRL: gradients(TRL, "float64")}
    errors = {}
    for name in CONTENDERS:
        pairs = zip(gradients(name, settings["dtype"]), exact[TRL if name == TRL else DENSE], strict=True)
        errors[name] = max(((g - e).norm() / e.norm()).item() for g, e in pairs)
    return errors


def gradient_errors(kind: str, settings: dict) -> dict[str, float]:
    """Largest relative gradient error of each contender, `kind` "head" or "step"; empty where float64 does not fit."""
    if kind == "head":
        return {
            name: relative_error(head_contender(settings, name)(), exact_head_gradient(settings, plain=name == TRL))
            for name in CONTENDERS
        }
    too_large = settings["geometry"] == "llama-3.1-8b" or settings["load_in_4bit"]
    return {} if too_large else _step_errors(settings)


def _texts(n: int):
    """(rows, tokenizer): random words, as many tokens as Alpaca's rows have, and a BPE learned from them."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeiklmnorst"), rng.integers(2, 9))) for _ in range(2000)]
    alpaca = benchmark_rows({"geometry": "tiny", "sequence_length": None, "unsafe": 0}, n)
    lengths = [(row["labels"].count(-100), len(row["input_ids"])) for row in alpaca]
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "<unk>", "<eos>"]
    raw.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    rows = []
    for prompt, whole in lengths:
        drawn = rng.choice(words, whole // TOKENS_PER_WORD + 1)
        parts = np.split(drawn, [prompt // TOKENS_PER_WORD])
        rows.append({"prompt": " ".join(parts[0]) + " ", "completion": " ".join(parts[1])})
    return Dataset.from_list(rows), tokenizer


def saft_contender(settings: dict, name: str) -> Callable[[], object]:
    """All of SAFT's filter on texts, or only the forward passes: the same batches, through no layer more."""
    from ..saft.activations import activations
    from ..saft.find import Search, find_harmful

    rows, tokenizer = _texts(settings["rows"])
    model = _llama(settings, settings["dtype"]).eval()
    options = dict(batch_size=settings["batch_size"], progress=False)
    if name == SAFT:

        def run():
            with tempfile.TemporaryDirectory() as folder:
                return find_harmful(model, tokenizer, rows, Search(contamination=0.1), folder=Path(folder), **options)

        return run
    batches = []
    decoder = model.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda *call: batches.append(call[2]), with_kwargs=True)
    middle = (model.config.num_hidden_layers + 1) // 2
    activations(model, tokenizer, rows, layers=[middle], **options)
    handle.remove()
    cut = _llama(settings, settings["dtype"], depth=middle).eval().get_decoder()
    cut.load_state_dict(decoder.state_dict(), strict=False)  # random numbers differ between depths
    cut.norm = torch.nn.Identity()  # the last norm comes after the states that the filter reads

    @torch.inference_mode()
    def run_forward():
        for batch in batches:
            cut(**batch)

    return run_forward


def fit_contender(settings: dict, name: str) -> Callable[[], object]:
    """SAFT's fit and scores of as many activations as the name says, read from a file as `find_harmful` does."""
    from ..saft.filter import BLOCK, SAFTFitter
    from ..saft.find import blocks

    rng = np.random.default_rng(0)
    folder = tempfile.TemporaryDirectory()
    path, n = Path(folder.name) / "activations", int(name)
    with path.open("wb") as file:
        for start in range(0, n, BLOCK):
            rng.standard_normal((min(BLOCK, n - start), settings["hidden"]), dtype=np.float32).tofile(file)
    embedded = np.memmap(path, np.float32, "r", shape=(n, 1, settings["hidden"]))

    def run():
        assert folder.name  # kept alive as long as this function
        fitter = SAFTFitter(4)
        for block in blocks(embedded):
            fitter.update(block)
        saft = fitter.filter
        scores = np.concatenate([saft.scores(block) for block in blocks(embedded)])
        return saft.at_contamination(scores, 0.1).drops(scores)

    return run
