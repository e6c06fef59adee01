"""`tasft doctor`: a check of training rows before they are used: repeats, leaks, wrong labels, cut answers."""

import argparse
import os
import sys
from pathlib import Path

from ..records.templates import TEMPLATES
from ..storage import files
from .flags import add_source, at_least, check_data, located, source_options
from .train_options import as_trl_has_it, read_config


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "tasft doctor", description="Check rows before training; exit code 1 when something must be fixed."
    )
    parser.add_argument("data", help="file, save_to_disk folder or hub id")
    parser.add_argument(
        "--label", choices=("true", "false"), default="false", help="of rows without a label column (default: false)"
    )
    add_source(parser, "the data")
    parser.add_argument("--evaluation_prompts", nargs="*", default=[], help="files of prompts that must not be asked")
    parser.add_argument("--tokenizer", help="model whose tokens are counted, with --max_length")
    parser.add_argument("--model_revision", help="commit of a tokenizer from the hub")
    parser.add_argument("--max_length", type=at_least(1), help="tokens that training keeps of a row")
    parser.add_argument("--prompt_template", choices=TEMPLATES, help="of training (default: alpaca)")
    parser.add_argument(
        "--config", type=Path, help="of `tasft train`, whose model, lengths and template are the default"
    )
    parser.add_argument("--show", type=at_least(0), default=0, help="show the tokens of so many unsafe and benign rows"
                        ", and which are learnt or penalised")  # fmt: skip
    parser.add_argument("--output", type=Path, help="write the report to this .md file")
    args = parser.parse_args(argv)
    config = _of_training(args)
    if args.show and args.tokenizer is None:
        raise ValueError("--show needs --tokenizer, or the --config of a training.")
    as_in_training = args.show or args.config is not None  # a length that is not said is training's own
    if (args.tokenizer is None) != (args.max_length is None) and not (as_in_training and args.tokenizer):
        raise ValueError("truncation needs both --tokenizer and --max_length; give both or none.")
    if args.output is not None:
        within = args.output.resolve().is_relative_to(Path(args.data).resolve())
        if args.output.suffix != ".md" or within:
            raise ValueError(f"{args.output}: the report is a .md file outside the data; choose another --output.")

    check_data(args.data)
    for file in args.evaluation_prompts:
        check_data(file, on_hub=False)
    if args.tokenizer is not None:
        args.tokenizer = located(args.tokenizer, args.model_revision)
    return _examine(args, config)


def _examine(args: argparse.Namespace, config: dict) -> int:
    """Print or write the report; returns the exit code. `config`: options of a training, or none."""
    from ..models import load_tokenizer
    from ..prepare import doctor
    from ..records import forms

    if args.tokenizer is not None and args.max_length is None:
        from ..config import TASFTConfig

        args.max_length = config.get("max_length", TASFTConfig.max_length)
    tokenizer = args.tokenizer and load_tokenizer(args.tokenizer, args.model_revision)
    # The trainer gives the tokenizer the template of chat_template_path itself; checks need it at once.
    checked_by = tokenizer and as_trl_has_it(tokenizer, args.chat_template_path)
    if args.show:
        _show(args, config, tokenizer, checked_by)
    diagnosis = doctor.examine(
        args.data,
        **source_options(args),
        template=args.prompt_template,
        label=args.label == "true",
        evaluation_prompts={file: forms.read_prompts(file) for file in args.evaluation_prompts},
        tokenizer=None if args.max_length is None else checked_by,  # without a limit nothing is cut
        max_length=args.max_length,
    )
    if args.output is None:
        print(doctor.report(diagnosis), end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(args.output, doctor.report(diagnosis))
        print(diagnosis)
    return 0 if diagnosis.is_fit else 1


def _of_training(args: argparse.Namespace) -> dict:
    """What the --config of a training says; the flags that were not given get its values."""
    config = {} if args.config is None else read_config(args.config)
    for flag, option in (("tokenizer", "model_name_or_path"), ("prompt_template", "prompt_template")):
        if getattr(args, flag) is None:
            setattr(args, flag, config.get(option))
    args.model_revision = args.model_revision or config.get("model_revision")
    args.chat_template_path = config.get("chat_template_path")
    args.prompt_template = args.prompt_template or "alpaca"
    return config


def _show(args: argparse.Namespace, config: dict, tokenizer, checked_by) -> None:
    """Print the masks of the first rows, as the trainer itself makes them; only here a command prints texts."""
    from ..prepare.masks import OPTIONS, first_of_each, masks
    from ..records import data, forms, sources, tokens

    raw = sources.read_rows(args.data, **source_options(args))
    rows = forms.to_training_rows(
        raw,
        label=None if "label" in raw.column_names else args.label == "true",
        template=args.prompt_template,
        source=args.data,
        drop_empty=True,
        with_place=True,
    )
    options = {name: config[name] for name in OPTIONS if name in config} | {"max_length": args.max_length}
    rows = first_of_each(rows, args.show)
    if options.get("penalty") == "recover":
        data.require_recoveries(data.by_label(rows)[1])
    tokens.prompt_lengths(rows, checked_by, source=args.data)  # messages that the template can't read are told by row
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for row in masks(rows, tokenizer, model=args.tokenizer, revision=args.model_revision, **options):
        print(row.text(colours=colours), end="\n\n")
