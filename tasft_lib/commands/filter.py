"""`tasft filter`: a fine-tuning set without the rows that look harmful, and those rows (SAFT)."""

import argparse
from pathlib import Path

from ..records.templates import TEMPLATES
from ..storage import files, integrity
from .flags import MODEL, add_drop_empty, add_dtype, add_source, check_data, located, own_template, source_options


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft filter",
        description="SAFT (arXiv:2410.10014): rows whose activations stand out along the first singular vectors are "
        "thought harmful. Writes kept and dropped rows with their scores (`tasft train` reads both: --dataset_name and "
        "--unsafe_dataset_name), report.md, a histogram and the filter. Run it again to go on where it stopped.",
    )
    parser.add_argument("data", help=".json, .jsonl, .csv, .tsv or .parquet file, save_to_disk folder or hub id; "
                        "a `label` (false: harmful) is compared with the result, kept as `original_label`")  # fmt: skip
    add_source(parser, "the data", revision="--dataset_revision")
    parser.add_argument("--model", required=True, help=f"the one to be tuned: {MODEL}")
    parser.add_argument("--model_revision", help="commit of a hub id")
    add_dtype(parser)
    parser.add_argument("--load_in_4bit", action="store_true")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--contamination", type=float, help="expected share of harmful rows: so many are dropped")
    how.add_argument("--threshold", type=float, help="score above which a row is dropped")
    parser.add_argument("--validation", help="some rows with `label` (false: harmful), which choose layer, pooling and "
                        "directions, and without the options above the threshold; harmful ones alone will do, with "
                        "--contamination")  # fmt: skip
    add_source(parser, "--validation", prefix="validation_")
    parser.add_argument("--layer", type=int, help="from 1 (default: the middle one)")
    parser.add_argument("--pooling", choices=("last", "mean"), help="over tokens (default: last)")
    parser.add_argument("--n_directions", type=int, help="singular vectors of the score (default: 4)")
    parser.add_argument("--steer", type=float, default=0.0, help="-1 to 1: drop less or more than that threshold says")
    parser.add_argument("--prompt_template", choices=TEMPLATES, help="of text; chat makes messages of it (default: "
                        "the one in the model's tasft.json, else alpaca, as in training)")  # fmt: skip
    add_drop_empty(parser)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, help="tokens read of a row (default: the model's context)")
    parser.add_argument("--activations", type=Path, help="folder that keeps them, for other thresholds (default: in "
                        "--output_dir)")  # fmt: skip
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.contamination is args.threshold is args.validation is None:
        parser.error("one of --contamination, --threshold and --validation is needed")
    for name in ("batch_size", "max_length"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name}={value}: give 1 or more.")

    check_data(args.data)
    if args.validation is not None:
        check_data(args.validation)
    args.model = located(args.model, args.model_revision)
    with integrity.folder_lock(args.output_dir):
        _filter(args)


def _filter(args) -> None:
    from ..models import load_model
    from ..records import forms, sources
    from ..saft.find import Search
    from ..saft.report import Output
    from ..saft.workflow import filter_rows

    in_validation = source_options(args, "validation_")
    if in_validation["split"] is None and args.validation and not Path(args.validation).expanduser().is_file():
        in_validation["split"] = args.split
    how = {
        name: getattr(args, name)
        for name in ("contamination", "threshold", "layer", "pooling", "n_directions", "steer")
    }
    rows = sources.read_rows(args.data, **source_options(args))
    has_label = "label" in rows.column_names
    # Not "chat" for every model that has such a template: `tasft train` reads these rows, too, without it.
    template = args.prompt_template or own_template(args.model, args.model_revision, None)
    reading = {"template": template, "drop_empty": args.drop_empty}
    texts = forms.to_training_rows(
        rows, label=None if has_label else True, source=args.data, with_place=True, **reading
    )
    rows = rows.select([number - 1 for number in forms.row_numbers(texts)])  # those with an answer
    if has_label and "original_label" in rows.column_names:
        raise ValueError(f"{args.data}: has both label and original_label; remove or rename one.")
    validation = args.validation and forms.read_training_rows(
        args.validation, **in_validation, label=None, with_place=True, **reading
    )
    search = Search(**how, validation=validation)
    search.check(len(rows))
    settings = {
        "data": _content(args.data, **source_options(args)),
        "validation": args.validation and _content(args.validation, **in_validation),
        "model": files.model_identity(args.model),
        "model_revision": args.model_revision,
        "dtype": args.dtype,
        "load_in_4bit": args.load_in_4bit,
        "prompt_template": template,
        "max_length": args.max_length,
        **how,
    } | ({"drop_empty": True} if args.drop_empty else {})
    output = Output(args.output_dir, args.data, settings)
    if output.is_finished():
        print((output.folder / "report.md").read_text(encoding="utf-8"))
        print(f"{output.folder} holds this result already; nothing was computed")
        return

    page = filter_rows(
        rows.rename_column("label", "original_label") if has_label else rows,
        texts,
        search,
        lambda: load_model(args.model, args.model_revision, dtype=args.dtype, load_in_4bit=args.load_in_4bit),
        output=output,
        draw=lambda table, saft: _draw_scores(table, saft, len(rows), output.folder),
        source=_name(args.data),
        model_name=_name(args.model),
        model_revision=args.model_revision,
        harmful=[not label for label in texts["label"][:]] if has_label else None,
        max_length=args.max_length,
        batch_size=args.batch_size,
        activations=args.activations,
    )
    print(page)
    kept, dropped = output.parts
    scores = "scores.png" if (output.folder / "scores.png").exists() else "scores.csv"
    print(f"{kept.name}, {dropped.name} (text and all), report.md and {scores} are in {output.folder}")


def _draw_scores(table, saft, n_rows: int, folder: Path) -> None:
    """scores.png and scores.csv, of a `histogram`; the table alone where nothing is installed that draws."""
    try:
        from ..reporting import figures
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "seaborn"):
            raise
        files.write_text(folder / "scores.csv", table.to_csv(index=False, float_format="%.6g"))
        print(
            f"scores.png is not drawn, {error.name} is not installed: pip install 'tasft[notebooks]', remove "
            f"{folder / 'manifest.json'} and run the same command"
        )
        return
    caption = f"{n_rows:,} rows by their SAFT score, threshold from {saft.threshold_from}."
    figure = figures.plot_scores(table, saft.threshold, caption=caption)
    figures.save_figure(figure, folder, "scores", table)


def _content(source: str, split: str | None, name: str | None, revision: str | None) -> str:
    """What was read: a hash of the file or folder, or the hub's commit."""
    from ..storage.files import file_hash

    path = Path(source).expanduser()
    if path.exists():
        return f"{file_hash(path)} {split or 'train' if path.is_dir() else ''}".strip()
    return f"{source}@{revision}/{f'{name}/' if name else ''}{split or 'train'}"


def _name(source: str) -> str:
    """A hub id as it is, a path without its folders."""
    return Path(source).name if Path(source).expanduser().exists() else source
