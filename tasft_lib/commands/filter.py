"""`tasft filter`: a fine-tuning set without the rows that look harmful, and those rows (SAFT)."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..models import load_model


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft filter",
        description="SAFT (arXiv:2410.10014): rows whose activations stand out along the first singular vectors are "
        "thought harmful. Writes kept and dropped rows with their scores (`tasft train` reads both: --dataset_name and "
        "--unsafe_dataset_name), report.md, a histogram and the filter. Run it again to go on where it stopped.",
    )
    parser.add_argument("data", help=".json, .jsonl, .csv or .parquet file, save_to_disk folder or hub id; a `label` "
                        "(false: harmful) is compared with the result and kept as `original_label`")  # fmt: skip
    parser.add_argument("--dataset_revision", help="commit of a hub data set")
    parser.add_argument("--split", default="train", help="of a hub data set or folder (default: train)")
    parser.add_argument("--model", required=True, help="folder of a model or adapter, or a hub id: the one to be tuned")
    parser.add_argument("--model_revision", help="commit of a hub id")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--load_in_4bit", action="store_true")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--contamination", type=float, help="expected share of harmful rows: so many are dropped")
    how.add_argument("--threshold", type=float, help="score above which a row is dropped")
    parser.add_argument("--validation", help="some rows with `label` (false: harmful), which choose layer, pooling and "
                        "directions, and without the options above the threshold; harmful ones alone will do, with "
                        "--contamination")  # fmt: skip
    parser.add_argument("--validation_revision", help="commit of a hub data set")
    parser.add_argument("--layer", type=int, help="from 1 (default: the middle one)")
    parser.add_argument("--pooling", choices=("last", "mean"), help="over tokens (default: last)")
    parser.add_argument("--n_directions", type=int, help="singular vectors of the score (default: 4)")
    parser.add_argument("--steer", type=float, default=0.0, help="-1 to 1: drop less or more than that threshold says")
    parser.add_argument("--prompt_template", default="alpaca", choices=("alpaca", "short", "none"))
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

    from .. import data, files
    from ..reporting import figures
    from ..saft import find, report
    from ..saft.activations import context_length, token_lengths

    suffix = output_suffix(args.data)
    outputs = [args.output_dir / f"{name}{suffix}" for name in ("kept", "dropped")]
    _spare_the_input(args.data, args.output_dir, outputs)
    rows = data.read_rows(args.data, split=args.split, revision=args.dataset_revision)
    labelled = "label" in rows.column_names
    texts = data.to_training_rows(
        rows, label=None if labelled else True, template=args.prompt_template, source=args.data
    )
    harmful = [not label for label in texts["label"][:]] if labelled else None
    validation = None
    if args.validation is not None:
        validation = data.to_training_rows(
            data.read_rows(args.validation, split=args.split, revision=args.validation_revision),
            label=None,
            template=args.prompt_template,
            source=args.validation,
        )
    chosen = {
        name: getattr(args, name)
        for name in ("contamination", "threshold", "layer", "pooling", "n_directions", "steer")
    }
    find.check_settings(len(rows), **chosen, validation=validation)
    if labelled:
        if "original_label" in rows.column_names:
            raise ValueError(f"{args.data}: has both label and original_label; remove or rename one.")
        rows = rows.rename_column("label", "original_label")

    settings = {
        "data": _content(args.data, args.dataset_revision, args.split),
        "validation": args.validation and _content(args.validation, args.validation_revision, args.split),
        "model": files.model_identity(args.model),
        "model_revision": args.model_revision,
        "dtype": args.dtype,
        "load_in_4bit": args.load_in_4bit,
        "prompt_template": args.prompt_template,
        "max_length": args.max_length,
        **chosen,
    }
    if _is_finished(args.output_dir, settings, outputs):
        print((args.output_dir / "report.md").read_text(encoding="utf-8"))
        print(f"{args.output_dir} holds this result already; nothing was computed")
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    files.write_json(args.output_dir / "settings.json", settings)

    model, tokenizer = load_model(args.model, args.model_revision, dtype=args.dtype, load_in_4bit=args.load_in_4bit)
    found, scores = find.find_harmful(
        model,
        tokenizer,
        texts,
        **chosen,
        validation=validation,
        max_length=args.max_length,
        batch_size=args.batch_size,
        folder=args.activations or args.output_dir / "activations",
    )
    kept, dropped = found.filter(rows, scores)
    for part, path in zip((kept, dropped), outputs, strict=True):
        report.save_rows(part, path)
    found.save(args.output_dir)
    table = report.histogram(scores, found.threshold, harmful)
    caption = f"{len(rows):,} rows by their SAFT score, threshold from {found.threshold_from}."
    figures.save_figure(figures.plot_scores(table, found.threshold, caption=caption), args.output_dir, "scores", table)
    text = report.report(
        found,
        scores,
        texts,
        token_lengths(tokenizer, texts),
        source=_name(args.data),
        model=_name(args.model) + (f" at {args.model_revision}" if args.model_revision else ""),
        max_length=args.max_length or context_length(model),
        contamination=args.contamination,
        harmful=harmful,
    )
    files.write_text(args.output_dir / "report.md", text)
    manifest = {
        "settings": settings,
        "data": _name(args.data),
        "model": _name(args.model),
        "rows": data.fingerprint(texts),
        "n_rows": len(rows),
        "n_dropped": len(dropped),
        "batch_size": args.batch_size,
        "layer": found.layer,
        "pooling": found.pooling,
        "n_directions": len(found.directions),
        "threshold": str(found.threshold),
        "directions_from": found.directions_from,
        "threshold_from": found.threshold_from,
        "chosen_with_labels": found.chosen_with_labels,
    }
    files.write_json(args.output_dir / "manifest.json", manifest | files.environment())
    print(text)
    print(f"{outputs[0].name}, {outputs[1].name} (text and all), report.md and scores.png are in {args.output_dir}")


def output_suffix(source: str) -> str:
    """Of the files written: that of the input without a compression; none for folders and hub ids."""
    path = Path(source)
    if path.is_dir():
        return ""
    suffix = next((s for s in reversed(path.suffixes) if s.lower() not in (".gz", ".xz")), "").lower()
    return suffix if suffix in (".json", ".jsonl", ".csv", ".parquet") else ""


def _spare_the_input(source: str, output_dir: Path, outputs: list[Path]) -> None:
    path = Path(source).expanduser()
    if not path.exists():
        return
    for output in outputs:
        if output.resolve() == path.resolve() or (output.exists() and output.samefile(path)):
            raise ValueError(f"{output}: is the input itself; choose another --output_dir.")
    if path.is_dir() and path.resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
        raise ValueError(f"{output_dir}: lies in the input folder; choose another --output_dir.")


def _is_finished(folder: Path, settings: dict[str, Any], outputs: list[Path]) -> bool:
    """Whether the folder holds this result. Raises `ValueError` where it holds another one, or anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "settings.json").exists():
        raise ValueError(f"{folder}: holds other files; choose a new --output_dir.")
    if not (folder / "manifest.json").exists():
        return False
    try:
        theirs = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'manifest.json'}: not one of tasft filter; choose a new --output_dir.") from error
    ours = json.loads(json.dumps(settings))
    if theirs != ours:
        changed = ", ".join(name for name in ours if theirs.get(name) != ours[name])
        raise ValueError(f"{folder}: holds a result with another {changed}; choose a new --output_dir or remove it.")
    return all(path.exists() for path in (*outputs, folder / "report.md"))


def _content(source: str, revision: str | None, split: str) -> str:
    """What was read: a hash of the file or folder, or the hub's commit."""
    from ..files import file_hash

    path = Path(source).expanduser()
    return (
        f"{file_hash(path)} {split if path.is_dir() else ''}".strip()
        if path.exists()
        else f"{source}@{revision}/{split}"
    )


def _name(source: str) -> str:
    """A hub id as it is, a path without its folders."""
    return Path(source).name if Path(source).expanduser().exists() else source
