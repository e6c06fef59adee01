"""`tasft harvest`: unsafe answers of a model itself, judged: D_unsafe."""

from pathlib import Path

from ..storage import files, integrity
from .flags import add_source, at_least, check_data, judge_of, located, model_parser, source_options, template_of

# Options that decide what a harvest gives.
SETTLED = ("n", "rounds", "temperature", "seed", "max_new_tokens", "batch_size")
SETTLED += ("prompt_template", "chat_template_kwargs")


def main(argv: list[str]) -> None:
    parser = model_parser("tasft harvest", "Collect unsafe answers of a model itself (TA-SFT, §4.1) as a data set.")
    parser.add_argument("--prompts", required=True, help="toxic prompts: miniworld, stl, a file, or a hub id")
    add_source(parser, "the prompts", revision="--prompts_revision")
    parser.add_argument(
        "--red_team", action="store_true", help="--prompts is Anthropic/hh-rlhf or a file of its red-team transcripts"
    )
    parser.add_argument("--n", type=at_least(1), default=100, help="unsafe answers wanted (default: 100)")
    parser.add_argument("--rounds", type=at_least(1), default=4, help="times a prompt is asked at most (default: 4)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default: 1)")
    parser.add_argument(
        "--recoveries",
        action="store_true",
        help="a safe answer to each prompt too, for `tasft train --penalty recover`",
    )
    parser.add_argument("--evaluation_prompts", nargs="*", default=[], help="files of prompts that are left out")
    parser.add_argument("--work", type=Path, help="what is done so far, to go on from (default: <output_dir>.work)")
    args = parser.parse_args(argv)

    for file in args.evaluation_prompts:
        check_data(file, on_hub=False)
    args.model = located(args.model, args.model_revision)
    with integrity.folder_lock(args.output_dir):
        _harvest(args)


def _harvest(args) -> None:
    if args.output_dir.exists() and not (args.output_dir / "settings.json").exists():
        raise ValueError(f"{args.output_dir} exists already; remove it or choose another --output_dir.")

    from ..evaluation import worlds
    from ..generation import Decoding
    from ..judges.base import check_ready
    from ..judges.load import load_judge
    from ..models import load_model, load_tokenizer
    from ..prepare.harvest import Origin, harvest, is_harvested, save_harvest
    from ..records import forms

    which = source_options(args)
    if any(which.values()) and (args.red_team or worlds.is_named(args.prompts)):
        given = ", ".join(name for name in ("split", "config_name", "revision") if getattr(args, name))
        raise ValueError(f"--prompts {args.prompts}{' --red_team' * args.red_team} has no {given}; leave it out.")
    judge = load_judge(judge_of(args, [args.prompts]))
    prompts, prompts_origin = _prompts(args)
    held_out = [prompt for file in args.evaluation_prompts for prompt in forms.read_prompts(file)]
    args.prompt_template = template_of(args, args.model, load_tokenizer(args.model, args.model_revision))
    settings = {
        "model": files.model_identity(args.model),
        "model_revision": args.model_revision,
        "dtype": args.dtype,
        "prompts": files.content_hash(prompts),
        "evaluation_prompts": files.content_hash(held_out),
        "judge": [judge.name, judge.revision],
        **{name: getattr(args, name) for name in SETTLED},
        **({"recoveries": True} if args.recoveries else {}),
    }
    if is_harvested(args.output_dir, settings):
        print(f"{args.output_dir} holds this harvest already; nobody was asked")
        return
    check_ready(judge)
    model, tokenizer = load_model(args.model, args.model_revision, dtype=args.dtype)
    rows, others, report = harvest(
        model,
        tokenizer,
        prompts,
        judge,
        n=args.n,
        template=args.prompt_template,
        chat_template_kwargs=args.chat_template_kwargs,
        decoding=Decoding(
            max_new_tokens=args.max_new_tokens, do_sample=True, temperature=args.temperature, seed=args.seed
        ),
        rounds=args.rounds,
        evaluation_prompts=held_out,
        recoveries=args.recoveries,
        batch_size=args.batch_size,
        origin=Origin(*files.named(args.model, args.model_revision), *prompts_origin),
        work=args.work or args.output_dir.with_name(f"{args.output_dir.name}.work"),
    )
    print(report)
    print(f"saved to {save_harvest(rows, others, report, args.output_dir, settings)}")


def _prompts(args) -> tuple:
    """(the toxic prompts; name and revision of where they are from)."""
    from ..evaluation import worlds
    from ..prepare import catalogue
    from ..records import forms

    which = source_options(args)
    if args.red_team:
        revision = catalogue.named(catalogue.RED_TEAM).revision
        return catalogue.red_team_prompts(args.prompts), files.named(args.prompts, revision)
    if any(which.values()):
        worlds.check_choice([args.prompts], **which)
        return forms.read_prompts(args.prompts, **which), files.named(args.prompts, which["revision"])
    world = worlds.load(args.prompts)
    return world.harvest_prompts(), world.harvest_source()
