"""`tasft status`: how far the arms in runs/ are, read from their files."""

import argparse
import time


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("tasft status", description="How far the arms in runs/ ($TASFT_RUNS) are.")
    parser.add_argument("--watch", action="store_true", help="again every five seconds, in place, until Ctrl-C")
    parser.add_argument("--rates", action="store_true", help="instead: the rates of all judged arms, as CSV")
    args = parser.parse_args(argv)

    from ..experiments.status import as_text, rates, status
    from ..storage.files import runs_folder

    if args.rates:
        print(rates(runs_folder()).to_csv(index=False), end="")
        return
    if not args.watch:
        print(as_text(status(runs_folder())))
        return
    while True:
        print(f"\033[H\033[J{as_text(status(runs_folder()))}", flush=True)
        time.sleep(5)
