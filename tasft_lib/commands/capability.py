"""`tasft capability`: lm-evaluation-harness on a model or adapter: what safety cost."""

import argparse
from pathlib import Path

from .. import files
from .flags import add_dtype


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("tasft capability", description="lm-evaluation-harness: capability.csv.")
    parser.add_argument("--model", required=True, help="folder of a model or adapter, or a hub id")
    parser.add_argument("--model_revision", help="commit of a hub id")
    add_dtype(parser)
    parser.add_argument("--tasks", nargs="+", help="NAME or NAME@<commit of its data> (default: the paper's three)")
    parser.add_argument("--include_path", help="folder of your own task YAMLs")
    parser.add_argument("--num_fewshot", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only the first so many questions of each task")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)

    files.check_model(args.model, args.model_revision)

    from ..evaluation import lm_eval
    from ..models import load_model

    tasks = {}
    for task in args.tasks or lm_eval.TASKS:
        name, _, commit = task.partition("@")
        tasks[name] = commit or lm_eval.TASKS.get(name)
        if tasks[name] is None and args.include_path is None:
            raise ValueError(f"task {name}: give the commit of its data set, {name}@<commit>, or --include_path.")
    model, tokenizer = load_model(args.model, args.model_revision, dtype=args.dtype)
    options = {"num_fewshot": args.num_fewshot, "limit": args.limit, "include_path": args.include_path}
    scores = lm_eval.harness_scores(model, tokenizer, tasks, batch_size=args.batch_size, **options)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scores.to_csv(args.output_dir / "capability.csv", index=False)
    settings = {"model": files.model_identity(args.model), "revision": args.model_revision, "tasks": tasks}
    record = settings | options | files.environment()
    files.write_json(args.output_dir / "capability_manifest.json", record)
    print(scores.to_string(index=False, float_format="{:.3f}".format))
