"""The card of a model: how it was trained and what was measured, from files; never a text, never a guess.

`card.md` beside this file is its template.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..records import data
from ..storage.files import RECORD, model_identity, read_adapter_config, whole
from ..text import markdown, rate_text, redact

MARK = "<!-- `tasft card` wrote this and writes over it; without this line it keeps its hands off -->"
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_length",
    "packing",
    "bf16",
    "seed",
)


def training_record(
    trainer, model_args, rows, sources: dict[str, str | None], *, template: str, unsafe_visits: int
) -> dict[str, Any]:
    """How a model was trained, for `tasft.json`: settings, counts and hashes; of what lies on this machine the name.

    Args:
        trainer: a `TASFTTrainer` that has trained.
        model_args: TRL's `ModelConfig`.
        rows: the rows trained on, as they were given to the trainer.
        sources: data set -> commit (None for what is no hub id).
    """
    args, labels = trainer.args, rows["label"][:]
    lora = getattr(trainer.model, "peft_config", {}).get("default")
    base = model_args.model_name_or_path
    return {
        "base_model": _public_name(base),
        "base_model_revision": None if Path(base).exists() else model_args.model_revision,
        "method": args.penalty_options | {"penalty_weight": trainer.penalty_weight},
        "penalty_weight_asked": args.penalty_weight,
        "benign_rows": labels.count(True),
        "unsafe_rows": labels.count(False) // unsafe_visits,
        "unsafe_visits": unsafe_visits,
        "rows_sha256": data.fingerprint(rows),
        "datasets": [
            {"name": _public_name(name), "hub": not Path(name).exists(), "revision": revision}
            for name, revision in sources.items()
        ],
        "prompt_template": template if isinstance(rows[0]["prompt"], str) else "chat",
        "lora": lora
        and {
            "r": lora.r,
            "alpha": lora.lora_alpha,
            "dropout": lora.lora_dropout,
            "target_modules": sorted(lora.target_modules)
            if isinstance(lora.target_modules, (set, list))
            else lora.target_modules,
        },
        "quantised": "4-bit" if model_args.load_in_4bit else "8-bit" if model_args.load_in_8bit else None,
        "dtype": model_args.dtype,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "training": {name: getattr(args, name) for name in SETTINGS},
    }


# What the card takes from a record that says how it was trained, and from the manifests of what was measured.
_TRAINED = {"method": dict, "benign_rows": int, "unsafe_rows": int, "rows_sha256": str, "prompt_template": str}
_TRAINED |= {"datasets": list, "training": dict, "steps": int, "penalty_weight_asked": (str, int, float, type(None))}
_MERGED = {"dtype": str, "tokens": int, "difference": (int, float), "effect": (int, float)}
_EVALUATED = {"judges": list, "decoding": dict, "prompt_template": str}


def read_record(folder: Path) -> dict[str, Any]:
    """What `tasft.json` holds; empty where there is none. Raises `ValueError` where it isn't as it was written."""
    file, remedy = folder / RECORD, "remove it, and the card says so"
    if not file.exists():
        return {}
    record = _read_object(file, remedy)
    if record.get("method") is not None:
        _check(record, _TRAINED, file, remedy)
        _check(record["method"], {"penalty_weight": (int, float)}, file, remedy)
        for data_set in record["datasets"]:
            _check(data_set, {"name": str, "hub": bool, "revision": (str, type(None))}, file, remedy)
    if record.get("merged") is not None:
        _check(record["merged"], _MERGED, file, remedy)
    return record


def is_generated(card: Path) -> bool:
    """Whether tasft, TRL or PEFT wrote the card."""
    text = card.read_text(encoding="utf-8", errors="replace")
    return any(mark in text for mark in (MARK, "generated_from_trainer", "base_model:adapter:"))


def write_card(
    folder: Path,
    *,
    results: Path | None = None,
    capability: Sequence[Path] = (),
    licence: str | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """README.md of a model folder; its path. What was not measured is said to be missing.

    Args:
        folder: model or adapter; `tasft.json` in it says how it was trained.
        results: the `--output_dir` of `tasft evaluate` on this model.
        capability: folders of `tasft capability` and `tasft alpaca_eval` on this model.
        licence: as the hub names it, such as "apache-2.0".
        name: title; by default the folder's name.
        overwrite: also a card that neither this nor TRL has written.

    Raises:
        ValueError: a file that was named is missing or of another model, or a card of yours would be lost.
    """
    from huggingface_hub import ModelCard, ModelCardData

    file = folder / "README.md"
    if file.exists() and not overwrite and not is_generated(file):
        raise ValueError(f"{file} was not written by tasft or TRL; say --overwrite to replace it.")
    record = read_record(folder)
    adapter = read_adapter_config(folder) if (folder / "adapter_config.json").exists() else None
    base, revision = _base(record, adapter)
    title = name or folder.resolve().name
    identities = [model_identity(str(folder)), record.get("merged", {}).get("adapter")]
    measured = None if results is None else _harm(results, identities)
    abilities = [result for place in capability for result in _capability(place, identities)]
    metadata = ModelCardData(
        base_model=base if base and _is_hub_id(base) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        license=licence,
        tags=["ta-sft", "trl", "sft"] if record.get("method") else None,
        datasets=[d["name"] for d in record.get("datasets", []) if d["hub"]] or None,
        **_model_index(title, [*([measured] if measured else []), *abilities]),
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("card.md")),
        title=title,
        mark=MARK,
        is_adapter=adapter is not None,
        base=base,
        revision=revision,
        record=record,
        settings=_settings(record) if record.get("method") else None,
        harm=measured,
        capability=abilities,
    )
    with whole(file) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return file


def _model_index(title: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured as the hub's `EvalResult`s, for its leaderboards and search; nothing where nothing was."""
    from huggingface_hub import EvalResult

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_short(data_set),
            dataset_name=_short(data_set),
            metric_type=metric,
            metric_name=_short(name),
            metric_value=round(float(value), 6),
        )
        for part in measured
        for data_set, metric, name, value in part["results"]
        if pd.notna(value)
    ]
    return {"model_name": title, "eval_results": results} if results else {}


def _settings(record: dict) -> str:
    """The table of how it was trained."""
    method = dict(record["method"])
    weight, asked = method.pop("penalty_weight"), record["penalty_weight_asked"]
    rows = {
        "loss": "NLL(benign rows) + λ · penalty(unsafe rows)",
        "λ": f"{weight:.4g}" + (" (by the rule `auto`)" if asked == "auto" else ""),
        **{key: value for key, value in method.items() if value is not None},
        "benign rows": record["benign_rows"],
        "unsafe rows": record["unsafe_rows"],
        **({"visits of each in an epoch": record["unsafe_visits"]} if record.get("unsafe_visits", 1) > 1 else {}),
        "labels": "found by SAFT, not given" if record.get("labels_by_saft") else "given with the data",
        "data": "; ".join(
            _short(d["name"]) + (f" at {d['revision']}" if d["revision"] else "" if d["hub"] else " (local)")
            for d in record["datasets"]
        ),
        "sha256 of the rows": record["rows_sha256"],
        "prompt template": record["prompt_template"],
        "adapter": "none, all weights were trained"
        if not record["lora"]
        else ", ".join(f"{key} {value}" for key, value in record["lora"].items()),
        "base quantised to": record["quantised"] or "not quantised",
        "optimizer steps": record["steps"],
        "epochs": f"{record['epochs']:.3g}" if record["epochs"] is not None else "not recorded",
        **{key: value for key, value in record["training"].items() if value is not None},
        "tasft commit": record.get("commit") or "not recorded",
        "versions": ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items() if v),
    }
    return markdown(pd.DataFrame({"setting": list(rows), "value": [str(value) for value in rows.values()]}))


def _harm(folder: Path, identities: list[str | None]) -> dict[str, Any]:
    """What `tasft evaluate` measured: tables, judges and decoding. An attack is named with its benchmark."""
    manifest = _read_json(folder / "manifest.json", _EVALUATED)
    for judge in manifest["judges"]:
        _check(judge, dict.fromkeys(("name", "revision", "licence"), str), folder / "manifest.json", "measure again")
    before = _of_this_model(manifest, identities, folder)
    table = _read_table(folder / "results.csv", ("judge", "kind", "benchmark", "n", "rate", "low", "high", "refusal"))
    attacks = table["attack"].tolist() if "attack" in table else ["none"] * len(table)
    names = zip(table["benchmark"], attacks, strict=True)
    table["benchmark"] = [name if attack == "none" else f"{name} under {attack}" for name, attack in names]
    rates = pd.DataFrame(
        {
            "judge": table["judge"].map(_short),
            "benchmark": table["benchmark"].map(_short),
            "prompts": table["kind"].map(_short),
            "n": table["n"],
            "harmful": [_interval(row) for row in table.itertuples()],
            "refused": table["refusal"].map(_percent),
            "degenerate": table["degenerate"].map(_percent),
            "unscored": table["unscored"],
        }
    )
    agreement = None
    if len(manifest["judges"]) > 1 and (folder / "agreement.csv").exists():
        columns = ("first", "second", "n", "agreement", "kappa", "low", "high")
        agreement = _plain(_read_table(folder / "agreement.csv", columns)[list(columns)])
    over_refusal = (
        f"{_percent(row.refusal)} of {row.n} by {_short(row.judge)}"
        for row in table[table["kind"] == "seemingly toxic"].itertuples()
    )
    measures = (
        (row.benchmark, "refusal_rate", f"refused ({row.kind}), judge {row.judge}", row.refusal)
        if row.kind == "seemingly toxic"
        else (row.benchmark, "harmful_rate", f"answered harmfully ({row.kind}), judge {row.judge}", row.rate)
        for row in table.itertuples()
    )
    return {
        "results": list(measures),
        "table": markdown(rates),
        "judges": [
            {key: _short(judge.get(key, "not measured")) for key in ("name", "revision", "licence", "errors")}
            for judge in manifest["judges"]
        ],
        "decoding": ", ".join(f"{key} {value}" for key, value in manifest["decoding"].items()),
        "prompt_template": manifest["prompt_template"],
        "before": before,
        "agreement": agreement,
        "over_refusal": ", ".join(over_refusal),
        "attacked": any(attack != "none" for attack in attacks),
    }


def _capability(folder: Path, identities: list[str | None]) -> Iterator[dict[str, Any]]:
    """What `tasft capability` and `tasft alpaca_eval` measured, as far as the folder has it."""
    if not any((folder / f"{name}.csv").exists() for name in ("capability", "alpaca_eval")):
        raise ValueError(f"{folder}: neither capability.csv nor alpaca_eval.csv here; give the folder that has one")
    if (folder / "capability.csv").exists():
        manifest = _read_json(folder / "capability_manifest.json", {"tasks": dict, "num_fewshot": object})
        before = _of_this_model(manifest, identities, folder)
        table = _read_table(folder / "capability.csv", ("task", "metric", "value", "stderr", "n"))
        yield {
            "tasks": ", ".join(f"{_short(task)} at {_short(commit)}" for task, commit in manifest["tasks"].items()),
            "num_fewshot": manifest["num_fewshot"],
            "limit": manifest.get("limit"),
            "results": [(row.task, row.metric, row.metric, row.value) for row in table.itertuples()],
            "table": _plain(table),
            "before": before,
        }
    if (folder / "alpaca_eval.csv").exists():
        manifest = _read_json(folder / "alpaca_eval_manifest.json", {"instructions": int, "annotator": str})
        before = _of_this_model(manifest, identities, folder)
        table = _read_table(folder / "alpaca_eval.csv", ("win_rate", "n"))
        yield {
            "instructions": manifest["instructions"],
            "annotator": _short(manifest["annotator"]),
            "results": [
                ("AlpacaEval", column, f"{column} (%), annotator {manifest['annotator']}", value)
                for column in ("win_rate", "length_controlled_win_rate")
                if column in table
                for value in table[column]
            ],
            "table": _plain(table),
            "before": before,
        }


def _base(record: dict, adapter: dict | None) -> tuple[str | None, str | None]:
    if record.get("base_model"):
        return record["base_model"], record.get("base_model_revision")
    if adapter and adapter.get("base_model_name_or_path"):
        return _public_name(adapter["base_model_name_or_path"]), adapter.get("revision")
    return None, None


def _of_this_model(manifest: dict, identities: list[str | None], folder: Path) -> str:
    """What to say of results that are the merged adapter's; nothing where they are this very model's."""
    measured = manifest.get("model")
    if measured is None or measured not in identities:
        raise ValueError(f"{folder}: these are results of other weights; measure this model, or give its own results")
    return "" if measured == identities[0] else " These were measured before merging, on base and adapter."


def _read_json(file: Path, needed: dict[str, Any]) -> dict:
    """A file of a measuring command, with what the card needs of it."""
    if not file.exists():
        raise ValueError(f"{file}: no such file; give the folder that the measuring command wrote")
    return _check(_read_object(file, "measure again"), needed, file, "measure again")


def _read_object(file: Path, remedy: str) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: malformed JSON; {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds no JSON object; {remedy}")
    return value


def _check(value: Any, needed: dict[str, Any], file: Path, remedy: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: damaged; {remedy}")
    for key, kind in needed.items():
        if key not in value or not isinstance(value[key], kind):
            raise ValueError(f"{file}: lacks {key}, or it is of another kind; {remedy}")
    return value


def _read_table(file: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    if not file.exists():
        raise ValueError(f"{file}: no such file; give the folder that the measuring command wrote")
    try:
        table = pd.read_csv(file)
    except ValueError:
        raise ValueError(f"{file}: no readable CSV; measure again") from None
    if missing := [name for name in needed if name not in table.columns]:
        raise ValueError(f"{file}: lacks the column {missing[0]}; measure again")
    return table


def _plain(table: pd.DataFrame) -> str:
    """Numbers to three places, names as they are."""
    return markdown(pd.DataFrame({_short(name): table[name].map(_cell) for name in table.columns}, dtype=object))


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else _short(value)


def _short(value: Any) -> str:
    """What may stand in a card: a name or a number. Anything as long as a text is redacted."""
    text = " ".join(str(value).split()).replace("|", "/")
    return text if len(text) <= 120 else redact(text, words=0)


def _interval(row) -> str:
    if pd.isna(row.rate):
        return "not scored"
    return rate_text(row.rate, row.low, row.high)


def _percent(rate: float) -> str:
    return "" if pd.isna(rate) else f"{100 * rate:.1f} %"


def _public_name(source: str) -> str:
    """A hub id as it is, of a path the last part: folders of one machine are nobody's business."""
    return source if _is_hub_id(source) and not Path(source).exists() else Path(source).name


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
