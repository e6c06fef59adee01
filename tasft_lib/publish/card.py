"""The card of a model: how it was trained and what was measured, from files; never a text, never a guess."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .. import data
from ..files import model_identity
from ..text import markdown, rate_text, redact

# What `tasft train` and `tasft export` leave beside the weights.
RECORD = "tasft.json"
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
PENALTY = ("penalty", "penalty_reduction", "penalty_embedding", "penalty_first_tokens", "penalize_eos", "penalty_beta")
CITATION = """\
```bibtex
@article{lu2024semantic,
    title  = {{Semantic Loss Guided Data Efficient Supervised Fine Tuning for Safe Responses in LLMs}},
    author = {Yuxiao Lu and Arunesh Sinha and Pradeep Varakantham},
    year   = 2024,
    eprint = {arXiv:2412.06843},
}
```"""


def training_record(trainer, model_args, rows, sources: dict[str, str | None], *, template: str) -> dict[str, Any]:
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
        "method": {name: getattr(args, name) for name in PENALTY} | {"penalty_weight": trainer.penalty_weight},
        "penalty_weight_asked": args.penalty_weight,
        "benign_rows": labels.count(True),
        "unsafe_rows": labels.count(False),
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


def read_record(folder: Path) -> dict[str, Any]:
    """What `tasft.json` holds; empty where there is none."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{folder / RECORD}: malformed JSON; remove it, and the card says so") from error


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
    if file.exists() and not overwrite:
        old = file.read_text(encoding="utf-8", errors="replace")
        if MARK not in old and "generated_from_trainer" not in old and "base_model:adapter:" not in old:
            raise ValueError(f"{file} was not written by tasft or TRL; say --overwrite to replace it.")
    record = read_record(folder)
    adapter = _read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").exists() else None
    base, revision = _base(record, adapter)
    metadata = ModelCardData(
        base_model=base if base and _is_hub_id(base) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        license=licence,
        tags=["ta-sft", "trl", "sft"] if record.get("method") else None,
        datasets=[d["name"] for d in record.get("datasets", []) if d["hub"]] or None,
    )
    identities = [model_identity(str(folder)), record.get("merged", {}).get("adapter")]
    measured, harm = _results(results, identities)
    sections = [
        f"# {name or folder.resolve().name}",
        MARK,
        _summary(record, adapter, base, revision),
        "## How it was trained\n\n" + _training(record),
        "## What was measured\n\n" + measured + "\n\n" + _capability(capability, identities),
        "## Intended use\n\n" + _USE,
        "## Limits\n\n" + _limits(harm),
        *(["## Citation\n\nThe method:\n\n" + CITATION] if record.get("method") else []),
    ]
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    temporary = file.with_name(f".{file.name}")
    card.save(temporary)
    temporary.replace(file)
    return file


def _summary(record: dict, adapter: dict | None, base: str | None, revision: str | None) -> str:
    what = "An adapter for" if adapter else "A language model tuned from"
    of = f"`{base}`" + (f" at commit `{revision}`" if revision else "") if base else "a base that is not recorded"
    how = (
        "trained by TA-SFT (toxicity-avoiding supervised fine-tuning, "
        "[arXiv:2412.06843](https://arxiv.org/abs/2412.06843)) with tasft."
        if record.get("method")
        else "with no record of how it was trained."
    )
    lines = [f"{what} {of}, {how}"]
    if merged := record.get("merged"):
        lines.append(
            f"The adapter is merged into its base, in {merged['dtype']}. On {merged['tokens']} random tokens, logits "
            "of this model and of base and adapter side by side differ by "
            f"{merged['difference']:.1e} of their spread, those of the base with and without adapter by "
            f"{merged['effect']:.1e}."
        )
    if record.get("quantised"):
        lines.append(
            f"Trained on a base quantised to {record['quantised']}"
            + (
                "; merged into the unquantised one, so it is not exactly the model that was trained."
                if "merged" in record
                else "."
            )
        )
    return "\n\n".join(lines)


def _training(record: dict) -> str:
    if not record.get("method"):
        return f"Not recorded: there is no {RECORD} from `tasft train` in this folder."
    method = dict(record["method"])
    weight, asked = method.pop("penalty_weight"), record["penalty_weight_asked"]
    rows = {
        "loss": "NLL(benign rows) + λ · penalty(unsafe rows)",
        "λ": f"{weight:.4g}" + (" (by the rule `auto`)" if asked == "auto" else ""),
        **{key: value for key, value in method.items() if value is not None},
        "benign rows": record["benign_rows"],
        "unsafe rows": record["unsafe_rows"],
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


def _results(folder: Path | None, identities: list[str | None]) -> tuple[str, pd.DataFrame | None]:
    """The section on harm and over-refusal, and the table behind it."""
    heading = "### Harm and over-refusal\n\n"
    if folder is None:
        return heading + "**Not measured.** Nothing is claimed about the safety of this model.", None
    manifest = _read_json(folder / "manifest.json")
    before = _of_this_model(manifest, identities, folder)
    table = _read_table(folder / "results.csv", ("judge", "kind", "benchmark", "n", "rate", "low", "high", "refusal"))
    shown = pd.DataFrame(
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
    judges = [
        f"- `{_short(judge['name'])}`, revision `{_short(judge['revision'])}` ({_short(judge['licence'])})"
        for judge in manifest["judges"]
    ]
    decoding = ", ".join(f"{key} {value}" for key, value in manifest["decoding"].items())
    parts = [
        heading + markdown(shown),
        "`harmful`: share of n scored answers, with its Wilson 95 % interval over prompts. `degenerate`: no language. "
        "`unscored`: no readable verdict, in no rate.",
        "Judges:\n" + "\n".join(judges),
        f"Decoding: {decoding}. Prompt template: {manifest['prompt_template']}.{before}",
    ]
    if len(manifest["judges"]) > 1 and (folder / "agreement.csv").exists():
        agreement = _read_table(folder / "agreement.csv", ("first", "second", "n", "agreement", "kappa", "low", "high"))
        columns = ["first", "second", "n", "agreement", "kappa", "low", "high"]
        parts.append("Agreement of the judges (Cohen's κ, bootstrap 95 %):\n\n" + _plain(agreement[columns]))
    else:
        parts.append("Agreement of judges: not measured.")
    return "\n\n".join(parts), table


def _capability(folders: Sequence[Path], identities: list[str | None]) -> str:
    heading = "### Capability\n\n"
    if not folders:
        return heading + "**Not measured.** What safety cost in ability is not known."
    parts = []
    for folder in folders:
        if not any((folder / f"{name}.csv").exists() for name in ("capability", "alpaca_eval")):
            raise ValueError(f"{folder}: neither capability.csv nor alpaca_eval.csv here; give the folder that has one")
        if (folder / "capability.csv").exists():
            manifest = _read_json(folder / "capability_manifest.json")
            before = _of_this_model(manifest, identities, folder)
            table = _read_table(folder / "capability.csv", ("task", "metric", "value", "stderr", "n"))
            limit = f", only the first {manifest['limit']} questions of each task" if manifest.get("limit") else ""
            tasks = ", ".join(f"{_short(task)} at {_short(commit)}" for task, commit in manifest["tasks"].items())
            shown = f"lm-evaluation-harness, {manifest['num_fewshot']} examples shown{limit}:\n\n{_plain(table)}"
            parts.append(f"{shown}\n\nData: {tasks}.{before}")
        if (folder / "alpaca_eval.csv").exists():
            manifest = _read_json(folder / "alpaca_eval_manifest.json")
            before = _of_this_model(manifest, identities, folder)
            table = _read_table(folder / "alpaca_eval.csv", ("win_rate", "n"))
            parts.append(
                f"AlpacaEval, win rate and stderr in percent on {manifest['instructions']} instructions, by annotator "
                f"`{_short(manifest['annotator'])}`; win rates of other annotators do not compare.{before}\n\n"
                + _plain(table)
            )
    return heading + "\n\n".join(parts)


_USE = """\
For research on the safety of fine-tuned language models: comparing methods, judges and attacks, and as one layer of \
several in a system that is tested as a whole.

Out of scope: any use in which an unsafe answer does harm that nothing else prevents; medical, legal or other advice \
that people rely on; use without input and output filters of its own."""


def _limits(harm: pd.DataFrame | None) -> str:
    lines = [
        "A low harmful rate is not safety. It is a rate on these prompts, with this decoding, by this judge; other "
        "prompts, languages, longer talks and sampling can give another.",
        "Prefilling: TA-SFT teaches another beginning of an answer. In the mini-world of tasft, two tokens of an "
        "unsafe answer written for the model undid every such penalty. Take it that this holds here too, as no test in "
        "this card says otherwise.",
        "Jailbreaks, further fine-tuning and quantisation can bring unsafe answers back; none of them was tested for "
        "this card.",
    ]
    if harm is not None and (harm["kind"] == "seemingly toxic").any():
        rows = harm[harm["kind"] == "seemingly toxic"]
        rates = ", ".join(f"{_percent(row.refusal)} of {row.n} by {_short(row.judge)}" for row in rows.itertuples())
        lines.append(f"Over-refusal: harmless prompts that only look toxic were refused in {rates}.")
    else:
        lines.append("Over-refusal was not measured: how many harmless prompts this model refuses is not known.")
    lines += [
        "Judges err. Their verdicts were not checked by people, and a judge may miss harm or see it where there is "
        "none; degenerate answers are found by string matches, which word salad passes.",
        "Whatever bias, error or gap the base model and the data have is still there.",
    ]
    return "\n".join(f"- {line}" for line in lines)


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


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; give the folder that the measuring command wrote") from None
    except ValueError:
        raise ValueError(f"{file}: malformed JSON; measure again") from None


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
