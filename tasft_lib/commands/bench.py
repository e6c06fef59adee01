"""`tasft bench`: time, memory and gradient error beside TRL's plain SFT and dense TA-SFT."""

import argparse
import json

from .flags import at_least


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft bench",
        description="Ours against TRL's plain SFT and against dense TA-SFT; ratios below 1 are better. SAFT's filter "
        "against just the forward passes it needs.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    tasft = argparse.ArgumentParser(add_help=False)
    tasft.add_argument("--unsafe", type=_share, default=0.05, help="share of unsafe tokens or rows (default: 0.05)")
    tasft.add_argument("--penalty", default="emd", choices=("emd", "emd_exact", "nlcl"))
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    shared.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    shared.add_argument("--threads", type=at_least(1), default=1, help="CPU threads (default: 1)")
    shared.add_argument(
        "--keep_freed_memory", action="store_true", help="tell glibc so; a CPU's large blocks get cheap"
    )
    shared.add_argument(
        "--repeats", type=at_least(1), default=7, help="rounds, of which medians are taken (default: 7)"
    )
    shared.add_argument("--json", action="store_true", help="print everything measured as JSON")
    head = kinds.add_parser("head", parents=[tasft, shared], help="the loss head alone")
    head.add_argument("--vocab", type=at_least(1), default=32000)
    head.add_argument("--hidden", type=at_least(1), default=512)
    head.add_argument("--tokens", type=at_least(1), default=1536)
    step = kinds.add_parser("step", parents=[tasft, shared], help="whole training steps of a random Llama with LoRA")
    step.add_argument("--geometry", default="small", choices=("tiny", "small", "llama-3.1-8b"))
    step.add_argument("--batch_size", type=at_least(1), default=8)
    step.add_argument("--sequence_length", type=at_least(1), help="tokens of every row (default: lengths as in Alpaca)")
    step.add_argument("--load_in_4bit", action="store_true")
    step.add_argument("--gradient_checkpointing", action="store_true")
    saft = kinds.add_parser("saft", parents=[shared], help="SAFT's filter on texts, and the memory of its fit")
    saft.add_argument("--geometry", default="small", choices=("tiny", "small", "llama-3.1-8b"))
    saft.add_argument("--rows", type=at_least(1), default=256)
    saft.add_argument("--batch_size", type=at_least(1), default=16)
    saft.add_argument("--hidden", type=at_least(1), default=512, help="size of the activations whose fit is measured")
    args = vars(parser.parse_args(argv))

    from ..bench import measure

    as_json, kind = args.pop("json"), args.pop("kind")
    result = {"head": measure.head, "step": measure.step, "saft": measure.saft}[kind](**args)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    if kind == "saft":
        low, high = result["spread"]["time_ratio_vs_forward_passes"]
        print(
            f"against the forward passes: time x{result['time_ratio_vs_forward_passes']:.2f} ({low:.2f} to {high:.2f})"
        )
        for n, size in result["fit_peak_bytes"].items():
            print(f"fit and scores of {n:,} activations of size {args['hidden']}: {size / 2**20:.1f} MB")
        return
    for against in ("trl_sft", "dense_tasft"):
        time, memory = (result[f"{what}_ratio_vs_{against}"] for what in ("time", "memory"))
        if time is None:
            print(f"against {against}: out of memory")
            continue
        low, high = result["spread"][f"time_ratio_vs_{against}"]
        print(f"against {against}: time x{time:.2f} ({low:.2f} to {high:.2f}), memory x{memory:.2f}")
    if result["max_relative_grad_error"] is not None:
        print(f"largest relative gradient error: {result['max_relative_grad_error']:.1e}")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40}: give a number from 0 to 1")
    return value
