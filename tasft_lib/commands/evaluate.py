"""`tasft evaluate`: answers to the harm benchmarks, judged: a results table."""

from .. import files
from .flags import model_parser


def main(argv: list[str]) -> None:
    parser = model_parser(
        "tasft evaluate", "Answer the harm benchmarks and judge the answers: results.csv.", needs_model=False
    )
    parser.set_defaults(prompt_template=None)
    parser.add_argument("--judges", nargs="+", help="several judges, instead of --judge: also agreement.csv")
    parser.add_argument("--base_url", help="instead of --model: a chat server, http(s)://.../v1 (key: OPENAI_API_KEY)")
    parser.add_argument("--served_model", help="the model's name on that server; its chat template is the server's")
    parser.add_argument(
        "--benchmarks", default="stl", help="stl (the paper's four, over the network), a folder with them, or miniworld"
    )
    parser.add_argument("--num_beams", type=int, default=1, help="4 with --max_new_tokens 128 is STL's decoding")
    parser.add_argument("--per_benchmark", type=int, default=None, help="only the first so many prompts of each")
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="NAME",
        help="ask the toxic prompts under attack too: none, wrappers (or persona, fiction, ignore), prefix, prefill",
    )
    parser.add_argument("--prefix", help="for prefix: how the answer is begun (default: Sure, here is)")
    parser.add_argument(
        "--prefill_answers", help="for prefill: the responses-*.jsonl of a model that answers, such as plain SFT"
    )
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.base_url) or bool(args.base_url) != bool(args.served_model):
        parser.error("give either --model, or --base_url and --served_model")
    if args.base_url and {"prefix", "prefill"} & set(args.attacks or []):
        parser.error("a chat server begins its answers itself: no prefix and no prefill with --base_url")
    args.prompt_template = args.prompt_template or ("none" if args.base_url else "alpaca")

    if args.model:
        files.check_model(args.model, args.model_revision)

    from ..evaluation import rates, worlds
    from ..evaluation.answers import agreement, judge_answers, questions, read_or_ask
    from ..evaluation.served import generate_served
    from ..generation import Decoding, generate
    from ..judges import load
    from ..models import load_model

    asked_judges = [load.load_judge(name) for name in args.judges or [args.judge]]
    prompts = worlds.load(args.benchmarks).evaluation_prompts(per_benchmark=args.per_benchmark)
    if args.attacks:
        prompts = _attacked(prompts, args)
    decoding = Decoding(max_new_tokens=args.max_new_tokens, num_beams=args.num_beams, seed=args.seed)
    asked = questions(prompts, args.prompt_template)
    settings = {
        "model": files.model_identity(args.model) if args.model else args.served_model,
        "revision": args.model_revision,
        "prompts": files.content_hash(prompts["prompt"].tolist()),
        "prompt_template": args.prompt_template,
        "decoding": vars(decoding),
        "judges": [{"name": j.name, "revision": j.revision, "licence": j.licence} for j in asked_judges],
    }
    if args.base_url:
        settings["base_url"] = args.base_url
    if args.attacks:
        settings |= {"attacks": args.attacks, "asked": files.content_hash(asked)}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / f"responses-{files.content_hash(settings | {'judges': None})}.jsonl"

    def ask():
        if args.base_url:
            to = {"base_url": args.base_url, "model": args.served_model, "concurrency": args.batch_size}
            return generate_served(asked, **to, decoding=decoding, answers=args.output_dir / "served.jsonl")
        model, tokenizer = load_model(args.model, args.model_revision, dtype=args.dtype)
        return generate(model, tokenizer, asked, decoding=decoding, batch_size=args.batch_size)

    table = read_or_ask(prompts, ask, file)
    judged = judge_answers(table, asked_judges, cache=args.output_dir / "judgements")
    by = ["judge", *(["attack"] if args.attacks else []), "kind", "benchmark"]
    results = rates.rates_table(judged, by)
    results.to_csv(args.output_dir / "results.csv", index=False)
    files.write_json(args.output_dir / "manifest.json", settings | files.environment())
    print(results.to_string(index=False, float_format="{:.3f}".format))
    print("rate, low and high: share of harmful answers, Wilson 95 % interval")
    if len(asked_judges) > 1:
        agreed = agreement(judged)
        agreed.to_csv(args.output_dir / "agreement.csv", index=False)
        print(agreed.to_string(index=False, float_format="{:.3f}".format))
    print(f"results.csv, manifest.json and the answers (not redacted) are in {args.output_dir}")


def _attacked(prompts, args):
    """The prompts under the attacks of `--attacks`; answers to begin with come from `--prefill_answers`."""
    from .. import sources
    from ..evaluation import attacks, worlds
    from ..models import load_tokenizer

    answers = tokenizer = None
    if "prefill" in args.attacks:
        if args.prefill_answers is None:
            raise ValueError(
                "--attacks prefill needs --prefill_answers, the responses-*.jsonl of a model that answers."
            )
        rows = sources.read_rows(args.prefill_answers)
        if missing := {"prompt", "response"} - set(rows.column_names):
            raise ValueError(f"{args.prefill_answers}: lacks {', '.join(sorted(missing))}; give a responses-*.jsonl.")
        answers = {p: r for p, r in zip(rows["prompt"][:], rows["response"][:], strict=True) if r.strip()}
        tokenizer = load_tokenizer(args.model, args.model_revision)
    options = {"wrappers": worlds.load(args.benchmarks).wrappers, "prefix": args.prefix or attacks.PREFIX}
    return attacks.chosen(prompts, args.attacks, answers=answers, tokenizer=tokenizer, **options)
