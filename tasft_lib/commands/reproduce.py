"""`tasft reproduce`: the notebooks of a profile, by papermill: figures, tables and a report (--dry-run: the arms)."""

import argparse
import os
from pathlib import Path


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("tasft reproduce", description="Run the notebooks of a profile by papermill.")
    parser.add_argument("--profile", default="mini", help="folder of params/: mini, smoke, pocket, small, paper, ...")
    parser.add_argument("--notebooks", nargs="+", metavar="NAME", help="default: all that the profile has")
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="override one"
    )
    parser.add_argument("--seeds", type=int, help="seeds of data order, unsafe subset and adapter (n_seeds)")
    parser.add_argument("--prepare-only", action="store_true", help="write the parameterised notebooks, run nothing")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="list every arm with settings and rough cost"
    )
    parser.add_argument("--engine", help="where arms are trained: processes (default), local, debug, slurm")
    parser.add_argument("--engine_options", type=Path, metavar="FILE", help="YAML for submitit, see params/engines")
    parser.add_argument("--write_arms", action="store_true", help="write each arm for `tasft arm` and print the names")
    args = parser.parse_args(argv)
    if args.engine_options and not args.engine_options.is_file():
        raise ValueError(f"{args.engine_options}: no such file; examples stand in params/engines.")
    # Notebooks, which are processes of their own, are told so too.
    if args.engine:
        os.environ["TASFT_ENGINE"] = args.engine
    if args.engine_options:
        os.environ["TASFT_ENGINE_OPTIONS"] = str(args.engine_options.absolute())
    overrides = dict(args.parameter) | ({} if args.seeds is None else {"n_seeds": args.seeds})
    if args.dry_run:
        from ..experiments.reproduce import RULES, plan

        arms = plan(args.profile, args.notebooks, overrides)
        print(arms.to_string(index=False, na_rep="-", max_colwidth=60))
        of = "core" if arms["gpu_gb"].isna().all() else "GPU"
        hours = "" if arms["hours"].isna().all() else f", about {arms['hours'].sum():.0f} {of} hours (rough)"
        disk = "" if arms["disk_gb"].isna().all() else f", {arms['disk_gb'].sum():.2g} GB of checkpoints"
        print(f"{len(arms)} arms, {arms['tokens'].sum() / 1e6:.1f}M tokens of training{hours}{disk}")
        if hours:
            print(f"The estimate: {RULES[of]}; loading and judging are not counted.")
        return

    if args.write_arms:
        from ..experiments.single import write_arms

        print("\n".join(write_arms(args.profile, args.notebooks, overrides)))
        return

    from ..experiments.reproduce import reproduce

    reproduce(args.profile, args.notebooks, overrides, prepare_only=args.prepare_only)
