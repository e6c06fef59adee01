"""`tasft arm NAME`: one arm of `tasft reproduce --write_arms`: trained, asked and judged, in this process."""

import argparse


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("tasft arm", description="Train one arm, answer the prompts, judge the answers.")
    parser.add_argument("name", help="as `tasft reproduce --write_arms` prints it")
    args = parser.parse_args(argv)

    from ..experiments.single import run_arm

    print(run_arm(args.name))
