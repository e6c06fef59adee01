"""`tasft doctor`: a check of training rows before they are used: repeats, leaks, wrong labels, cut answers."""

import argparse
from pathlib import Path

from .. import files
from ..templates import TEMPLATES
from .flags import add_source, check_data, source_options


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "tasft doctor", description="Check rows before training; exit code 1 when something must be fixed."
    )
    parser.add_argument("data", help="file, save_to_disk folder or hub id; without a label column all rows are unsafe")
    add_source(parser, "the data")
    parser.add_argument("--evaluation_prompts", nargs="*", default=[], help="files of prompts that must not be asked")
    parser.add_argument("--tokenizer", help="model whose tokens are counted, with --max_length")
    parser.add_argument("--model_revision", help="commit of a tokenizer from the hub")
    parser.add_argument("--max_length", type=int, help="tokens that training keeps of a row")
    parser.add_argument("--prompt_template", default="alpaca", choices=TEMPLATES)
    parser.add_argument("--output", type=Path, help="write the report to this .md file")
    args = parser.parse_args(argv)
    if (args.tokenizer is None) != (args.max_length is None):
        raise ValueError("truncation needs both --tokenizer and --max_length; give both or none.")
    if args.output is not None:
        within = args.output.resolve().is_relative_to(Path(args.data).resolve())
        if args.output.suffix != ".md" or within:
            raise ValueError(f"{args.output}: the report is a .md file outside the data; choose another --output.")

    check_data(args.data)
    for file in args.evaluation_prompts:
        check_data(file, on_hub=False)
    if args.tokenizer is not None:
        files.check_model(args.tokenizer, args.model_revision)

    from .. import data
    from ..models import load_tokenizer
    from ..prepare import doctor

    diagnosis = doctor.examine(
        args.data,
        **source_options(args),
        template=args.prompt_template,
        evaluation_prompts={file: data.read_prompts(file) for file in args.evaluation_prompts},
        tokenizer=args.tokenizer and load_tokenizer(args.tokenizer, args.model_revision),
        max_length=args.max_length,
    )
    if args.output is None:
        print(doctor.report(diagnosis), end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(args.output, doctor.report(diagnosis))
        print(diagnosis)
    return 0 if diagnosis.is_fit else 1
