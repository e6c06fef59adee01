"""`tasft train`: TRL's SFT with a penalty on the rows labelled unsafe."""

import logging
import os
import re
from pathlib import Path

from ..storage import files, integrity
from .train_options import Options, as_trl_has_it, read_options


def main(argv: list[str]) -> None:
    options = read_options(argv)
    if options is None:
        return

    from ..models import load_tokenizer, train_from
    from ..records import data, forms
    from ..storage.checkpoints import check_weights
    from . import run_folder

    _, data_args, args, model_args = options
    folder, base, revision = Path(args.output_dir), model_args.model_name_or_path, model_args.model_revision
    with files.full_disk_named(folder), integrity.folder_lock(folder):
        tokenizer = load_tokenizer(base, revision)
        checked_by = as_trl_has_it(tokenizer, args.chat_template_path)
        benign, unsafe, labels_from = _read_rows(options)
        benign, unsafe = _fit_rows(benign, unsafe, options, checked_by)
        mixed, row_names = _mix(benign, unsafe, labels_from, options, checked_by)
        evaluated = _evaluation_rows(options)
        sample_prompts = forms.read_prompts(data_args.sample_prompts) if data_args.sample_prompts else []

        stops = {"patience": data_args.early_stopping_patience}
        asked = run_folder.settings(args, model_args, data.fingerprint(mixed), files.model_identity(base), **stops)
        if run_folder.is_finished(folder, asked) and not data_args.overwrite:
            print(f"{folder} holds this training, finished; give --overwrite to train it again")
            return
        check_weights(base, revision, tokenizer=tokenizer)
        with args.main_process_first(local=False):
            how = {"overwrite": data_args.overwrite, "resume": args.resume_from_checkpoint, "reads": options.reads}
            checkpoint = run_folder.begin(folder, asked, **how)

        trainer = _trainer(options, tokenizer, mixed, evaluated)
        trainer.row_names = row_names
        _add_callbacks(trainer, options, mixed, sample_prompts)
        say = trainer.accelerator.print
        rows = f"{len(benign)} benign and {len(unsafe)} unsafe rows at hand, {len(mixed)} in the mix"
        say(f"{_method(trainer, mixed)}: {rows}")
        if checkpoint is not None:
            say(f"going on from {checkpoint}")
        train_from(trainer, checkpoint)
        _save(trainer, options, mixed)
        trainer.end()


def _read_rows(options: Options) -> tuple:
    """(benign rows, unsafe rows, what says which those are), each row with its place."""
    from ..records import data, forms, sources

    script_args, data_args, _, _ = options
    rows = sources.read_rows(
        script_args.dataset_name,
        split=script_args.dataset_train_split,
        revision=data_args.dataset_revision,
        name=script_args.dataset_config,
    )
    rows = forms.to_training_rows(
        rows,
        label=None if "label" in rows.column_names else True,
        template=data_args.prompt_template,
        source=script_args.dataset_name,
        drop_empty=data_args.drop_empty,
        with_place=True,
    )
    if data_args.by_saft:
        rows = _labelled_by_saft(rows, options)
    benign, unsafe = data.by_label(rows)
    if data_args.unsafe_dataset_name is None:
        return benign, unsafe, "labels by SAFT" if data_args.by_saft else "its own labels"
    if len(unsafe):
        what = "%s: left out %d rows labelled false, since unsafe_dataset_name gives the unsafe rows"
        logging.getLogger(__name__).warning(what, script_args.dataset_name, len(unsafe))
    unsafe = forms.read_training_rows(
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


def _labelled_by_saft(rows, options: Options):
    """`rows` with `label` False for those that SAFT finds harmful with the model to be tuned.

    What it leaves in `<output_dir>/_saft` is never pushed to the hub.
    """
    from trl import get_quantization_config

    from ..models import load_tokenizer, load_weights
    from ..records import forms
    from ..saft.find import Search
    from ..saft.workflow import label_rows

    script_args, data_args, args, model_args = options
    validation = data_args.saft_validation and forms.read_training_rows(
        data_args.saft_validation,
        label=None,
        template=data_args.prompt_template,
        revision=data_args.saft_validation_revision,
        drop_empty=data_args.drop_empty,
        with_place=True,
    )

    base, revision, dtype = model_args.model_name_or_path, model_args.model_revision, model_args.dtype
    quantised = get_quantization_config(model_args)

    def load() -> tuple:
        model = load_weights(base, revision, dtype=dtype, device=args.device, quantization_config=quantised)
        return model, load_tokenizer(base, revision)

    return label_rows(
        rows,
        Search(contamination=data_args.saft_contamination, validation=validation),
        load,
        folder=Path(args.output_dir) / "_saft",
        source=script_args.dataset_name,
        model_name=Path(base).name,
        identity=[files.model_identity(base), revision, dtype, quantised and quantised.to_dict()],
        max_length=args.max_length,
    )


def _fit_rows(benign, unsafe, options: Options, checked_by) -> tuple:
    """(benign rows, unsafe rows), without those that are too long where that is asked for.

    Raises `ValueError` for messages where `checked_by`, the tokenizer, has no chat template, and for an unsafe row
    without the recovery that its penalty needs.
    """
    from ..records import data, forms, tokens

    script_args, data_args, args, _ = options
    unsafe_source = data_args.unsafe_dataset_name or script_args.dataset_name
    for rows, source in ((benign, script_args.dataset_name), (unsafe, unsafe_source)):
        if len(rows) and forms.is_chat(rows) and checked_by.chat_template is None:
            what = "messages, and the model has no chat template"
            raise ValueError(f"{source}: {what}; give chat_template_path, or write text")
    if args.penalty == "recover":
        data.require_recoveries(unsafe)
    if data_args.drop_long:
        long = {"tokenizer": checked_by, "max_length": args.max_length}
        benign = tokens.drop_long(benign, source=script_args.dataset_name, **long)
        unsafe = tokens.drop_long(unsafe, source=unsafe_source, **long)
    return benign, unsafe


def _mix(benign, unsafe, labels_from: str, options: Options, checked_by) -> tuple:
    """(the rows of the run, drawn, shuffled and checked; the name of each, for messages)."""
    from ..records import data, forms

    script_args, data_args, args, _ = options
    named = data_args.unsafe_dataset_name is not None or data_args.by_saft
    is_plain = data_args.n_unsafe == 0 or (len(unsafe) == 0 and not named)
    mixed = data.draw(
        benign,
        None if is_plain else unsafe,
        n_benign=data_args.n_benign,
        n_unsafe=data_args.n_unsafe,
        unsafe_visits=data_args.unsafe_visits,
        seed=args.seed,
        source=f"{script_args.dataset_name} with {labels_from}",
        evaluation_prompts=[p for file in data_args.evaluation_prompts for p in forms.read_prompts(file)],
        tokenizer=checked_by,
        max_length=args.max_length,
        with_place=True,
    )
    return mixed.remove_columns("place"), mixed["place"][:]


def _evaluation_rows(options: Options):
    """The rows of `dataset_test_split`, benign where they have no label; None where none are evaluated."""
    from ..records import forms, sources

    script_args, data_args, args, _ = options
    if args.eval_strategy == "no":
        return None
    source, split = script_args.dataset_name, script_args.dataset_test_split
    if Path(source).is_file():
        raise ValueError(f"{source}: a file has no split {split!r} to evaluate; save both with datasets' save_to_disk.")
    rows = sources.read_rows(source, split=split, revision=data_args.dataset_revision, name=script_args.dataset_config)
    return forms.to_training_rows(
        rows,
        label=None if "label" in rows.column_names else True,
        template=data_args.prompt_template,
        source=f"{source} ({split})",
        drop_empty=data_args.drop_empty,
    )


def _trainer(options: Options, tokenizer, mixed, evaluated):
    """The trainer, with the model that it loads."""
    from trl import get_peft_config, get_quantization_config

    from ..models import sort_targets
    from ..trainer import TASFTTrainer

    _, _, args, model_args = options
    base, revision = model_args.model_name_or_path, model_args.model_revision
    # TRL warns with the end of a prompt where its tokens are others before an answer than alone.
    logging.getLogger("trl.trainer.sft_trainer").addFilter(_without_text)
    args.model_init_kwargs = {
        "revision": revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (args.model_init_kwargs or {})
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.revision = revision if not os.path.isdir(base) else None
    trainer = TASFTTrainer(
        base,
        args,
        train_dataset=mixed,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )
    sort_targets(trainer.model)
    return trainer


def _without_text(record: logging.LogRecord) -> bool:
    record.msg = re.sub(
        r"(left out of the training sequence: ).*(\. The model is)", r"\1(not shown)\2", str(record.msg)
    )
    return True


def _add_callbacks(trainer, options: Options, mixed, sample_prompts: list[str]) -> None:
    """The user's README.md left alone, early stopping and answers along training."""
    from transformers import EarlyStoppingCallback

    from ..evaluation.samples import SampleCallback
    from ..generation import Decoding
    from ..records.templates import ask
    from . import run_folder

    data_args = options.data
    run_folder.keep_readme(trainer)
    if data_args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(data_args.early_stopping_patience))
    if sample_prompts:
        # As the training rows have theirs: in the chat template, or in ours.
        template = data_args.prompt_template if isinstance(mixed[0]["prompt"], str) else "chat"
        processor = trainer.processing_class
        templated = ask(sample_prompts, template, getattr(processor, "tokenizer", processor))
        steps = {"steps": data_args.sample_steps, "special_tokens": template != "chat"}
        decoding = Decoding(max_new_tokens=data_args.sample_max_new_tokens)
        trainer.add_callback(SampleCallback(trainer, sample_prompts, templated, decoding=decoding, **steps))


def _method(trainer, mixed) -> str:
    """What is done to the unsafe rows, in words."""
    args = trainer.args
    if False not in mixed["label"][:]:
        return "plain SFT, nothing is penalised (no row is unsafe)"
    if trainer.penalty_weight == 0:
        return f"{args.penalty}, λ = 0: nothing is penalised, unsafe rows are passed over"
    return f"{args.penalty}, λ = {trainer.penalty_weight:.4g}, reduction {args.penalty_reduction}"


def _save(trainer, options: Options, mixed) -> None:
    """The model, and beside it the record of how it was trained; to the hub too, where that is asked for."""
    from ..publish.card import training_record

    script_args, data_args, args, model_args = options
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        sources = {script_args.dataset_name: data_args.dataset_revision}
        if data_args.unsafe_dataset_name is not None:
            sources[data_args.unsafe_dataset_name] = data_args.unsafe_dataset_revision
        described = {"template": data_args.prompt_template, "unsafe_visits": data_args.unsafe_visits}
        record = training_record(trainer, model_args, mixed, sources, **described)
        record |= {"labels_by_saft": data_args.by_saft} | files.environment()
        files.write_json(Path(args.output_dir) / files.RECORD, record)
    trainer.accelerator.print(f"saved to {args.output_dir}")
    if args.push_to_hub:
        is_local = os.path.exists(script_args.dataset_name)
        trainer.push_to_hub(dataset_name=None if is_local else script_args.dataset_name)
