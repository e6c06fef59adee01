"""`tasft alpaca_eval`: the win rate of a model's answers against references, by an AlpacaEval annotator."""

import argparse
import os
from pathlib import Path

from ..storage import files, integrity
from .flags import MODEL, add_dtype, add_template, at_least, check_data, check_folder, located, template_of

MANIFEST = "alpaca_eval_manifest.json"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft alpaca_eval",
        description="AlpacaEval: alpaca_eval.csv. The annotator's key comes from the environment (OPENAI_API_KEY; "
        "OPENAI_BASE_URL for another server). What it will ask is told first, and nothing is asked beyond the limits. "
        "Run it again to go on where it stopped.",
    )
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--model_revision", help="commit of a hub id")
    add_dtype(parser)
    parser.add_argument("--name", help="of the model in the table (default: the last part of --model)")
    parser.add_argument("--references", required=True, help="file of instruction and output: AlpacaEval's 805 (JSON)")
    parser.add_argument("--annotator", required=True, help="a name that alpaca_eval knows, or a YAML file")
    add_template(parser)
    parser.add_argument("--limit", type=at_least(1), help="only the first so many instructions")
    parser.add_argument(
        "--length_controlled",
        action="store_true",
        help="also the win rate at the references' length; takes AlpacaEval's 805 and a file of the hub",
    )
    parser.add_argument("--max_new_tokens", type=at_least(1), default=256)
    parser.add_argument("--batch_size", type=at_least(1), default=32)
    parser.add_argument("--price_per_million_in", type=float, help="of the annotator's tokens, in your currency")
    parser.add_argument("--price_per_million_out", type=float)
    parser.add_argument("--max_cost", type=float, help="stop before anything is asked that may cost more; needs prices")
    parser.add_argument(
        "--max_calls", type=at_least(0), help="stop before anything is asked if there are more (0: estimate)"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    prices = (args.price_per_million_in, args.price_per_million_out)
    if (prices.count(None) == 1) or (args.max_cost is not None and None in prices):
        parser.error("give both prices; --max_cost needs them")

    args.model = located(args.model, args.model_revision)
    check_data(args.references)
    with integrity.folder_lock(args.output_dir):
        _evaluate(args)


def _evaluate(args: argparse.Namespace) -> None:
    from ..evaluation import alpaca
    from ..generation import Decoding
    from ..models import load_tokenizer

    annotator = alpaca.read_annotator(args.annotator)
    references = _references(args)
    decoding = Decoding(max_new_tokens=args.max_new_tokens)
    template = template_of(args, args.model, load_tokenizer(args.model, args.model_revision))
    optional = {
        "dtype": None if args.dtype == "auto" else args.dtype,
        "chat_template_kwargs": args.chat_template_kwargs,
    }
    settings = {
        "model": files.model_identity(args.model),
        "revision": args.model_revision,
        "prompt_template": template,
        "decoding": vars(decoding),
        # not of the references: with another --limit the first answers stay
    } | {name: value for name, value in optional.items() if value}
    check_folder(args.output_dir / MANIFEST, dict.fromkeys(optional) | settings)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    answers_file = args.output_dir / f"answers-{files.content_hash(settings)}.jsonl"
    # Another judge is asked anew, though it has the same name.
    folder = args.output_dir / f"annotator-{annotator.identity}"
    answers = _read_answers(answers_file)
    outputs = [_output(answers, row) for row in references]
    unanswered = [row["instruction"] for row in references if row["instruction"] not in answers]
    if unanswered:
        print(f"{len(unanswered)} of {len(references)} instructions to answer first; without these answers, at least:")
    plan = alpaca.alpaca_eval_plan(outputs, references, annotator=annotator, folder=folder)
    _tell(plan, annotator, args)
    _check_key(annotator, plan)
    if unanswered:
        _answer(args, template, unanswered, answers, answers_file, decoding)
        outputs = [_output(answers, row) for row in references]
        plan = alpaca.alpaca_eval_plan(outputs, references, annotator=annotator, folder=folder)
        _tell(plan, annotator, args)
    name = args.name or Path(args.model).name
    options = {"annotators_config": annotator.config, "length_controlled": args.length_controlled}
    table = alpaca.alpaca_eval_score(outputs, references, name=name, folder=folder, **options)
    table = table.rename(columns={"model": "name"}).assign(annotator=annotator.name, judge_model=annotator.models)
    files.write_text(args.output_dir / "alpaca_eval.csv", table.to_csv(index=False))
    record = settings | {
        "references": files.content_hash(references),
        "instructions": len(references),
        "annotator": annotator.name,
        "annotator_identity": annotator.identity,
        "judge_model": annotator.models,
        "asked": plan,
    }
    files.write_json(args.output_dir / MANIFEST, record | files.environment())
    print(table.to_string(index=False, float_format="{:.2f}".format))
    print("win_rate and stderr in percent; those of different annotators, judge models or references do not compare")
    print(f"alpaca_eval.csv, its manifest, answers and annotations (full text) are in {args.output_dir}")


def _references(args: argparse.Namespace) -> list[dict[str, str]]:
    """Rows of `instruction` and `output`, the first `--limit` of them."""
    from ..evaluation import alpaca
    from ..records import sources

    rows = sources.read_rows(args.references)
    if missing := {"instruction", "output"} - set(rows.column_names):
        raise ValueError(f"{args.references}: no column {missing.pop()}; it takes rows of instruction and output")
    if args.length_controlled and not alpaca.is_alpaca_eval(list(rows["instruction"])):
        raise ValueError(
            f"{args.references}: not AlpacaEval's 805 instructions in their order, the only ones whose difficulty is "
            "known; leave --length_controlled out"
        )
    return rows.select_columns(["instruction", "output"]).to_list()[: args.limit]


def _tell(plan: dict[str, int], annotator, args: argparse.Namespace) -> None:
    """Print what it will cost; raise ValueError where that is over a limit."""
    print(
        f"{annotator.name} ({annotator.models}): {plan['calls']} calls, {plan['known']} known already; about "
        f"{plan['tokens_in']:,} tokens in, at most {plan['tokens_out']:,} out"
    )
    cost = None
    if args.price_per_million_in is not None:
        cost = (plan["tokens_in"] * args.price_per_million_in + plan["tokens_out"] * args.price_per_million_out) / 1e6
        print(f"at your prices about {cost:.4g}")
    if args.max_calls is not None and plan["calls"] > args.max_calls:
        raise ValueError(f"{plan['calls']} calls, more than --max_calls {args.max_calls}: raise it, or use --limit")
    if args.max_cost is not None and cost > args.max_cost:
        raise ValueError(f"about {cost:.4g}, more than --max_cost {args.max_cost:g}: raise it, or use --limit")


def _check_key(annotator, plan: dict[str, int]) -> None:
    if annotator.asks_openai and plan["calls"] and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(f"annotator {annotator.name} asks an OpenAI server: export OPENAI_API_KEY")


def _output(answers: dict[str, str], row: dict[str, str]) -> str:
    """What the annotator is shown: the answer after its thinking."""
    from ..records.templates import split_thinking

    return split_thinking(answers.get(row["instruction"], ""))[1]


def _answer(args, template: str, instructions: list[str], answers: dict[str, str], file: Path, decoding) -> None:
    """Add the model's answers to `answers` and `file`; each batch is kept beside it until all are there."""
    from ..generation import generate
    from ..models import load_model
    from ..records import templates

    model, tokenizer = load_model(args.model, args.model_revision, dtype=args.dtype)
    asked = templates.ask(instructions, template, tokenizer, chat_template_kwargs=args.chat_template_kwargs)
    partial = file.with_name(f"partial-{file.name}")
    options = {"batch_size": args.batch_size, "special_tokens": template != "chat", "answers": partial}
    made = generate(model, tokenizer, asked, decoding=decoding, **options)
    new = {i: answer.text for i, answer in zip(instructions, made, strict=True)}
    answers |= new
    files.append_records(file, (files.checked({"instruction": i, "output": o}) for i, o in new.items()))
    partial.unlink(missing_ok=True)


def _read_answers(file: Path) -> dict[str, str]:
    """Instruction -> answer; what a kill has torn or a fault has changed is not among them, and is asked again."""
    rows = files.read_records(file)
    return {row["instruction"]: row["output"] for row in rows if {"instruction", "output"} <= row.keys()}
