"""A row's label: read in one place, carried to its tokens; which of its tokens end a turn, and where rows begin.

What `trainer` needs to know of a batch beside the equations.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from torch import Tensor
from trl import SFTConfig, pack_dataset
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import global_then_local_main_first, pad


def read_label(value: Any, row: str, n_tokens: int | None = None) -> Tensor:
    """A label, wherever one is read, `[]`, or one per token: booleans of Python, numpy or torch. Else a ValueError."""
    with suppress(RuntimeError, TypeError, ValueError):  # what torch says of other things than numbers
        if (label := torch.as_tensor(value)).dtype == torch.bool and label.shape in ((), (n_tokens,)):
            return label
    raise ValueError(f"{row}: label is of type {type(value).__name__}; use true (benign) or false (unsafe).")


def require_labels(dataset: Any, name: str) -> None:
    """The columns to train on and a boolean `label` on every row that is there yet, or a ValueError that names one."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return  # TRL says what it takes
    columns = get_dataset_column_names(dataset)
    needed = ("label",) if "input_ids" in columns else ("prompt", "completion", "label")
    if missing := [column for column in needed if column not in columns]:
        raise ValueError(
            f"{name} has no {missing[0]!r} column (columns: {', '.join(columns)}); it needs 'prompt', 'completion' "
            "and 'label', true (benign) or false (unsafe)."
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
        for row, label in enumerate(dataset.with_format(None)["label"][:], start=1):
            read_label(label, f"{name}, row {row}")


def read_row(row: dict[str, Any], number: int, bos: str | None) -> dict[str, Any]:
    """What is changed in a row before it is tokenised: its label read, its number kept, a `bos` that is added gone."""
    read = {"label": bool(read_label(row["label"], f"row {number + 1}")), "_tasft_row": number}
    return read | ({"prompt": row["prompt"].removeprefix(bos)} if bos and isinstance(row.get("prompt"), str) else {})


def added_bos(processing_class: Any) -> str | None:
    """The BOS that the tokenizer puts before every text; None where it puts none."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    bos = tokenizer.bos_token_id
    return tokenizer.bos_token if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def pack(dataset: Dataset | IterableDataset, args: SFTConfig) -> Dataset | IterableDataset:
    """TRL's packing of tokenised rows, with the label of each row carried along per token."""
    if args.max_length is None:
        raise ValueError("packing=True needs a max_length.")
    with global_then_local_main_first():
        names = ("label", "_tasft_row")  # per token from here on
        dataset = dataset.map(lambda row: {name: [row[name]] * len(row["input_ids"]) for name in names})
        per_token = [name for name in ("input_ids", "labels", "pushed") if name in get_dataset_column_names(dataset)]
        dataset = dataset.select_columns([*per_token, *names])
        dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


@dataclass
class UnsafeLabelCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with `unsafe` per token, bool, shaped like `input_ids`, and the numbers `rows` of the rows.

    `pushed`, where rows have it (see `branches`), is shaped so too. A packed row has a list of labels and of numbers,
    one per token.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        numbers = [torch.as_tensor(row.get("_tasft_row", [])).flatten().long() for row in examples]
        batch["rows"] = torch.cat(numbers).unique()
        lengths = [len(row["input_ids"]) for row in examples]
        unsafe = [~read_label(row.get("label"), "a row", n).expand(n) for row, n in zip(examples, lengths, strict=True)]
        columns = {"unsafe": (unsafe, False)}
        if "pushed" in examples[0]:
            columns["pushed"] = ([torch.as_tensor(row["pushed"]) for row in examples], -100)
        for name, (values, fill) in columns.items():
            values = [torch.cat(values)] if self.padding_free else values
            multiple = self.pad_to_multiple_of
            batch[name] = pad(values, padding_value=fill, padding_side="right", pad_to_multiple_of=multiple)
        return batch


def turn_ends(processing_class: Any, tokenizer: Any, chat_template: str | None, eos: Any) -> tuple[Tensor, Tensor]:
    """(tokens each of which ends a turn, the model's `eos` among them; the sequence by which the template ends it)."""
    sequence, added = end_of_turn(processing_class, tokenizer, chat_template), tokenizer.added_tokens_decoder
    single = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    single |= {token for token in sequence if token in added and added[token].special}
    return torch.tensor(sorted(single)), torch.tensor(sequence, dtype=torch.long)


def end_of_turn(processing_class: Any, tokenizer: Any, chat_template: str | None) -> list[int]:
    """The tokens by which the chat template ends an assistant's turn; none where there is no template."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = processing_class.apply_chat_template(turns, tokenize=False, chat_template=chat_template)
    except (TemplateError, TypeError, ValueError):  # no template, or one for turns of another form
        return []
    return tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"]


def ends_turn(labels: Tensor, eos: Tensor, end_of_turn: Tensor) -> Tensor:
    """Which `labels` `[B, T]` end a turn: tokens `eos`, the sequence `end_of_turn`, and what follows of it after them.

    So a newline that a template puts after its <|im_end|> is the end too.
    """
    eos, end_of_turn = eos.to(labels.device), end_of_turn.to(labels.device)
    ends = torch.isin(labels, eos)
    if len(end_of_turn):
        windows = F.pad(labels, (0, len(end_of_turn) - 1), value=-100).unfold(1, len(end_of_turn), 1)
        ends |= (windows == end_of_turn).all(-1)
    for token in end_of_turn:
        ends[:, 1:] |= ends[:, :-1] & (labels[:, 1:] == token)
    return ends


def penalised(
    labels: Tensor,
    unsafe: Tensor,
    sample: Tensor,
    n_samples: int,
    *,
    ends: tuple[Tensor, Tensor] | None,
    first: int | None,
) -> Tensor:
    """`labels` `[B, T]` without the tokens of unsafe rows that end a turn (`turn_ends`) or come after the `first`."""
    if ends is not None:
        labels = labels.masked_fill(ends_turn(labels, *ends) & unsafe, -100)
    if first is not None:
        labels = labels.masked_fill((place_in_sample(labels != -100, sample, n_samples) > first) & unsafe, -100)
    return labels


def samples_of(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The index of the sample that each position belongs to, `[B, T]`, and how many samples there may be."""
    if "attention_mask" not in batch:  # padding-free: all samples in one row
        starts = batch["position_ids"] == 0  # TRL counts them from 1.16 on
        n_samples = len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else int(starts.sum())
        return starts.cumsum(-1) - 1, n_samples
    n_samples, length = batch["input_ids"].shape
    return torch.arange(n_samples, device=batch["input_ids"].device)[:, None].expand(-1, length), n_samples


def place_in_sample(scored: Tensor, sample: Tensor, n_samples: int) -> Tensor:
    """How many positions of its sample are scored up to each position, itself included: `[B, T]`."""
    before = torch.bincount(sample[scored], minlength=n_samples).cumsum(0).roll(1)
    before[0] = 0
    return scored.flatten().cumsum(0).view_as(scored) - before[sample]


def count(batch: dict[str, Tensor]) -> Tensor:
    """[benign tokens, samples, unsafe samples] of one micro-batch; only tokens that the shifted loss sees count."""
    sample, n_samples = samples_of(batch)
    scored, unsafe = batch["labels"][:, 1:] != -100, batch["unsafe"][:, 1:]

    def samples_with(mask: Tensor) -> Tensor:
        return (torch.bincount(sample[:, 1:][mask], minlength=n_samples) > 0).sum()

    return torch.stack([(scored & ~unsafe).sum(), samples_with(scored), samples_with(scored & unsafe)])
