"""`tasft attack`: PAIR: an attacker model tries to get harmful answers out of a target."""

import argparse
import os
from pathlib import Path

from .. import files
from .flags import check_data


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft attack",
        description="PAIR (arXiv:2310.08419). Attacker and judge are chat servers, http(s)://.../v1; the target is "
        "another, or a folder. The key is OPENAI_API_KEY. Run it again to go on where it stopped.",
    )
    parser.add_argument("--goals", required=True, help="file with a column goal and, if there is one, target")
    parser.add_argument("--target", required=True, help="chat server, or the folder of a model or adapter")
    parser.add_argument("--target_model", help="name of the model on that server")
    parser.add_argument("--prompt_template", default="alpaca", choices=("alpaca", "short", "none"), help="for a folder")
    for role in ("attacker", "judge"):
        parser.add_argument(f"--{role}", required=True, help="chat server")
        parser.add_argument(f"--{role}_model", required=True, help="name of the model on that server")
    parser.add_argument("--streams", type=int, default=30, help="conversations side by side (default: 30)")
    parser.add_argument("--depth", type=int, default=3, help="rounds of each (default: 3)")
    parser.add_argument("--n_goals", type=int, help="only the first so many")
    parser.add_argument("--max_calls", type=int, help="answers of all models that --output_dir may come to hold")
    parser.add_argument("--concurrency", type=int, default=8, help="requests, or the folder's prompts, at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)

    check_data(args.goals)

    from .. import templates
    from ..evaluation import pair, rates
    from ..evaluation.served import Endpoint
    from ..generation import Decoding, generate
    from ..models import load_model

    goals = pair.read_goals(args.goals)[: args.n_goals]
    settings = pair.PairSettings(streams=args.streams, depth=args.depth, seed=args.seed)
    attacker, judge = Endpoint(args.attacker, args.attacker_model), Endpoint(args.judge, args.judge_model)
    if os.path.isdir(args.target):
        model, tokenizer = load_model(args.target)

        def target(prompts: list[str]) -> list[str]:
            asked = [templates.format_prompt(prompt, template=args.prompt_template) for prompt in prompts]
            decoding = Decoding(max_new_tokens=settings.target_tokens)
            return [a.text for a in generate(model, tokenizer, asked, decoding=decoding, batch_size=args.concurrency)]

        target_name = f"{files.model_identity(args.target)} {args.prompt_template}"
    else:
        target, target_name = Endpoint(args.target, args.target_model or ""), None
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
