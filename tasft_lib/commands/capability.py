"""`tasft capability`: lm-evaluation-harness on a model or adapter: what safety cost."""

import argparse
from pathlib import Path

from ..storage import files, integrity
from .flags import MODEL, add_dtype, at_least, check_folder, json_object, located, own_template, template_of

MANIFEST = "capability_manifest.json"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("tasft capability", description="lm-evaluation-harness: capability.csv.")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--model_revision", help="commit of a hub id")
    add_dtype(parser)
    parser.add_argument("--tasks", nargs="+", help="NAME or NAME@<commit of its data> (default: the paper's three)")
    parser.add_argument("--include_path", help="folder of your own task YAMLs")
    parser.add_argument(
        "--prompt_template",
        choices=("none", "chat"),
        help="questions as they are, or in the tokenizer's chat template (default: chat, for a model that has one and "
        "was not tuned with another)",
    )
    parser.add_argument("--chat_template_kwargs", type=json_object, metavar="JSON", help="switches of that template")
    parser.add_argument("--num_fewshot", type=at_least(0), default=0)
    parser.add_argument("--limit", type=at_least(1), help="only the first so many questions of each task")
    parser.add_argument("--batch_size", type=at_least(1), default=8)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)

    args.model = located(args.model, args.model_revision)

    with integrity.folder_lock(args.output_dir):
        _score(args)


def _score(args: argparse.Namespace) -> None:
    from ..evaluation import lm_eval
    from ..models import load_model

    tasks = {}
    for task in args.tasks or lm_eval.TASKS:
        name, _, commit = task.partition("@")
        tasks[name] = commit or lm_eval.TASKS.get(name)
        if tasks[name] is None and args.include_path is None:
            raise ValueError(f"task {name}: give the commit of its data set, {name}@<commit>, or --include_path.")
    model, tokenizer = load_model(args.model, args.model_revision, dtype=args.dtype)
    if args.prompt_template is None:
        args.prompt_template = "chat" if own_template(args.model, args.model_revision, tokenizer) == "chat" else "none"
        print(f"prompt template: {args.prompt_template} (another: --prompt_template)")
    is_chat = template_of(args, args.model, tokenizer) == "chat"
    options = {"num_fewshot": args.num_fewshot, "limit": args.limit, "include_path": args.include_path}
    if is_chat:
        options |= {"apply_chat_template": True, "chat_template_kwargs": args.chat_template_kwargs}
    settings = {"model": files.model_identity(args.model), "revision": args.model_revision, "tasks": tasks}
    if args.dtype != "auto":
        settings["dtype"] = args.dtype
    optional = dict.fromkeys(("dtype", "apply_chat_template", "chat_template_kwargs"))
    check_folder(args.output_dir / MANIFEST, optional | settings | options)
    # What the harness has asked it keeps, by the question as the model is given it.
    cache = args.output_dir / f"asked-{files.content_hash([settings['model'], args.model_revision, args.dtype])}"
    try:
        scores = lm_eval.harness_scores(model, tokenizer, tasks, batch_size=args.batch_size, cache=cache, **options)
    except ConnectionError as error:  # of the data of a task
        remedy = "check the network, or give --tasks and --include_path of tasks that read your own files"
        raise ConnectionError(f"{error}; {remedy}") from error
    args.output_dir.mkdir(parents=True, exist_ok=True)
    files.write_text(args.output_dir / "capability.csv", scores.to_csv(index=False))
    files.write_json(args.output_dir / MANIFEST, settings | options | files.environment())
    print(scores.to_string(index=False, float_format="{:.3f}".format))
