"""`tasft compare`: the answers of several evaluations side by side, on one page."""

import argparse
from pathlib import Path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft compare",
        description="One page, which needs no network, with each prompt, the answer of every model and its verdict: to "
        "search, to filter by benchmark and verdict (one harmful, another not), with texts hidden until clicked.",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS",
                        help="folder of a tasft evaluate, or a JSONL file with prompt and response (and benchmark, "
                        "kind, verdict)")  # fmt: skip
    parser.add_argument("--names", nargs="+", help="what the results are called, in their order (default: as they lie)")
    parser.add_argument("--output_file", type=Path, required=True, help="the page, NAME.html")
    args = parser.parse_args(argv)
    if args.names and (len(args.names) != len(args.results) or len(set(args.names)) < len(args.names)):
        parser.error("--names: give each of the results a name of its own")

    from ..evaluation import side_by_side

    names = args.names or _names(args.results)
    results = {n: side_by_side.read_results(path) for n, path in zip(names, args.results, strict=True)}
    table = side_by_side.side_by_side(results)
    from ..reporting import answers  # which imports pandas, when nothing is wrong any more

    answers.write_page(table, args.output_file)
    for name, alone in side_by_side.coverage(table).items():
        only = f", {alone} of which no other was asked" if alone and len(names) > 1 else ""
        print(f"{name}: {len(results[name])} answers to {len(table['rows'])} prompts{only}")
    print(f"{args.output_file}: open it in a browser; its texts are hidden until clicked, but not redacted")


def _names(paths: list[Path]) -> list[str]:
    """The least of each path's end that tells it from the others. Raises `ValueError` for one given twice."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for path, full in zip(paths, whole, strict=True) if whole.count(full) > 1)
        raise ValueError(f"{twice}: is given twice; name other results.")
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len(set(names)) == len(names):
            break
    return names
