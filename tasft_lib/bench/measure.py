"""Time, memory and gradient error of TA-SFT beside TRL's plain SFT and on full logits; the cost of SAFT's filter.

Contenders run in alternation in one new process; each one's peak memory is taken in a new process of its own. On a CPU
these are forked from one that has only imported the libraries. `head` measures the loss head alone, `step` whole
optimizer steps. Ratios are ours over theirs: below 1 is better. `saft` measures the filter against just the forward
passes it needs.

On a CPU it matters what the C library does with freed memory. By default glibc hands large blocks back to the system,
and a program that takes and frees them all the time, as TRL's head does, pays for it; `keep_freed_memory` tells it not
to. Times are taken in processes started with just that setting, whatever this process was started with; memory is
always taken as by default.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import takewhile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from ..storage.files import KEEP_FREED_MEMORY
from .contenders import (
    CONTENDERS,
    DENSE,
    FORWARD,
    OURS,
    SAFT,
    TRL,
    benchmark_rows,
    fit_contender,
    gradient_errors,
    head_contender,
    saft_contender,
    step_contender,
)

MAKERS = {"head": head_contender, "step": step_contender, "saft": saft_contender, "saft_fit": fit_contender}
FIT_ROWS = (1_000, 10_000, 100_000)
ANSWER, DONE = "answer: ", "done\n"  # of a measuring process, between lines that libraries print


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


def saft(
    *,
    geometry: str = "small",
    rows: int = 256,
    batch_size: int = 16,
    hidden: int = 512,
    dtype: str = "float32",
    device: str | None = None,
    threads: int = 1,
    keep_freed_memory: bool = False,
    repeats: int = 5,
) -> dict:
    """SAFT on `rows` texts with the middle layer of a random Llama, against just the forward passes that it needs.

    The filter is all of `saft.find.find_harmful`: text to tokens, forward passes, files, fit, scores, threshold, and
    the hash of the weights that names its files. The forward passes are the same batches, tokenised already, through a
    model that ends at that layer.

    Returns `time_ratio_vs_forward_passes`, its `spread` (lowest and highest ratio of a round), seconds, settings, and
    `fit_peak_bytes`: what fit and scores need at their peak for 1,000, 10,000 and 100,000 activations of size `hidden`
    in a file, on a CPU.
    """
    settings = dict(geometry=geometry, rows=rows, batch_size=batch_size, hidden=hidden, dtype=dtype)
    settings |= dict(device=_device(device), threads=threads, keep_freed_memory=keep_freed_memory, repeats=repeats)

    def fit_peak(n: int) -> int:
        on_cpu = settings | {"device": "cpu"}
        return _in_new_process({"measure": "memory", "kind": "saft_fit", "names": [str(n)], "settings": on_cpu})

    peaks = {n: fit_peak(n) for n in tqdm(FIT_ROWS, desc="memory", unit="process")}
    request = {"measure": "time", "kind": "saft", "names": [SAFT, FORWARD], "settings": settings}
    timed = _in_new_process(request)
    if timed is None:
        raise RuntimeError("the model does not fit into GPU memory; give a smaller geometry or batch_size.")
    ratio, spread = _time_ratio(timed["seconds"], SAFT, FORWARD)
    return {
        "kind": "saft",
        "time_ratio_vs_forward_passes": ratio,
        "spread": {"time_ratio_vs_forward_passes": spread},
        "seconds": _medians(timed["seconds"]),
        "fit_peak_bytes": peaks,
        "settings": settings,
    }


def linear_fit(sizes: list[int], values: list[float]) -> dict:
    """Least-squares line through (size, value): its slope, intercept and R². A proportional quantity has R² near 1."""
    slope, intercept = statistics.linear_regression(sizes, values)
    straight = 1.0 if len(set(values)) == 1 else statistics.correlation(sizes, values) ** 2
    return {"slope": slope, "intercept": intercept, "r_squared": straight}


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
    settings = request["settings"]
    on_cpu = settings["device"] == "cpu"
    # Where freed memory is kept, what was freed before the measurement would hide what it takes.
    keeps = settings["keep_freed_memory"] and request["measure"] == "time"
    process = (_process if on_cpu else _process.__wrapped__)(keeps)
    print(json.dumps(request), file=process.stdin, flush=True)
    lines = takewhile(lambda line: line != DONE, process.stdout)
    answers = [json.loads(line.removeprefix(ANSWER)) for line in lines if line.startswith(ANSWER)]
    if not on_cpu:
        process.wait()  # the GPU is its own until then
    if not answers:
        raise RuntimeError(f"measuring {request['measure']} of {', '.join(request['names'])} failed; see above.")
    return answers[0]


@cache
def _process(keeps: bool) -> subprocess.Popen:
    """One that imports this module, which takes seconds, and then answers requests; it ends with this one."""
    environment = {name: value for name, value in os.environ.items() if name not in KEEP_FREED_MEMORY}
    environment |= KEEP_FREED_MEMORY if keeps else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "tasft_lib.bench.measure"], env=environment, **pipes)


def _answer(measure: str, kind: str, names: list[str], settings: dict):
    torch.set_num_threads(settings["threads"])
    try:
        contenders = {name: MAKERS[kind](settings, name) for name in names}
        if measure == "memory":
            return _peak_growth(contenders[names[0]], settings["device"])
        seconds = _alternate(contenders, settings["repeats"], settings["device"])
        if kind == "saft":
            return {"seconds": seconds}
        return {"seconds": seconds, "errors": gradient_errors(kind, settings)} | (
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


def _speed(contenders: dict[str, Callable], seconds: dict[str, list[float]], settings: dict) -> dict[str, dict]:
    tokens = settings["batch_size"] * statistics.mean(len(row["input_ids"]) for row in benchmark_rows(settings))
    n = 8192 if settings["device"] == "cuda" else 2048
    square = torch.randn(n, n, device=settings["device"], dtype=getattr(torch, settings["dtype"]))
    products = _alternate({"square": lambda: square @ square}, 10, settings["device"], show=False)
    ceiling = 2 * n**3 / min(products["square"])
    speed = {"tokens_per_second": {}, "fraction_of_matmul_ceiling": {}}
    for name, run in contenders.items():
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: addmm_flops}) as counter:
            run()
        median = statistics.median(seconds[name])
        speed["tokens_per_second"][name] = tokens / median
        speed["fraction_of_matmul_ceiling"][name] = counter.get_total_flops() / median / ceiling
    return speed


def addmm_flops(_: torch.Size, a: torch.Size, b: torch.Size, *_options, **_named) -> int:
    """Operations of `addmm` by its matrices' shapes; torch's own count fails with `out_dtype`, which is for GPUs."""
    return 2 * a[0] * a[1] * b[1]


def _report(kind: str, settings: dict, memory: dict, seconds: dict, errors: dict, **speed: dict) -> dict:
    """The result of `head` and `step`; null where a contender did not fit."""

    def memory_ratio(name: str) -> float | None:
        return memory[OURS] / memory[name] if memory[OURS] is not None and memory[name] else None

    against = {name: _time_ratio(seconds, OURS, name) for name in (TRL, DENSE)}
    return {
        "kind": kind,
        "time_ratio_vs_trl_sft": against[TRL][0],
        "time_ratio_vs_dense_tasft": against[DENSE][0],
        "memory_ratio_vs_trl_sft": memory_ratio(TRL),
        "memory_ratio_vs_dense_tasft": memory_ratio(DENSE),
        "max_relative_grad_error": errors.get(OURS),
        "max_relative_grad_error_trl_sft": errors.get(TRL),
        "spread": {"time_ratio_vs_trl_sft": against[TRL][1], "time_ratio_vs_dense_tasft": against[DENSE][1]},
        "seconds": _medians(seconds),
        "peak_bytes": memory,
        "settings": settings,
        **speed,
    }


def _time_ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> tuple[float | None, list[float] | None]:
    """Ratio of medians, and the lowest and the highest ratio of a single round; None where one was not timed."""
    if not {ours, theirs} <= seconds.keys():
        return None, None
    ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    return statistics.median(seconds[ours]) / statistics.median(seconds[theirs]), [min(ratios), max(ratios)]


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _serve() -> None:
    """Answer the requests on stdin, a line each, in forks of this process, which only imports; one on a GPU itself."""
    for line in sys.stdin:
        request = json.loads(line)
        forks = request["settings"]["device"] == "cpu"  # who has asked for a GPU can't be forked
        if not forks or os.fork() == 0:
            print(ANSWER + json.dumps(_answer(**request)), flush=True)
            return
        os.wait()
        print(DONE, end="", flush=True)


if __name__ == "__main__":
    _serve()
