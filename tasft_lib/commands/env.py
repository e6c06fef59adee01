"""`tasft env`: versions and hardware, for a bug report."""

import argparse
import json


def main(argv: list[str]) -> None:
    argparse.ArgumentParser("tasft env", description="Versions and hardware, for a bug report.").parse_args(argv)
    from ..storage.files import environment

    print(json.dumps(environment(), indent=2))
