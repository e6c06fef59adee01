"""`tasft attack`: PAIR: an attacker model tries to get harmful answers out of a target."""

import argparse
import json
from pathlib import Path

from ..storage import files, integrity
from .flags import MODEL, add_dtype, add_template, at_least, check_data, json_object, located, template_of


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft attack",
        description="PAIR (arXiv:2310.08419). Attacker and judge are chat servers, http(s)://.../v1; the target is "
        "another, or a model of yours. The key is OPENAI_API_KEY. Run it again to go on where it stopped.",
    )
    parser.add_argument("--goals", required=True, help="file with a column goal and, if there is one, target")
    parser.add_argument("--target", required=True, help=f"chat server, or {MODEL}")
    parser.add_argument("--target_model", help="name of the model on that server")
    parser.add_argument("--model_revision", help="commit of a target that is a hub id")
    add_dtype(parser)
    add_template(parser)
    for role in ("attacker", "judge"):
        parser.add_argument(f"--{role}", required=True, help="chat server")
        parser.add_argument(f"--{role}_model", required=True, help="name of the model on that server")
    parser.add_argument("--streams", type=at_least(1), default=30, help="conversations side by side (default: 30)")
    parser.add_argument("--depth", type=at_least(1), default=3, help="rounds of each (default: 3)")
    parser.add_argument("--n_goals", type=at_least(1), help="only the first so many")
    parser.add_argument(
        "--max_calls", type=at_least(0), help="answers of all models that --output_dir may come to hold"
    )
    parser.add_argument(
        "--concurrency", type=at_least(1), default=8, help="requests, or prompts of a model of yours, at a time"
    )
    parser.add_argument(
        "--request_fields",
        type=json_object,
        metavar="JSON",
        help='fields added to each request to a server, or left out of it: \'{"top_k": 1, "temperature": null}\'',
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)

    is_served = args.target.startswith(("http://", "https://"))
    if is_served and (args.prompt_template or args.chat_template_kwargs):
        parser.error(
            "--prompt_template and --chat_template_kwargs are for a model of yours: a chat server has its own template"
        )
    if is_served and not args.target_model:
        parser.error("--target is a chat server: give --target_model, the name that it lists under /v1/models")
    if not is_served and args.target_model:
        parser.error("--target_model is the name on a server (http://...), and --target is none: leave it out")
    check_data(args.goals)
    if not is_served:
        args.target = located(args.target, args.model_revision)
    with integrity.folder_lock(args.output_dir):
        _attack(args, is_served)


def _attack(args, is_served: bool) -> None:
    from ..evaluation import pair, rates
    from ..evaluation.served import Endpoint
    from ..generation import Decoding, generate
    from ..models import load_model
    from ..records import templates

    goals = pair.read_goals(args.goals)[: args.n_goals]
    settings = pair.PairSettings(streams=args.streams, depth=args.depth, seed=args.seed)
    attacker, judge = Endpoint(args.attacker, args.attacker_model), Endpoint(args.judge, args.judge_model)
    if is_served:
        target, target_name = Endpoint(args.target, args.target_model), None
    else:
        model, tokenizer = load_model(args.target, args.model_revision, dtype=args.dtype)
        template, switches = template_of(args, args.target, tokenizer), args.chat_template_kwargs

        def target(prompts: list[str]) -> list[str]:
            asked = templates.ask(prompts, template, tokenizer, chat_template_kwargs=switches)
            decoding = Decoding(max_new_tokens=settings.target_tokens)
            options = {"batch_size": args.concurrency, "special_tokens": template != "chat"}
            return [a.text for a in generate(model, tokenizer, asked, decoding=decoding, **options)]

        named = [files.model_identity(args.target), args.model_revision, template, switches and json.dumps(switches)]
        named += [args.dtype] if args.dtype != "auto" else []
        target_name = " ".join(filter(None, named))
    table = pair.attack(
        goals,
        attacker=attacker,
        target=target,
        judge=judge,
        folder=args.output_dir,
        settings=settings,
        target_name=target_name,
        max_calls=args.max_calls,
        concurrency=args.concurrency,
        fields=args.request_fields,
    )
    print(table.to_string(index=False))
    n, fallen = int(table["success"].count()), int(table["success"].sum())
    low, high = rates.wilson_interval(fallen, n)
    print(
        f"jailbroken: {fallen} of {n} scored goals (Wilson 95 % interval {low:.3f} to {high:.3f}), {len(table)} in all"
    )
    if (table["status"] == "unfinished").any():
        print(f"stopped at --max_calls {args.max_calls}: a larger number goes on from here")
    print(f"summary.csv and the transcripts (not redacted) are in {args.output_dir}")
