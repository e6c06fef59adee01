"""Time, memory and gradient error of TA-SFT beside TRL's plain SFT and beside TA-SFT on full logits.

Contenders run in alternation in one new process; each one's peak memory is taken in a new process of its own. `head`
measures the loss head alone, `step` whole optimizer steps. Ratios are ours over theirs: below 1 is better.

On a CPU it matters what the C library does with freed memory. By default glibc hands large blocks back to the system,
and a program that takes and frees them all the time, as TRL's head does, pays for it; `keep_freed_memory` tells it not
to. Times are taken in processes started with just that setting, whatever this process was started with; memory is
always taken as by default.
"""

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from . import losses
from .fused_head import fused_head, inverse_row_norms
from .losses import dense_head

OURS, TRL, DENSE = CONTENDERS = ("fused_tasft", "trl_sft", "dense_tasft")
# Models by name for `step`: (vocabulary, hidden, intermediate, layers, heads, key/value heads).
GEOMETRIES = {
    "tiny": (512, 64, 128, 2, 4, 4),
    "small": (32000, 512, 1376, 4, 8, 8),
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8),
}


def head(
    *,
    vocab: int = 32000,
    hidden: int = 512,
    tokens: int = 1536,
    unsafe: float = 0.05,
    penalty: str = "emd",
    dtype: str = "float32",
    device: str | None = None,
    threads: int = 1,
    keep_freed_memory: bool = False,
    repeats: int = 7,
) -> dict:
    """Forward and backward of the loss head on `tokens` random scored positions, a share `unsafe` of them penalised.

    The head is frozen, as under LoRA. TRL's head gives its logged metrics (entropy, token accuracy), and so does ours.
    A gradient error is the largest over tokens of ‖g − g₆₄‖ / ‖g₆₄‖, against float64 on the same numbers.

    Returns ratios, `spread` (lowest and highest ratio of a round), seconds, bytes, errors and settings.
    """
    settings = dict(vocab=vocab, hidden=hidden, tokens=tokens, unsafe=unsafe, penalty=penalty, dtype=dtype)
    settings |= dict(device=_device(device), threads=threads, keep_freed_memory=keep_freed_memory, repeats=repeats)
    return _measure("head", settings)


def step(
    *,
    geometry: str = "small",
    unsafe: float = 0.05,
    penalty: str = "emd",
    batch_size: int = 8,
    sequence_length: int | None = None,
    dtype: str = "float32",
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = False,
    device: str | None = None,
    threads: int = 1,
    keep_freed_memory: bool = False,
    repeats: int = 7,
) -> dict:
    """An optimizer step (collation to AdamW) of a random Llama with LoRA on q and v, all contenders on the same rows.

    Rows are as long as Alpaca's in its template, or `sequence_length` tokens each with a quarter of them prompt. The
    error is the largest over LoRA matrices of ‖g − g₆₄‖ / ‖g₆₄‖, null where the model is too large for float64.

    Returns what `head` returns, `tokens_per_second` without padding, and the share of the device's measured speed in
    matrix products (over one step's products, those recomputed or on padding included). A contender that does not fit
    into GPU memory is null, and so are all times where the contenders do not fit together.
    """
    settings = dict(geometry=geometry, unsafe=unsafe, penalty=penalty, batch_size=batch_size, dtype=dtype)
    settings |= dict(sequence_length=sequence_length, load_in_4bit=load_in_4bit)
    settings |= dict(gradient_checkpointing=gradient_checkpointing, device=_device(device), threads=threads)
    return _measure("step", settings | dict(keep_freed_memory=keep_freed_memory, repeats=repeats))


def linear_fit(sizes: list[int], values: list[float]) -> dict:
    """Least-squares line through (size, value): its slope, intercept and R². A proportional quantity has R² near 1."""
    slope, intercept = statistics.linear_regression(sizes, values)
    straight = 1.0 if len(set(values)) == 1 else statistics.correlation(sizes, values) ** 2
    return {"slope": slope, "intercept": intercept, "r_squared": straight}


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


def _head_contender(settings: dict, name: str) -> Callable[[], Tensor]:
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
        return _tasft_loss(head, leaf, weight, targets, unsafe, settings["penalty"])

    def run() -> Tensor:
        leaf = states.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return run


def _tasft_loss(head, states, weight, targets, unsafe, penalty) -> Tensor:
    """Mean NLL of the benign tokens plus the penalty of the unsafe ones, taken as one sample."""
    if penalty == "nlcl":
        output = head(states, weight, targets)
        value = losses.nlcl(output.log_prob[unsafe].mean()) if unsafe.any() else 0.0
    else:
        output = head(states, weight, targets, penalized=unsafe, penalty=penalty)
        value = output.penalty.sum() / unsafe.sum().clamp(min=1)
    return value - output.log_prob[~unsafe].sum() / (~unsafe).sum().clamp(min=1)


def _exact_head_gradient(settings: dict, *, plain: bool) -> Tensor:
    """Of TA-SFT's loss, or of plain SFT's, by `dense_head` in float64; a few tokens at a time, for its memory."""
    states, weight, targets, unsafe = _head_inputs(settings)
    unsafe = torch.zeros_like(unsafe) if plain else unsafe
    log_prob = torch.empty(len(states), dtype=torch.float64, device=states.device).requires_grad_()
    value = torch.empty_like(log_prob).requires_grad_()
    chunks = torch.arange(len(states), device=states.device).split(64)
    matrix = weight.double()

    def run(chunk: Tensor, leaf: Tensor):
        if settings["penalty"] == "nlcl":
            return dense_head(leaf, matrix, targets[chunk])
        return dense_head(leaf, matrix, targets[chunk], penalized=unsafe[chunk], penalty=settings["penalty"])

    with torch.no_grad():
        for chunk in chunks:
            output = run(chunk, states[chunk].double())
            log_prob[chunk], value[chunk] = output.log_prob, output.penalty
    # What the loss asks of every token's outputs, then token by token back to the hidden states.
    known = losses.HeadOutput(log_prob, torch.empty(0), torch.empty(0), value)
    loss = _tasft_loss(lambda *_, **__: known, states, weight, targets, unsafe, settings["penalty"])
    asked = [
        torch.zeros_like(x) if g is None else g
        for x, g in zip((log_prob, value), torch.autograd.grad(loss, (log_prob, value), allow_unused=True), strict=True)
    ]
    rows = []
    for chunk in chunks:
        leaf = states[chunk].double().requires_grad_()
        output = run(chunk, leaf)
        total = (output.log_prob * asked[0][chunk] + output.penalty * asked[1][chunk]).sum()
        rows.append(torch.autograd.grad(total, leaf)[0])
    return torch.cat(rows)


def _relative_error(gradient: Tensor, exact: Tensor) -> float:
    return ((gradient.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


def _rows(settings: dict, n: int = 512) -> list[dict]:
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


def _trainer(settings: dict, name: str, dtype: str):
    """A trainer of the contender on a random model, with LoRA matrices that are not at their zero start."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from .config import TASFTConfig
    from .trainer import TASFTTrainer

    disable_progress_bars()
    torch.manual_seed(0)
    vocab, hidden, intermediate, layers, heads, kv_heads = GEOMETRIES[settings["geometry"]]
    with torch.device(settings["device"]):
        model = LlamaForCausalLM._from_config(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                max_position_embeddings=8192,
                pad_token_id=0,
                eos_token_id=2,
            ),
            dtype=getattr(torch, dtype),
        )
    with tempfile.TemporaryDirectory() as folder:
        if settings["load_in_4bit"]:
            model.save_pretrained(folder)
            model = LlamaForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
                ),
            )
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
    rows = Dataset.from_list(_rows(settings))
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


def _step_contender(settings: dict, name: str) -> Callable[[], None]:
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


def _measure(kind: str, settings: dict) -> dict:
    """Memory of every contender, then times and errors of those that fit: the result of `head` or `step`."""
    memory = {
        name: _in_new_process({"measure": "memory", "kind": kind, "names": [name], "settings": settings})
        for name in tqdm(CONTENDERS, desc="memory", unit="process")
    }
    names = [name for name in CONTENDERS if memory[name] is not None]
    timed = _in_new_process({"measure": "time", "kind": kind, "names": names, "settings": settings})
    return _report(kind, settings, memory, **(timed or {"seconds": {}, "errors": {}}))


def _in_new_process(request: dict):
    """What `_answer` returns there; None where it runs out of GPU memory."""
    from .runs import KEEP_FREED_MEMORY

    environment = {name: value for name, value in os.environ.items() if name not in KEEP_FREED_MEMORY}
    # Where freed memory is kept, what was freed before the measurement would hide what it takes.
    if request["settings"]["keep_freed_memory"] and request["measure"] == "time":
        environment |= KEEP_FREED_MEMORY
    command = [sys.executable, "-m", "tasft_lib.bench", json.dumps(request)]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise RuntimeError(f"measuring {request['measure']} of {', '.join(request['names'])} failed; see above.")
    return json.loads(run.stdout.splitlines()[-1])


def _answer(measure: str, kind: str, names: list[str], settings: dict):
    torch.set_num_threads(settings["threads"])
    make = _head_contender if kind == "head" else _step_contender
    try:
        contenders = {name: make(settings, name) for name in names}
        if measure == "memory":
            return _peak_growth(contenders[names[0]], settings["device"])
        seconds = _alternate(contenders, settings["repeats"], settings["device"])
        return {"seconds": seconds, "errors": _errors(kind, settings)} | (
            _speed(contenders, seconds, settings) if kind == "step" else {}
        )
    except torch.OutOfMemoryError:
        return None


def _alternate(contenders: dict[str, Callable], repeats: int, device: str, show: bool = True) -> dict[str, list]:
    """Seconds of each round, contenders in turn, after one round that does not count."""
    seconds = {name: [] for name in contenders}
    for i in tqdm(range(repeats + 1), desc="timing", unit="round", disable=not show):
        for name, run in contenders.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _peak_growth(run: Callable, device: str) -> int:
    """Bytes that `run` needs at its peak over what is held before: allocated on the GPU, or resident on a CPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # A product and a backward of its own, so that libraries have their workspaces.
    leaf = torch.randn(8, 8, requires_grad=True)
    (leaf @ leaf).log_softmax(-1).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _errors(kind: str, settings: dict) -> dict[str, float]:
    if kind == "head":
        return {
            name: _relative_error(_head_contender(settings, name)(), _exact_head_gradient(settings, plain=name == TRL))
            for name in CONTENDERS
        }
    too_large = settings["geometry"] == "llama-3.1-8b" or settings["load_in_4bit"]
    return {} if too_large else _step_errors(settings)


def _speed(contenders: dict[str, Callable], seconds: dict[str, list[float]], settings: dict) -> dict[str, dict]:
    tokens = settings["batch_size"] * statistics.mean(len(row["input_ids"]) for row in _rows(settings))
    n = 8192 if settings["device"] == "cuda" else 2048
    square = torch.randn(n, n, device=settings["device"], dtype=getattr(torch, settings["dtype"]))
    products = _alternate({"square": lambda: square @ square}, 10, settings["device"], show=False)
    ceiling = 2 * n**3 / min(products["square"])
    speed = {"tokens_per_second": {}, "fraction_of_matmul_ceiling": {}}
    for name, run in contenders.items():
        with FlopCounterMode(display=False) as counter:
            run()
        median = statistics.median(seconds[name])
        speed["tokens_per_second"][name] = tokens / median
        speed["fraction_of_matmul_ceiling"][name] = counter.get_total_flops() / median / ceiling
    return speed


def _report(kind: str, settings: dict, memory: dict, seconds: dict, errors: dict, **speed: dict) -> dict:
    """Ratios of medians, and the lowest and highest ratio of a single round as their spread."""
    median = {name: statistics.median(values) for name, values in seconds.items()}

    def time_ratio(name: str) -> float | None:
        return median[OURS] / median[name] if {OURS, name} <= median.keys() else None

    def memory_ratio(name: str) -> float | None:
        return memory[OURS] / memory[name] if memory[OURS] is not None and memory[name] else None

    def rounds(name: str) -> list[float] | None:
        if not {OURS, name} <= seconds.keys():
            return None
        ratios = [ours / theirs for ours, theirs in zip(seconds[OURS], seconds[name], strict=True)]
        return [min(ratios), max(ratios)]

    return {
        "kind": kind,
        "time_ratio_vs_trl_sft": time_ratio(TRL),
        "time_ratio_vs_dense_tasft": time_ratio(DENSE),
        "memory_ratio_vs_trl_sft": memory_ratio(TRL),
        "memory_ratio_vs_dense_tasft": memory_ratio(DENSE),
        "max_relative_grad_error": errors.get(OURS),
        "max_relative_grad_error_trl_sft": errors.get(TRL),
        "spread": {"time_ratio_vs_trl_sft": rounds(TRL), "time_ratio_vs_dense_tasft": rounds(DENSE)},
        "seconds": median,
        "peak_bytes": memory,
        "settings": settings,
        **speed,
    }


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(_answer(**json.loads(sys.argv[1]))))
