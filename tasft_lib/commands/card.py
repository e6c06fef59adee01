"""`tasft card`: a model card with what was measured; `--push_to_hub` uploads the model with it."""

import argparse
from pathlib import Path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft card",
        description="Write README.md into a model folder: how it was trained, what was measured, and what was not.",
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a model or adapter")
    parser.add_argument("--results", type=Path, help="the --output_dir of tasft evaluate on this model")
    parser.add_argument(
        "--capability", type=Path, nargs="+", default=[], help="--output_dir of tasft capability, of tasft alpaca_eval"
    )
    parser.add_argument("--license", help="of the model, as the hub names it: apache-2.0, llama3.1, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that you have written yourself")
    parser.add_argument("--push_to_hub", metavar="ID", help="upload weights, tokenizer and card, and nothing else")
    parser.add_argument("--public", action="store_true", help="for everybody to see (default: private)")
    args = parser.parse_args(argv)
    if args.public and not args.push_to_hub:
        parser.error("--public is about --push_to_hub")

    from ..publish import card, hub

    hub.model_files(args.model)
    file = card.write_card(
        args.model,
        results=args.results,
        capability=args.capability,
        licence=args.license,
        name=args.push_to_hub and args.push_to_hub.split("/")[-1],
        overwrite=args.overwrite,
    )
    print(f"card written to {file}")
    if args.push_to_hub:
        print(f"uploaded to {hub.push(args.model, args.push_to_hub, public=args.public)}")
