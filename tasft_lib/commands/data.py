"""`tasft data`: the published data sets: what is here, what is missing and how to get it."""

import argparse
from pathlib import Path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("tasft data", description="The published data sets. Downloads what --fetch names.")
    parser.add_argument("--folder", type=Path, help="look for local copies in it, at any depth")
    parser.add_argument("--ask", action="store_true", help="ask the web whether what is missing would come")
    parser.add_argument("--fetch", nargs="+", metavar="NAME", help="download these at their commits, print the files")
    args = parser.parse_args(argv)

    from ..prepare.catalogue import fetch, status_table

    if args.fetch:
        for name in args.fetch:
            print(fetch(name, args.folder))
        return
    table, remedies = status_table(args.folder, ask=args.ask)
    print(table.drop(columns="address").to_string(index=False, na_rep="-"))
    print("\n".join(remedies) or "everything is here")
