"""`tasft harvest`: unsafe answers of a model itself, judged: D_unsafe."""

from .models import load_model, model_parser


def main(argv: list[str]) -> None:
    parser = model_parser("tasft harvest", "Collect unsafe answers of a model itself (TA-SFT, §4.1) as a data set.")
    parser.add_argument("--prompts", required=True, help="toxic prompts: miniworld, stl, or a file of prompts")
    parser.add_argument("--red_team", action="store_true", help="--prompts is hh-rlhf's file of red-team transcripts")
    parser.add_argument("--n", type=int, default=100, help="unsafe answers wanted (default: 100)")
    parser.add_argument("--rounds", type=int, default=4, help="times a prompt is asked at most (default: 4)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--evaluation_prompts", nargs="*", default=[], help="files of prompts that must not be used")
    args = parser.parse_args(argv)

    from .. import benchmarks, catalogue, data
    from ..generation import Decoding
    from ..harvest import harvest, save_harvest
    from ..judges import load_judge

    judge = load_judge(args.judge)
    read = catalogue.red_team_prompts if args.red_team else benchmarks.harvest_prompts
    prompts = read(args.prompts)
    held_out = [prompt for file in args.evaluation_prompts for prompt in data.read_prompts(file)]
    if args.output_dir.exists():
        raise ValueError(f"{args.output_dir} exists already; remove it or choose another --output_dir.")
    model, tokenizer = load_model(args)
    rows, report = harvest(
        model,
        tokenizer,
        prompts,
        judge,
        n=args.n,
        template=args.prompt_template,
        decoding=Decoding(
            max_new_tokens=args.max_new_tokens, do_sample=True, temperature=args.temperature, seed=args.seed
        ),
        rounds=args.rounds,
        evaluation_prompts=held_out,
        batch_size=args.batch_size,
    )
    print(report)
    print(f"saved to {save_harvest(rows, report, args.output_dir)}")
