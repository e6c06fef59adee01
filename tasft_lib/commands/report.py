"""`tasft report`: the report of a profile again, from its tables: a verdict per claim of the paper."""

import argparse
from pathlib import Path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("tasft report", description="figures/<profile>/report.md and .html, again.")
    parser.add_argument("--profile", default="mini", help="a profile that was run (default: mini)")
    parser.add_argument("--readme", type=Path, help="also put its tables between the marks of this file")
    args = parser.parse_args(argv)

    from ..reporting import report

    print(report.build(args.profile))
    if args.readme:
        report.fill_readme(args.readme, args.profile)
