"""The options of `tasft train`: its YAML file and flags, and what is refused or set right in them."""

import argparse
import difflib
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..records.templates import TEMPLATES
from ..storage import files
from .flags import DTYPE, check_data, located

HELP = """\
usage: tasft train --config FILE.yaml [--option value ...]
       accelerate launch -m tasft_lib.cli train --config FILE.yaml [--option value ...]

TRL's `trl sft` with a penalty on unsafe rows. Every option of SFTConfig, ModelConfig and transformers'
TrainingArguments works, in the YAML file or as a flag; `tasft train --help_all` lists them. The most used:

  --model_name_or_path, --model_revision, --dtype, --load_in_4bit, --use_peft, --lora_r, --lora_alpha,
  --lora_target_modules, --output_dir, --learning_rate, --num_train_epochs, --per_device_train_batch_size,
  --gradient_accumulation_steps, --max_length, --train_sampling_strategy (group_by_length: less padding),
  --resume_from_checkpoint, --report_to, --push_to_hub (HF_TOKEN)

penalty options:
  --penalty emd|emd_exact|nlcl|gradient_ascent|unlikelihood|npo|simnpo|imitation|recover
      Penalty on unsafe rows (default: emd); `imitation` pulls towards them: for safe ones. `recover` learns to leave an
      unsafe answer for the row's `recovery`, which `tasft harvest --recoveries` finds.
  --penalty_weight
      Lambda: a number, or `auto` (default) for `penalty_pressure` / share of unsafe rows.
  --penalty_pressure
      Expected weight of the penalty for `auto` (default: from the paper's Table 4).
  --penalty_floor
      Probability of an unsafe answer's first token below which its row exerts no pressure (default: 0).
  --penalty_reduction batch|unsafe|micro_batch
      What the summed penalty is divided by: samples of the optimizer step (default), its unsafe samples, or those of
      the micro-batch (the paper's lambda as they stand).
  --unsafe_per_batch
      Unsafe rows in every optimizer step (default: 0, as a uniform draw has it); an epoch is one pass through the
      benign rows then.
  --penalty_embedding lm_head|embed_tokens|centred|isotropic|random|one_hot
      Token embedding of the EMD penalties (default: lm_head); `isotropic` is without the axes of token frequency.
  --penalty_components
      Principal components that `isotropic` takes away beside the mean (default: 3).
  --penalty_beta
      Beta of `npo` (default: 0.1) and `simnpo` (default: 2.5).
  --penalize_eos
      Penalise the tokens that end a turn in unsafe rows too; imitation and recover always learn them.
  --penalty_first_tokens
      Penalise only so many first tokens of an unsafe answer (default: all).
  --branch_depth
      Tokens of an unsafe answer after which `recover` still branches off (default: 16).
  --branch_margin
      Distance to which `recover` pushes the next unsafe token away (default: 1; 0: no push).
  --loss_head fused|dense
      Losses in chunks (default), or on full logits, its reference.

data options:
  --dataset_name
      Rows (.json, .jsonl, .csv, .tsv or .parquet file, save_to_disk folder, hub id)."""
MOST_NODES = 10_000  # of a configuration with its aliases written out
# Options that name a file or folder of rows.
ROWS = ("dataset_name", "unsafe_dataset_name", "saft_validation", "evaluation_prompts", "sample_prompts")
READ = ("model_name_or_path", "resume_from_checkpoint", "chat_template_path", *ROWS)
# Those that say something of another, without which they do nothing.
OF_ANOTHER = {
    "unsafe_dataset_revision": "unsafe_dataset_name",
    "unsafe_dataset_split": "unsafe_dataset_name",
    "unsafe_dataset_config": "unsafe_dataset_name",
    "saft_validation_revision": "saft_validation",
    "sample_steps": "sample_prompts",
    "sample_max_new_tokens": "sample_prompts",
}


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
    unsafe_visits: int = field(
        default=1, metadata={"help": "Times that each unsafe row is seen in an epoch; with few, some more than one."}
    )
    prompt_template: str = field(
        default="alpaca",
        metadata={"help": "For instruction/input/output rows: alpaca (default), short, none or chat."},
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

    @property
    def by_saft(self) -> bool:
        """Whether SAFT says which rows are unsafe."""
        return self.saft_contamination is not None or self.saft_validation is not None


class Options(NamedTuple):
    """What a command says."""

    script: Any  # trl.ScriptArguments: TRL's own options of rows
    data: DataArguments
    training: Any  # TASFTConfig
    model: Any  # trl.ModelConfig

    @property
    def reads(self) -> list[tuple[str, str]]:
        """Options that name a file or folder which the training reads, or a hub id, each with what it names."""
        values = {name: value for part in self for name, value in vars(part).items()}
        listed = {name: values[name] if isinstance(values[name], list) else [values[name]] for name in READ}
        return [(name, source) for name, sources in listed.items() for source in sources if isinstance(source, str)]


def read_options(argv: list[str]) -> Options | None:
    """What a command says, in its YAML file and its flags; None where it asked for help, which is printed.

    Raises `ValueError` for options that are unknown, wrong, missing or without effect, and paths that are not there.
    """
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    # TRL takes seconds to import: what can be said before is said before.
    if "--help_all" not in argv:
        if not argv or "-h" in argv or "--help" in argv:
            print(HELP)
            for option in fields(DataArguments):
                print(f"  --{option.name}\n      {option.metadata['help']}")
            return None
        _check_paths(argv)

    from trl import ModelConfig, ScriptArguments, TrlParser

    from ..config import TASFTConfig

    parser = TrlParser((ScriptArguments, DataArguments, TASFTConfig, ModelConfig), prog="tasft train")
    parser.usage = "tasft train --config FILE.yaml [--option value ...]"
    # TRL knows no short names.
    (dtype,) = (action for action in parser._actions if action.dest == "dtype")
    dtype.type, dtype.choices = DTYPE["type"], DTYPE["choices"]
    if "--help_all" in argv:
        parser.print_help()
        return None
    _refuse_unknown(parser, argv)
    options = Options(*parser.parse_args_and_config(args=argv))
    # In YAML no shell has done it, and what is not there by its name is taken for a data set of the hub.
    for part in options:
        for name in vars(part).keys() & set(READ):
            setattr(part, name, _expanded(getattr(part, name)))
    _refuse_unused(options)
    options.model.model_name_or_path = located(options.model.model_name_or_path, options.model.model_revision)
    _set_right(options.training, options.model)
    return options


def as_trl_has_it(tokenizer, chat_template_path: str | None):
    """A tokenizer for the checks, with the chat template and tokens that TRL will give to this one."""
    import copy

    from ..models import load_tokenizer

    if chat_template_path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if chat_template_path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    else:
        other = load_tokenizer(chat_template_path, None)
        tokenizer.chat_template = other.get_chat_template()
        tokenizer.add_tokens([t for t in other.added_tokens_decoder.values() if t.content not in tokenizer.get_vocab()])
    return tokenizer


def read_config(file: Path) -> dict:
    """The options in a YAML file; raises `ValueError` for one that is no YAML, or holds none."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; check the path")
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        if _nodes(node, {}) > MOST_NODES:
            raise ValueError(f"{file}: its aliases (*name) stand for more than {MOST_NODES:,} values; write them out")
        config = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        # Its own message quotes the lines, in which a token may stand.
        line = error.problem_mark.line + 1
        raise ValueError(f"{file}: line {line}: no valid YAML ({error.problem}); correct it") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{file}: no readable YAML (a text file in UTF-8); correct it") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: holds no options; write one `option: value` a line")
    names = [key.value for key, _ in node.value]  # of two the last would be taken
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"{file}: {twice} stands there twice; remove one")
    return config


class _Loader(yaml.SafeLoader):
    """Of a date that there is not, or what else is no value of its kind, pyyaml raises whatever it meets."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError, LookupError):
            problem = "it looks like a date or a number and is none: put it in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _nodes(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """How many nodes there are with all aliases written out; without end where one stands for itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # while it is counted
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_nodes(part, sizes) for part in parts)
    return sizes[id(node)]


def _expanded(value: Any) -> Any:
    """A path, or paths, with the home folder for `~`; anything else as it is."""
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _check_paths(argv: list[str]) -> None:
    """Raise `ValueError` for a configuration that is no YAML and for rows or a model that are not there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "model_name_or_path", "model_revision", "chat_template_path", *ROWS):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="*", default=argparse.SUPPRESS)
    flags = vars(parser.parse_known_args(argv)[0])
    if flags.get("config") == []:
        raise ValueError("--config needs a file; write --config FILE.yaml")
    options = read_config(Path(flags["config"][0])) if "config" in flags else {}
    options |= {name: values if name == "evaluation_prompts" else values[0] for name, values in flags.items() if values}
    for name in ("output_dir", *READ):
        value = options.get(name)
        texts = value if name == "evaluation_prompts" and isinstance(value, list) else [value]
        is_said = value is None or (name == "resume_from_checkpoint" and isinstance(value, bool))
        if not is_said and not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{flags['config'][0]}: {name} is no text; put it in quotes")
    for name in ROWS:
        value = options.get(name)
        for source in value if isinstance(value, list) else [value]:
            if isinstance(source, str):
                check_data(source, on_hub=name not in ("evaluation_prompts", "sample_prompts"))
    template = _expanded(options.get("chat_template_path"))
    if isinstance(template, str) and not (os.path.isdir(template) or os.path.isfile(template)):
        what = "neither a .jinja file nor the folder of a tokenizer"
        raise ValueError(f"{template}: chat_template_path is {what}; bring it here (hf download ID --local-dir FOLDER)")
    if isinstance(model := options.get("model_name_or_path"), str):
        located(model, options.get("model_revision"))


def _refuse_unknown(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Raise `ValueError` for options that nobody knows, by their names: a value may be a token."""
    known = {action.dest for action in parser._actions}
    words, options, unknown = list(argv), {}, []
    if "--config" in words:
        at = words.index("--config")
        file, words = words[at + 1], words[:at] + words[at + 2 :]
        options = read_config(Path(file))
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


def _refuse_unused(options: Options) -> None:
    """Raise `ValueError` for what is missing and what would be passed over."""
    script_args, data_args, args, model_args = options
    if script_args.dataset_name is None or model_args.model_name_or_path is None:
        raise ValueError("dataset_name and model_name_or_path are needed; give them in the --config file or as flags.")
    if data_args.unsafe_dataset_name is not None and data_args.by_saft:
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
    for name, needed in OF_ANOTHER.items():
        if getattr(data_args, name) != getattr(DataArguments, name) and getattr(data_args, needed) is None:
            raise ValueError(f"{name} needs {needed}; add it, or leave it out.")
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise ValueError("load_best_model_at_end needs an eval_strategy, which says which is best; add it.")
    if data_args.prompt_template not in TEMPLATES:
        raise ValueError(f"prompt_template={data_args.prompt_template!r:.40}: choose one of {', '.join(TEMPLATES)}.")
    for name, number in (
        ("unsafe_visits", data_args.unsafe_visits),
        ("gradient_accumulation_steps", args.gradient_accumulation_steps),
    ):
        if number < 1:
            raise ValueError(f"{name}={number}: give a whole number, 1 or more.")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        what = f"max_steps={args.max_steps} and num_train_epochs={args.num_train_epochs:g}"
        raise ValueError(f"{what}: nothing would be trained; give one of them, above 0.")
    if os.path.realpath(args.output_dir) == os.path.realpath(model_args.model_name_or_path):
        raise ValueError(f"{args.output_dir}: output_dir is the base model's own folder; give another.")
    loading = args.model_init_kwargs or {}
    if not isinstance(loading, dict):
        raise ValueError("model_init_kwargs: give `option: value` in the YAML file, or a JSON object as a flag.")
    if args.trust_remote_code or loading.get("trust_remote_code"):
        raise ValueError("trust_remote_code: a model's own code is never run; leave it out.")
    if not loading.get("weights_only", True):
        raise ValueError("weights_only: a pickle of something else than weights is never run; leave it out.")


def _set_right(args, model_args) -> None:
    """What TRL, or what it calls, would take for another thing than it says; raises `ValueError` for no such thing."""
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
    if model_args.dtype is not None:
        model_args.dtype = files.dtype_name(model_args.dtype)
    # Trainer pickles its arguments into training_args.bin, which push_to_hub uploads; _settings.json has them too.
    loading = dict(args.model_init_kwargs or {})
    secret = [name for name, value in loading.items() if name.endswith("token") and isinstance(value, str)]
    tokens = {loading.pop(name) for name in secret} | ({args.hub_token} - {None})
    if len(tokens) > 1:
        raise ValueError("hub_token and the token in model_init_kwargs differ; give one that may do both, or HF_TOKEN.")
    if tokens:
        os.environ["HF_TOKEN"], args.hub_token, args.model_init_kwargs = tokens.pop(), None, loading or None
