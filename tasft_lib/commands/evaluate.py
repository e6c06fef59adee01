"""`tasft evaluate`: answers to the harm benchmarks, judged: a results table."""

from .models import load_model, model_parser


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
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.base_url) or bool(args.base_url) != bool(args.served_model):
        parser.error("give either --model, or --base_url and --served_model")
    args.prompt_template = args.prompt_template or ("none" if args.base_url else "alpaca")

    import pandas as pd

    from .. import benchmarks, data, judges, metrics, provenance
    from ..generation import Decoding, generate
    from ..served import generate_served

    asked_judges = [judges.load_judge(name) for name in args.judges or [args.judge]]
    prompts = benchmarks.evaluation_prompts(args.benchmarks, per_benchmark=args.per_benchmark)
    decoding = Decoding(max_new_tokens=args.max_new_tokens, num_beams=args.num_beams, seed=args.seed)
    settings = {
        "model": provenance.model_identity(args.model) if args.model else args.served_model,
        "revision": args.model_revision,
        "prompts": provenance.content_hash(prompts["prompt"].tolist()),
        "prompt_template": args.prompt_template,
        "decoding": vars(decoding),
        "judges": [{"name": j.name, "revision": j.revision, "licence": j.licence} for j in asked_judges],
    }
    if args.base_url:
        settings["base_url"] = args.base_url
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / f"responses-{provenance.content_hash(settings | {'judges': None})}.jsonl"
    if not file.exists():  # the same model and settings were answered before
        asked = [data.format_prompt(prompt, template=args.prompt_template) for prompt in prompts["prompt"]]
        if args.base_url:
            to = {"base_url": args.base_url, "model": args.served_model, "concurrency": args.batch_size}
            answers = generate_served(asked, **to, decoding=decoding, answers=args.output_dir / "served.jsonl")
        else:
            model, tokenizer = load_model(args)
            answers = generate(model, tokenizer, asked, decoding=decoding, batch_size=args.batch_size)
        table = prompts.assign(response=[a.text for a in answers], finished=[a.finished for a in answers])
        provenance.write_text(file, table.to_json(orient="records", lines=True, force_ascii=False))
    table = pd.read_json(file, orient="records", lines=True, dtype=False)
    judged = []
    for judge in asked_judges:
        asked = (table["prompt"].tolist(), table["response"].tolist())
        found = judges.judge_responses(judge, *asked, cache=args.output_dir / "judgements.jsonl")
        judged.append(table.assign(judge=judge.name, label=[j.label for j in found], score=[j.score for j in found]))
    results = metrics.rates_table(pd.concat(judged), ["judge", "kind", "benchmark"])
    results.to_csv(args.output_dir / "results.csv", index=False)
    provenance.write_json(args.output_dir / "manifest.json", settings | provenance.environment())
    print(results.to_string(index=False, float_format="{:.3f}".format))
    print("rate, low and high: share of harmful answers, Wilson 95 % interval")
    if len(asked_judges) > 1:
        from ..agreement import agreement_table

        labels = pd.DataFrame({rows["judge"].iloc[0]: rows["label"].tolist() for rows in judged})
        agreement = agreement_table(labels)
        agreement.to_csv(args.output_dir / "agreement.csv", index=False)
        print(agreement.to_string(index=False, float_format="{:.3f}".format))
    print(f"results.csv, manifest.json and the answers (not redacted) are in {args.output_dir}")
