"""`tasft train`: TRL's SFT with a penalty on the rows labelled unsafe."""

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from .. import files
from .flags import check_data

HELP = """\
usage: tasft train --config FILE.yaml [--option value ...]
       accelerate launch -m tasft_lib.cli train --config FILE.yaml [--option value ...]

TRL's `trl sft` with a penalty on unsafe rows. Every option of SFTConfig, ModelConfig and transformers'
TrainingArguments works, in the YAML file or as a flag; `tasft train --help_all` lists them. The most used:

  --model_name_or_path, --model_revision, --dtype, --load_in_4bit, --use_peft, --lora_r, --lora_alpha,
  --lora_target_modules, --output_dir, --learning_rate, --num_train_epochs, --per_device_train_batch_size,
  --gradient_accumulation_steps, --max_length, --resume_from_checkpoint, --report_to, --push_to_hub (HF_TOKEN)

penalty options:
  --penalty emd|emd_exact|nlcl|gradient_ascent|unlikelihood|npo|simnpo|imitation
      Penalty on unsafe rows (default: emd); `imitation` pulls towards them: for safe ones.
  --penalty_weight
      Lambda: a number, or `auto` (default) for `penalty_pressure` / share of unsafe rows.
  --penalty_pressure
      Expected weight of the penalty for `auto` (default: from the paper's Table 4).
  --penalty_reduction batch|unsafe|micro_batch
      What the summed penalty is divided by: samples of the optimizer step (default), its unsafe samples, or those of
      the micro-batch (the paper's lambda as they stand).
  --penalty_embedding lm_head|embed_tokens|random|one_hot
      Token embedding of the EMD penalties (default: lm_head).
  --penalty_beta
      Beta of `npo` (default: 0.1) and `simnpo` (default: 2.5).
  --penalize_eos
      Penalise the tokens that end a turn in unsafe rows too.
  --penalty_first_tokens
      Penalise only so many first tokens of an unsafe answer (default: all).
  --loss_head fused|dense
      Losses in chunks (default), or on full logits, its reference.

data options:
  --dataset_name
      Rows (.json, .jsonl, .csv, .tsv or .parquet file, save_to_disk folder, hub id)."""
# Options that name a file or folder of rows.
ROWS = ("dataset_name", "unsafe_dataset_name", "saft_validation", "evaluation_prompts", "sample_prompts")


@dataclass
class DataArguments:
    """Where the rows come from, beside TRL's `dataset_name` and splits."""

    dataset_revision: str | None = field(
        default=None, metadata={"help": "Commit of a hub data set (local files need none)."}
    )
    unsafe_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Unsafe rows (file, save_to_disk folder, hub id); else `label` in dataset_name tells."},
    )
    unsafe_dataset_revision: str | None = field(default=None, metadata={"help": "Commit of that hub data set."})
    saft_contamination: float | None = field(
        default=None,
        metadata={"help": "Share of the rows thought harmful: SAFT finds them, without labels; they are unsafe."},
    )
    saft_validation: str | None = field(
        default=None,
        metadata={
            "help": "Rows with `label` (false: harmful) that choose its layer and directions; all may be harmful."
        },
    )
    saft_validation_revision: str | None = field(default=None, metadata={"help": "Commit of that hub data set."})
    n_benign: int | None = field(default=None, metadata={"help": "Benign rows to draw by --seed (default: all)."})
    n_unsafe: int | None = field(default=None, metadata={"help": "Unsafe rows to draw by --seed (default: all)."})
    prompt_template: str = field(
        default="alpaca", metadata={"help": "For instruction/input/output rows: alpaca, short, none or chat."}
    )
    evaluation_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "Files of evaluation prompts; a training row that asks one of them is refused."},
    )
    drop_empty: bool = field(default=False, metadata={"help": "Leave out rows with an empty answer."})
    drop_long: bool = field(
        default=False, metadata={"help": "Leave out rows whose prompt alone fills max_length, and say how many."}
    )
    sample_prompts: str | None = field(
        default=None,
        metadata={"help": "File of prompts that the model answers along training, into <output_dir>/_samples.jsonl."},
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "Answer them every so many steps (default: at every save and at the end)."}
    )
    sample_max_new_tokens: int = field(default=128, metadata={"help": "Tokens of such an answer at most."})


def main(argv: list[str]) -> None:
    # TRL takes seconds to import: what can be said before is said before.
    if "--help_all" not in argv:
        if not argv or "-h" in argv or "--help" in argv:
            print(HELP)
            for option in fields(DataArguments):
                print(f"  --{option.name}\n      {option.metadata['help']}")
            return
        _check_paths(argv)

    from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

    from .. import data, sources
    from ..config import TASFTConfig
    from ..evaluation.samples import SampleCallback
    from ..generation import Decoding
    from ..models import load_tokenizer
    from ..publish.card import RECORD, training_record
    from ..trainer import TASFTTrainer

    parser = TrlParser((ScriptArguments, DataArguments, TASFTConfig, ModelConfig), prog="tasft train")
    parser.usage = "tasft train --config FILE.yaml [--option value ...]"
    if "--help_all" in argv:
        parser.print_help()
        return
    script_args, data_args, args, model_args = parser.parse_args_and_config(args=argv, fail_with_unknown_args=True)
    if script_args.dataset_name is None or model_args.model_name_or_path is None:
        raise ValueError("dataset_name and model_name_or_path are needed; give them in the --config file or as flags.")
    if args.hub_token is not None:
        # Trainer pickles its arguments into training_args.bin, which push_to_hub uploads.
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None

    by_saft = data_args.saft_contamination is not None or data_args.saft_validation is not None
    if by_saft and data_args.unsafe_dataset_name is not None:
        raise ValueError("SAFT finds the unsafe rows; leave out unsafe_dataset_name, or saft_contamination.")

    rows = sources.read_rows(
        script_args.dataset_name, split=script_args.dataset_train_split, revision=data_args.dataset_revision
    )
    has_label = "label" in rows.column_names or (data_args.unsafe_dataset_name is None and not by_saft)
    rows = data.to_training_rows(
        rows,
        label=None if has_label else True,
        template=data_args.prompt_template,
        source=script_args.dataset_name,
        drop_empty=data_args.drop_empty,
        with_place=True,
    )
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    if by_saft:
        rows = _labelled_by_saft(rows, script_args.dataset_name, data_args, args, model_args)
    benign, unsafe = data.by_label(rows)
    if data_args.unsafe_dataset_name is not None:
        unsafe = data.read_training_rows(
            data_args.unsafe_dataset_name,
            label=False,
            template=data_args.prompt_template,
            revision=data_args.unsafe_dataset_revision,
            drop_empty=data_args.drop_empty,
            with_place=True,
        )
    if data_args.drop_long:
        long = {"tokenizer": tokenizer, "max_length": args.max_length}
        benign = data.drop_long(benign, source=script_args.dataset_name, **long)
        unsafe = data.drop_long(unsafe, source=data_args.unsafe_dataset_name or script_args.dataset_name, **long)
    labels_from = data_args.unsafe_dataset_name or ("labels by SAFT" if by_saft else "its own labels")
    mixed = data.draw(
        benign,
        unsafe,
        n_benign=data_args.n_benign,
        n_unsafe=data_args.n_unsafe,
        seed=args.seed,
        source=f"{script_args.dataset_name} with {labels_from}",
        evaluation_prompts=[p for file in data_args.evaluation_prompts for p in data.read_prompts(file)],
        tokenizer=tokenizer,
        max_length=args.max_length,
    )
    sample_prompts = data.read_prompts(data_args.sample_prompts) if data_args.sample_prompts else []

    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (args.model_init_kwargs or {})
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.revision = model_args.model_revision if not os.path.isdir(model_args.model_name_or_path) else None
    trainer = TASFTTrainer(
        model_args.model_name_or_path,
        args,
        train_dataset=mixed,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )
    if sample_prompts:
        templated = _with_template(sample_prompts, trainer.processing_class, mixed, data_args.prompt_template)
        decoding = Decoding(max_new_tokens=data_args.sample_max_new_tokens)
        trainer.add_callback(
            SampleCallback(trainer, sample_prompts, templated, steps=data_args.sample_steps, decoding=decoding)
        )
    trainer.accelerator.print(
        f"{args.penalty}, λ = {trainer.penalty_weight:.4g}, reduction {args.penalty_reduction}: "
        f"{len(benign)} benign and {len(unsafe)} unsafe rows at hand, {len(mixed)} in the mix"
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        sources = {script_args.dataset_name: data_args.dataset_revision}
        if data_args.unsafe_dataset_name is not None:
            sources[data_args.unsafe_dataset_name] = data_args.unsafe_dataset_revision
        record = training_record(trainer, model_args, mixed, sources, template=data_args.prompt_template)
        files.write_json(Path(args.output_dir) / RECORD, record | {"labels_by_saft": by_saft} | files.environment())
    trainer.accelerator.print(f"saved to {args.output_dir}")
    if args.push_to_hub:
        is_local = os.path.exists(script_args.dataset_name)
        trainer.push_to_hub(dataset_name=None if is_local else script_args.dataset_name)
    trainer.end()


def _check_paths(argv: list[str]) -> None:
    """Raise `ValueError` for a configuration that is no YAML and for rows or a model that are not there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "model_name_or_path", "model_revision", *ROWS):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="*", default=argparse.SUPPRESS)
    flags = vars(parser.parse_known_args(argv)[0])
    options = _read_config(Path(flags["config"][0])) if flags.get("config") else {}
    options |= {name: values if name == "evaluation_prompts" else values[0] for name, values in flags.items() if values}
    for name in ROWS:
        value = options.get(name)
        for source in value if isinstance(value, list) else [value]:
            if isinstance(source, str):
                check_data(source, on_hub=name not in ("evaluation_prompts", "sample_prompts"))
    if isinstance(model := options.get("model_name_or_path"), str):
        files.check_model(model, options.get("model_revision"))


def _read_config(file: Path) -> dict:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; check the path")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        # Its own message quotes the lines, in which a token may stand.
        line = error.problem_mark.line + 1
        raise ValueError(f"{file}: line {line}: no valid YAML ({error.problem}); correct it") from None
    return config if isinstance(config, dict) else {}


def _labelled_by_saft(rows, source: str, data_args, args, model_args):
    """`rows` with `label` False for those that SAFT finds harmful with the model to be tuned.

    What it leaves in `<output_dir>/_saft` is never pushed to the hub.
    """
    from trl import get_quantization_config

    from .. import data
    from ..models import load_tokenizer, load_weights
    from ..saft.find import Search
    from ..saft.workflow import label_rows

    validation = data_args.saft_validation and data.read_training_rows(
        data_args.saft_validation,
        label=None,
        template=data_args.prompt_template,
        revision=data_args.saft_validation_revision,
        drop_empty=data_args.drop_empty,
        with_place=True,
    )

    def load() -> tuple:
        model = load_weights(
            model_args.model_name_or_path,
            model_args.model_revision,
            dtype=model_args.dtype,
            device=args.device,
            quantization_config=get_quantization_config(model_args),
        )
        return model, load_tokenizer(model_args.model_name_or_path, model_args.model_revision)

    return label_rows(
        rows,
        Search(contamination=data_args.saft_contamination, validation=validation),
        load,
        folder=Path(args.output_dir) / "_saft",
        source=source,
        model_name=Path(model_args.model_name_or_path).name,
        identity=model_args.model_name_or_path,
        max_length=args.max_length,
    )


def _with_template(prompts: list[str], tokenizer, rows, template: str) -> list[str]:
    """Bare prompts as the training rows have theirs: in the chat template, or in ours."""
    from .. import templates

    if isinstance(rows[0]["prompt"], str):
        return [templates.format_prompt(prompt, template=template) for prompt in prompts]
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
