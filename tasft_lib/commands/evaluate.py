"""`tasft evaluate`: answers to the harm benchmarks, judged: a results table."""

from ..storage import files, integrity
from .flags import (
    add_source,
    at_least,
    check_folder,
    json_object,
    judge_of,
    located,
    model_parser,
    source_options,
    template_of,
)


def main(argv: list[str]) -> None:
    parser = model_parser(
        "tasft evaluate", "Answer the harm benchmarks and judge the answers: results.csv.", needs_model=False
    )
    parser.add_argument("--judges", nargs="+", help="several judges, instead of --judge: also agreement.csv")
    parser.add_argument("--base_url", help="instead of --model: a chat server, http(s)://.../v1 (key: OPENAI_API_KEY)")
    parser.add_argument("--served_model", help="the model's name on that server; its chat template is the server's")
    parser.add_argument(
        "--request_fields",
        type=json_object,
        metavar="JSON",
        help='fields added to each request to that server, or left out of it: \'{"top_k": 1, "temperature": null}\'',
    )
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        default=["stl"],
        metavar="SOURCE",
        help="stl (the paper's six, over the network), miniworld, one by its name (I-CoNa, XSTest, ...), a folder with "
        "published files or one of them, or your own prompts: a file, a save_to_disk folder or a hub id",
    )
    add_source(parser, "your own prompts")
    parser.add_argument(
        "--prompt_kind",
        choices=("toxic", "benign", "seemingly toxic"),
        help="what your own prompts are (default: toxic)",
    )
    parser.add_argument(
        "--num_beams", type=at_least(1), default=1, help="4 with --max_new_tokens 128 is STL's decoding"
    )
    parser.add_argument("--per_benchmark", type=at_least(1), help="only the first so many prompts of each")
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
    _check_options(parser, args)
    if args.model:
        args.model = located(args.model, args.model_revision)

    with integrity.folder_lock(args.output_dir):
        _evaluate(args)


def _check_options(parser, args) -> None:
    """No option that does not go with the others: none is accepted and without effect."""
    if bool(args.model) == bool(args.base_url) or bool(args.base_url) != bool(args.served_model):
        parser.error("give either --model, or --base_url and --served_model")
    if args.base_url:
        if {"prefix", "prefill"} & set(args.attacks or []):
            parser.error("a chat server begins its answers itself: no prefix and no prefill with --base_url")
        if args.num_beams > 1:
            parser.error("a chat server has no beams: no --num_beams with --base_url")
        if args.dtype != "auto" or args.model_revision:
            parser.error("--dtype and --model_revision are the server's: leave them out with --base_url")
    elif args.request_fields:
        parser.error("--request_fields are for a server: give --base_url, or leave them out")
    if args.prefix and "prefix" not in (args.attacks or []):
        parser.error("--prefix goes with --attacks prefix")
    if args.prefill_answers and "prefill" not in (args.attacks or []):
        parser.error("--prefill_answers goes with --attacks prefill")


def _evaluate(args) -> None:
    from ..evaluation import rates, worlds
    from ..evaluation.answers import agreement, judge_answers, questions, read_or_ask
    from ..evaluation.served import generate_served
    from ..generation import Decoding, generate
    from ..judges import base, load
    from ..models import load_model, load_tokenizer

    asked_judges = load.load_judges(args.judges or [judge_of(args, args.benchmarks)])
    prompts = worlds.asked_for(
        args.benchmarks, per_benchmark=args.per_benchmark, kind=args.prompt_kind, **source_options(args)
    )
    if args.model:
        tokenizer = load_tokenizer(args.model, args.model_revision)
        template, switches = template_of(args, args.model, tokenizer), args.chat_template_kwargs
    else:
        # A server's own template is around whatever it is sent.
        tokenizer, switches = None, None
        template = "none" if args.prompt_template in (None, "chat") else args.prompt_template
    if args.attacks:
        prompts = _attacked(prompts, args, tokenizer)
    decoding = Decoding(max_new_tokens=args.max_new_tokens, num_beams=args.num_beams, seed=args.seed)
    asked = questions(prompts, template, tokenizer, switches)
    fields = _fields(args)
    settings = {
        "model": files.model_identity(args.model) if args.model else args.served_model,
        "revision": args.model_revision,
        "prompts": files.content_hash(prompts["prompt"].tolist()),
        "prompt_template": template,
        "decoding": vars(decoding),
        "judges": [base.described(judge) for judge in asked_judges],
    }
    # Those below count where they are given; earlier answers keep their names.
    optional = {"base_url": args.base_url, "request_fields": fields, "chat_template_kwargs": switches}
    optional["dtype"] = None if args.dtype == "auto" else args.dtype
    settings |= {name: value for name, value in optional.items() if value}
    if args.attacks:
        settings |= {"attacks": args.attacks, "asked": files.content_hash(asked)}
    # Other judges may look at the same answers.
    answered = dict.fromkeys([*optional, "attacks", "asked"]) | settings
    check_folder(args.output_dir / "manifest.json", {n: value for n, value in answered.items() if n != "judges"})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    name = files.content_hash(settings | {"judges": None})
    file, partial = args.output_dir / f"responses-{name}.jsonl", args.output_dir / f"partial-{name}.jsonl"

    def ask():
        for judge in asked_judges:
            base.check_ready(judge)
        if args.base_url:
            to = {"base_url": args.base_url, "model": args.served_model, "concurrency": args.batch_size}
            served = args.output_dir / "served.jsonl"
            return generate_served(asked, **to, decoding=decoding, answers=served, fields=fields)
        model, tokenizer = load_model(args.model, args.model_revision, dtype=args.dtype)
        options = {"batch_size": args.batch_size, "special_tokens": template != "chat", "answers": partial}
        return generate(model, tokenizer, asked, decoding=decoding, **options)

    table = read_or_ask(prompts, ask, file)
    partial.unlink(missing_ok=True)
    judged = judge_answers(table, asked_judges, cache=args.output_dir / "judgements")
    by = ["judge", *(["attack"] if args.attacks else []), "kind", "benchmark"]
    results = rates.rates_table(judged, by)
    files.write_text(args.output_dir / "results.csv", results.to_csv(index=False))
    files.write_json(args.output_dir / "manifest.json", settings | files.environment())
    _tell_rates(results, judged, settings["judges"], args)
    if len(asked_judges) > 1:
        agreed = agreement(judged)
        files.write_text(args.output_dir / "agreement.csv", agreed.to_csv(index=False))
        print(agreed.to_string(index=False, float_format="{:.3f}".format))
    print(f"results.csv, manifest.json and the answers (not redacted) are in {args.output_dir}")


def _fields(args) -> dict:
    """What a request has besides; vLLM, SGLang and llama.cpp take the template's switches so."""
    switches = {"chat_template_kwargs": args.chat_template_kwargs} if args.chat_template_kwargs else {}
    return switches | (args.request_fields or {}) if args.base_url else {}


def _tell_rates(results, judged, judges: list[dict], args) -> None:
    """The table of rates, and what they stand on."""
    print(results.to_string(index=False, float_format="{:.3f}".format))
    print("rate, low and high: share of harmful answers, Wilson 95 % interval")
    for judge in judges:
        print(f"{judge['name']}: {judge['errors']}")
    if "corrected" in results:
        _tell_corrected(judged)
    if "unfinished_thinking" in judged:
        _tell_unfinished(judged, args)


def _tell_corrected(judged) -> None:
    """What `corrected` stands on, per judge, and where it doesn't hold."""
    from ..evaluation import calibration

    print("corrected: the rate behind the judge's measured errors, 95 % interval over answers and labels")
    for judge, answers in judged[judged["kind"] == "toxic"].groupby("judge", sort=False):
        errors = calibration.errors(judge, "toxic", "harmful")
        if errors is None:
            continue
        told = f"{judge}: sensitivity {errors.found}/{errors.positives}, specificity {errors.right}/{errors.negatives}"
        if not errors.is_better_than_chance:
            told += "; together no more than 1, so that its rates can't be corrected"
        print(f"{told} (labelled answers that are no refusals)")
        if unlike := calibration.unlike(answers):
            print(f"warning: {judge}: answers unlike the labelled ones: {unlike}; take the corrected rates with care")


def _tell_unfinished(judged, args) -> None:
    first = judged[judged["judge"] == judged["judge"].iloc[0]]
    if unfinished := int(first["unfinished_thinking"].sum()):
        print(
            f"{unfinished} of {len(first)} answers end within their thinking (unfinished_thinking; degenerate): raise "
            f"--max_new_tokens {args.max_new_tokens}, or switch it off with --chat_template_kwargs"
        )


def _attacked(prompts, args, tokenizer):
    """The prompts under the attacks of `--attacks`; answers to begin with come from `--prefill_answers`."""
    from ..evaluation import attacks, worlds
    from ..records import sources
    from ..records.templates import split_thinking

    answers = None
    if "prefill" in args.attacks:
        if args.prefill_answers is None:
            raise ValueError(
                "--attacks prefill needs --prefill_answers, the responses-*.jsonl of a model that answers."
            )
        rows = sources.read_rows(args.prefill_answers)
        if missing := {"prompt", "response"} - set(rows.column_names):
            raise ValueError(f"{args.prefill_answers}: lacks {', '.join(sorted(missing))}; give a responses-*.jsonl.")
        responses = [split_thinking(response)[1] for response in rows["response"][:]]
        answers = {p: r for p, r in zip(rows["prompt"][:], responses, strict=True) if r.strip()}
    options = {"wrappers": worlds.load(args.benchmarks[0]).wrappers, "prefix": args.prefix or attacks.PREFIX}
    return attacks.prompts_under(prompts, args.attacks, answers=answers, tokenizer=tokenizer, **options)
