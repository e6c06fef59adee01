"""`tasft train`: TRL's SFT with a penalty on the rows labelled unsafe."""

import argparse
import difflib
import logging
import os
import re
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from .. import files, integrity
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
MOST_NODES = 10_000  # of a configuration with its aliases written out
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
    unsafe_dataset_split: str = field(
        default="train", metadata={"help": "Its split (a hub data set, or a saved folder of several)."}
    )
    unsafe_dataset_config: str | None = field(default=None, metadata={"help": "Configuration of that hub data set."})
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
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better one (with load_best_model_at_end)."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the training of other settings, or the model, in output_dir."}
    )


def main(argv: list[str]) -> None:
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    # TRL takes seconds to import: what can be said before is said before.
    if "--help_all" not in argv:
        if not argv or "-h" in argv or "--help" in argv:
            print(HELP)
            for option in fields(DataArguments):
                print(f"  --{option.name}\n      {option.metadata['help']}")
            return
        _check_paths(argv)

    from trl import ModelConfig, ScriptArguments, TrlParser

    from ..config import TASFTConfig

    parser = TrlParser((ScriptArguments, DataArguments, TASFTConfig, ModelConfig), prog="tasft train")
    parser.usage = "tasft train --config FILE.yaml [--option value ...]"
    if "--help_all" in argv:
        parser.print_help()
        return
    _refuse_unknown(parser, argv)
    script_args, data_args, args, model_args = parser.parse_args_and_config(args=argv)
    _refuse_unused(script_args, data_args, args, model_args)
    if model_args.dtype is not None:
        model_args.dtype = files.dtype_name(model_args.dtype)
    if args.hub_token is not None:
        # Trainer pickles its arguments into training_args.bin, which push_to_hub uploads.
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None
    # TRL warns with the end of a prompt where its tokens are others before an answer than alone.
    logging.getLogger("trl.trainer.sft_trainer").addFilter(_without_text)
    folder = Path(args.output_dir)
    try:
        with integrity.folder_lock(folder):
            _train(script_args, data_args, args, model_args)
    except Exception as error:
        # Of a full disk each library has an error of its own.
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        if "No space left" not in str(error) and shutil.disk_usage(there).free > 2**20:
            raise
        raise OSError(f"{folder}: no space left on the disk; make room, and run the same command again") from error


def _without_text(record: logging.LogRecord) -> bool:
    record.msg = re.sub(
        r"(left out of the training sequence: ).*(\. The model is)", r"\1(not shown)\2", str(record.msg)
    )
    return True


def _train(script_args, data_args, args, model_args) -> None:
    from transformers import EarlyStoppingCallback
    from trl import get_peft_config, get_quantization_config

    from .. import data
    from ..checkpoints import check_weights
    from ..evaluation.samples import SampleCallback
    from ..generation import Decoding
    from ..models import load_tokenizer, sort_targets, train_from
    from ..publish.card import training_record
    from ..resume import Seal
    from ..templates import ask
    from ..trainer import TASFTTrainer
    from . import run_folder

    folder, base = Path(args.output_dir), model_args.model_name_or_path
    tokenizer = load_tokenizer(base, model_args.model_revision)
    checked_by = _as_trl_has_it(tokenizer, args)
    benign, unsafe, labels_from = _read_rows(script_args, data_args, args, model_args)
    unsafe_source = data_args.unsafe_dataset_name or script_args.dataset_name
    for rows, source in ((benign, script_args.dataset_name), (unsafe, unsafe_source)):
        if len(rows) and data.is_chat(rows) and checked_by.chat_template is None:
            what = "messages, and the model has no chat template"
            raise ValueError(f"{source}: {what}; give chat_template_path, or write text")
    if data_args.drop_long:
        long = {"tokenizer": checked_by, "max_length": args.max_length}
        benign = data.drop_long(benign, source=script_args.dataset_name, **long)
        unsafe = data.drop_long(unsafe, source=unsafe_source, **long)
    named = data_args.unsafe_dataset_name is not None or _by_saft(data_args)
    is_plain = data_args.n_unsafe == 0 or (len(unsafe) == 0 and not named)
    mixed = data.draw(
        benign,
        None if is_plain else unsafe,
        n_benign=data_args.n_benign,
        n_unsafe=data_args.n_unsafe,
        seed=args.seed,
        source=f"{script_args.dataset_name} with {labels_from}",
        evaluation_prompts=[p for file in data_args.evaluation_prompts for p in data.read_prompts(file)],
        tokenizer=checked_by,
        max_length=args.max_length,
        with_place=True,
    )
    row_names, mixed = mixed["place"][:], mixed.remove_columns("place")
    evaluated = _evaluation_rows(script_args, data_args) if args.eval_strategy != "no" else None
    sample_prompts = data.read_prompts(data_args.sample_prompts) if data_args.sample_prompts else []

    asked = run_folder.settings(args, model_args, data.fingerprint(mixed), files.model_identity(base))
    if run_folder.is_finished(folder, asked) and not data_args.overwrite:
        print(f"{folder} holds this training, finished; give --overwrite to train it again")
        return
    check_weights(base, model_args.model_revision, tokenizer=tokenizer)
    with args.main_process_first(local=False):
        resumed = run_folder.begin(folder, asked, overwrite=data_args.overwrite, resume=args.resume_from_checkpoint)

    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (args.model_init_kwargs or {})
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.revision = model_args.model_revision if not os.path.isdir(base) else None
    trainer = TASFTTrainer(
        base,
        args,
        train_dataset=mixed,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )
    trainer.row_names = row_names
    trainer.add_callback(Seal())
    sort_targets(trainer.model)
    run_folder.keep_readme(trainer)
    if data_args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(data_args.early_stopping_patience))
    if sample_prompts:
        # As the training rows have theirs: in the chat template, or in ours.
        template = data_args.prompt_template if isinstance(mixed[0]["prompt"], str) else "chat"
        processor = trainer.processing_class
        templated = ask(sample_prompts, template, getattr(processor, "tokenizer", processor))
        options = {"steps": data_args.sample_steps, "special_tokens": template != "chat"}
        decoding = Decoding(max_new_tokens=data_args.sample_max_new_tokens)
        trainer.add_callback(SampleCallback(trainer, sample_prompts, templated, decoding=decoding, **options))
    n_unsafe = mixed["label"][:].count(False)
    method = f"{args.penalty}, λ = {trainer.penalty_weight:.4g}, reduction {args.penalty_reduction}"
    if n_unsafe == 0:
        method = "plain SFT, nothing is penalised (no row is unsafe)"
    elif trainer.penalty_weight == 0:
        method = f"{args.penalty}, λ = 0: nothing is penalised, unsafe rows are passed over"
    trainer.accelerator.print(
        f"{method}: {len(benign)} benign and {len(unsafe)} unsafe rows at hand, {len(mixed)} in the mix"
    )
    if resumed is not None:
        trainer.accelerator.print(f"going on from {resumed}")
    train_from(trainer, resumed)
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        sources = {script_args.dataset_name: data_args.dataset_revision}
        if data_args.unsafe_dataset_name is not None:
            sources[data_args.unsafe_dataset_name] = data_args.unsafe_dataset_revision
        record = training_record(trainer, model_args, mixed, sources, template=data_args.prompt_template)
        by_saft = data_args.saft_contamination is not None or data_args.saft_validation is not None
        files.write_json(folder / files.RECORD, record | {"labels_by_saft": by_saft} | files.environment())
    trainer.accelerator.print(f"saved to {args.output_dir}")
    if args.push_to_hub:
        is_local = os.path.exists(script_args.dataset_name)
        trainer.push_to_hub(dataset_name=None if is_local else script_args.dataset_name)
    trainer.end()


def _refuse_unknown(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Raise `ValueError` for options that nobody knows, by their names: a value may be a token."""
    known = {action.dest for action in parser._actions}
    words, options, unknown = list(argv), {}, []
    if "--config" in words:
        at = words.index("--config")
        file, words = words[at + 1], words[:at] + words[at + 2 :]
        options = _read_config(Path(file))
        unknown = [(f"{file}: ", str(name)) for name in options if name not in known and name != "env"]
    left = parser.parse_known_args(words)[1]
    unknown += [("", word.partition("=")[0]) for word in left if word.startswith("--")]
    if unknown:
        place, name = unknown[0]
        like = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=1)
        remedy = f"did you mean {like[0]}?" if like else "tasft train --help_all lists them"
        raise ValueError(f"{place}{name} is no option of tasft train; {remedy}")
    if left:
        raise ValueError("there is a value without its option; write each after its own, and the file after --config")


def _refuse_unused(script_args, data_args, args, model_args) -> None:
    """Raise `ValueError` for what is missing and what would be passed over; set right what TRL makes of two options."""
    if script_args.dataset_name is None or model_args.model_name_or_path is None:
        raise ValueError("dataset_name and model_name_or_path are needed; give them in the --config file or as flags.")
    if data_args.unsafe_dataset_name is not None and _by_saft(data_args):
        raise ValueError("SAFT finds the unsafe rows; leave out unsafe_dataset_name, or saft_contamination.")
    if script_args.dataset_streaming:
        raise ValueError(
            "dataset_streaming: rows are drawn, mixed and checked as a whole, so all are read; leave it out."
        )
    if script_args.ignore_bias_buffers:
        raise ValueError("ignore_bias_buffers does nothing in trl sft nor here; leave it out.")
    if args.eval_strategy == "no" and script_args.dataset_test_split != "test":
        raise ValueError("dataset_test_split is evaluated where eval_strategy says when; give both, or neither.")
    if data_args.early_stopping_patience is not None and not args.load_best_model_at_end:
        raise ValueError("early_stopping_patience needs load_best_model_at_end and an eval_strategy; add them.")
    unsafe_only = [f"unsafe_dataset_{name}" for name in ("revision", "config")]
    given = [name for name in unsafe_only if getattr(data_args, name) is not None]
    given += ["unsafe_dataset_split"] * (data_args.unsafe_dataset_split != "train")
    if given and data_args.unsafe_dataset_name is None:
        raise ValueError(f"{given[0]} needs unsafe_dataset_name; add it, or leave it out.")
    if os.path.realpath(args.output_dir) == os.path.realpath(model_args.model_name_or_path):
        raise ValueError(f"{args.output_dir}: output_dir is the base model's own folder; give another.")
    # On the command line all is text, and TRL takes "true" for a path.
    resume = args.resume_from_checkpoint
    if str(resume).lower() in ("true", "none"):
        args.resume_from_checkpoint = None  # the same command goes on as it is
    elif str(resume).lower() == "false":
        args.resume_from_checkpoint = False
    elif not os.path.isdir(resume):
        raise ValueError(
            f"{resume}: no such checkpoint; leave out resume_from_checkpoint to take the newest whole one."
        )
    # TRL makes a text of a list of one, which PEFT takes for a regular expression of whole names.
    targets = model_args.lora_target_modules
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+([,\s]+[\w.]+)*", targets):
        model_args.lora_target_modules = re.split(r"[,\s]+", targets)


def _by_saft(data_args) -> bool:
    return data_args.saft_contamination is not None or data_args.saft_validation is not None


def _read_rows(script_args, data_args, args, model_args) -> tuple:
    """(benign rows, unsafe rows, what says which those are), each row with its place."""
    from .. import data, sources

    rows = sources.read_rows(
        script_args.dataset_name,
        split=script_args.dataset_train_split,
        revision=data_args.dataset_revision,
        name=script_args.dataset_config,
    )
    rows = data.to_training_rows(
        rows,
        label=None if "label" in rows.column_names else True,
        template=data_args.prompt_template,
        source=script_args.dataset_name,
        drop_empty=data_args.drop_empty,
        with_place=True,
    )
    if _by_saft(data_args):
        rows = _labelled_by_saft(rows, script_args.dataset_name, data_args, args, model_args)
    benign, unsafe = data.by_label(rows)
    if data_args.unsafe_dataset_name is None:
        return benign, unsafe, "labels by SAFT" if _by_saft(data_args) else "its own labels"
    if len(unsafe):
        what = "%s: left out %d rows labelled false, since unsafe_dataset_name gives the unsafe rows"
        logging.getLogger(__name__).warning(what, script_args.dataset_name, len(unsafe))
    unsafe = data.read_training_rows(
        data_args.unsafe_dataset_name,
        label=False,
        template=data_args.prompt_template,
        split=data_args.unsafe_dataset_split,
        revision=data_args.unsafe_dataset_revision,
        name=data_args.unsafe_dataset_config,
        drop_empty=data_args.drop_empty,
        with_place=True,
    )
    return benign, unsafe, data_args.unsafe_dataset_name


def _evaluation_rows(script_args, data_args):
    """The rows of `dataset_test_split`, benign where they have no label."""
    from .. import data, sources

    source, split = script_args.dataset_name, script_args.dataset_test_split
    if Path(source).is_file():
        raise ValueError(f"{source}: a file has no split {split!r} to evaluate; save both with datasets' save_to_disk.")
    rows = sources.read_rows(source, split=split, revision=data_args.dataset_revision, name=script_args.dataset_config)
    return data.to_training_rows(
        rows,
        label=None if "label" in rows.column_names else True,
        template=data_args.prompt_template,
        source=f"{source} ({split})",
        drop_empty=data_args.drop_empty,
    )


def _as_trl_has_it(tokenizer, args):
    """A tokenizer for the checks, with the chat template and end that TRL will give to this one."""
    import copy

    from ..models import load_tokenizer

    path = args.chat_template_path
    if path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    else:
        other = load_tokenizer(path, None)
        tokenizer.chat_template = other.get_chat_template()
        tokenizer.add_tokens([t for t in other.added_tokens_decoder.values() if t.content not in tokenizer.get_vocab()])
    return tokenizer


def _check_paths(argv: list[str]) -> None:
    """Raise `ValueError` for a configuration that is no YAML and for rows or a model that are not there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "model_name_or_path", "model_revision", "chat_template_path", *ROWS):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="*", default=argparse.SUPPRESS)
    flags = vars(parser.parse_known_args(argv)[0])
    if flags.get("config") == []:
        raise ValueError("--config needs a file; write --config FILE.yaml")
    options = _read_config(Path(flags["config"][0])) if "config" in flags else {}
    options |= {name: values if name == "evaluation_prompts" else values[0] for name, values in flags.items() if values}
    for name in ROWS:
        value = options.get(name)
        for source in value if isinstance(value, list) else [value]:
            if isinstance(source, str):
                check_data(source, on_hub=name not in ("evaluation_prompts", "sample_prompts"))
    template = options.get("chat_template_path")
    if isinstance(template, str) and not (os.path.isdir(template) or os.path.isfile(template)):
        what = "neither a .jinja file nor the folder of a tokenizer"
        raise ValueError(f"{template}: chat_template_path is {what}; bring it here (hf download ID --local-dir FOLDER)")
    if isinstance(model := options.get("model_name_or_path"), str):
        files.check_model(model, options.get("model_revision"))


def _read_config(file: Path) -> dict:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; check the path")
    try:
        text = file.read_text(encoding="utf-8")
        if _nodes(yaml.compose(text, yaml.SafeLoader), {}) > MOST_NODES:
            raise ValueError(f"{file}: its aliases (*name) stand for more than {MOST_NODES:,} values; write them out")
        config = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        # Its own message quotes the lines, in which a token may stand.
        line = error.problem_mark.line + 1
        raise ValueError(f"{file}: line {line}: no valid YAML ({error.problem}); correct it") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{file}: no readable YAML (a text file in UTF-8); correct it") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: holds no options; write one `option: value` a line")
    return config


def _nodes(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """How many nodes there are with all aliases written out; without end where one stands for itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # while it is counted
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_nodes(part, sizes) for part in parts)
    return sizes[id(node)]


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
