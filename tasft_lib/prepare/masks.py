"""What training makes of each token of a row: read, learnt or pushed away. The trainer says it, nothing is worked out.

A `TASFTTrainer` around a model of one tiny layer prepares the rows, collates them and computes a loss up to where it
asks the model; what it would have asked is shown.
"""

import html
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ..config import PULLS, TASFTConfig
from ..losses import PENALTIES
from ..trainer import TASFTTrainer

READ, LEARNT, PENALISED = "read", "learnt", "penalised"
# The options of training on which the masks hang.
OPTIONS = (
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "chat_template_path",
    "eos_token",
    "penalty",
    "penalize_eos",
    "penalty_first_tokens",
    "branch_depth",
    "seed",
    "packing",
)
_ANSI = {READ: "2", LEARNT: "32", PENALISED: "31;1"}
_CSS = {READ: "opacity:.55", LEARNT: "background:#c8e6c9;color:#111", PENALISED: "background:#ffcdd2;color:#111"}


@dataclass(frozen=True)
class RowMasks:
    """A row's tokens as text, and of each what training does with it; none where training drops the row.

    Of rows packed into one sequence `place` names all, and `label` is None. `pushed`: the tokens that penalty `recover`
    pushes away where its recovery begins, which are none of the row's.
    """

    place: str
    label: bool | None
    tokens: list[str]
    uses: list[str]
    max_length: int | None
    pushed: str = ""

    @property
    def title(self) -> str:
        """The row, its label and how many tokens there are of each use."""
        if not self.tokens:
            return f"{self.place}: left out, max_length={self.max_length} leaves nothing of its answer"
        counts = ", ".join(f"{self.uses.count(use)} {use}" for use in (READ, LEARNT, PENALISED) if use in self.uses)
        end = f", ends at max_length={self.max_length}" if len(self.tokens) == self.max_length else ""
        kind = "packed" if self.label is None else "benign" if self.label else "unsafe"
        pushed = f", {_shown(self.pushed)!r} pushed away where the recovery begins" if self.pushed else ""
        return f"{self.place}: {kind}, {len(self.tokens)} tokens: {counts}{pushed}{end}"

    def text(self, *, colours: bool) -> str:
        """The tokens for a terminal; without colours a line for each run of tokens of one use."""
        lines = [self.title, ""]
        for use, tokens in self._runs():
            if colours:
                lines[-1] += "".join(f"\033[{_ANSI[use]}m{_shown(token)}\033[0m" for token in tokens)
            else:
                lines.append(f"  {use:<9} {'|'.join(map(_shown, tokens))}".replace("\n", "\n            "))
        return "\n".join(line.rstrip() for line in lines if line)

    def _repr_html_(self) -> str:
        spans = [
            f'<span style="{_CSS[use]};border-right:1px solid #8884" title="{use}">{html.escape(_shown(token))}</span>'
            for token, use in zip(self.tokens, self.uses, strict=True)
        ]
        body = "".join(spans).replace("\n", "<br>")
        return f'<p><b>{html.escape(self.title)}</b></p><div style="font-family:monospace">{body}</div>'

    def _runs(self) -> list[tuple[str, list[str]]]:
        runs: list[tuple[str, list[str]]] = []
        for token, use in zip(self.tokens, self.uses, strict=True):
            if not runs or runs[-1][0] != use:
                runs.append((use, []))
            runs[-1][1].append(token)
        return runs


class Masks(list):
    """`RowMasks`, shown one below the other in a notebook."""

    def _repr_html_(self) -> str:
        return "".join(row._repr_html_() for row in self)


def first_of_each(rows: Dataset, n: int) -> Dataset:
    """The first `n` unsafe rows and the first `n` benign ones."""
    sides = [[i for i, label in enumerate(rows["label"][:]) if label is wanted][:n] for wanted in (False, True)]
    return rows.select(sides[0] + sides[1])


def masks(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Masks:
    """What training does with each token of `rows` (see `forms.to_training_rows`, with `place`), packed where it packs.

    Args:
        model, revision: folder or hub id whose generation config may name more tokens that end a turn.
        options: those of `OPTIONS`, as in training. Of `recover` a row has one of its branches, for in training it is
            drawn by the row's number among all.
    """
    # Penalties that push away read the same tokens.
    if options.get("penalty") in PENALTIES and options["penalty"] not in PULLS:
        options["penalty"] = "emd"
    shows_bars = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(rows, tokenizer, model, revision, folder, options)
            batches = trainer._remove_unused_columns(trainer.train_dataset, "training")
            shown = [_row_masks(trainer, rows, batch, tokenizer, options.get("max_length")) for batch in batches]
    finally:
        if shows_bars:
            enable_progress_bars()
    if options.get("packing"):
        return Masks(shown)
    of_place = {row.place: row for row in shown}
    dropped = [RowMasks(row["place"], row["label"], [], [], options.get("max_length")) for row in rows]
    return Masks(of_place.get(row.place, row) for row in dropped)


def _trainer(
    rows: Dataset, tokenizer, model: str | None, revision: str | None, folder: str, options: dict[str, Any]
) -> TASFTTrainer:
    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(len(tokenizer), tokenizer.vocab_size),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    if model is not None:
        with suppress(OSError):  # where it has none, training finds none either
            tiny.generation_config = GenerationConfig.from_pretrained(model, revision=revision)
    config = TASFTConfig(
        output_dir=folder,
        penalty_weight=1.0,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    trainer = TASFTTrainer(tiny, config, train_dataset=rows, processing_class=tokenizer)
    trainer.model.eval()  # counts of a step are made in training alone
    return trainer


def _row_masks(trainer: TASFTTrainer, rows: Dataset, row: dict, tokenizer, max_length: int | None) -> RowMasks:
    asked = _asked(trainer, trainer.data_collator([row]))
    ids, labels, unsafe = (asked[name][0].tolist() for name in ("input_ids", "labels", "unsafe_sample"))
    pulls = trainer.args.penalty in PULLS
    # Nothing predicts the first token.
    uses = [
        READ if i == 0 or label == -100 else LEARNT if pulls or of_unsafe < 0 else PENALISED
        for i, (label, of_unsafe) in enumerate(zip(labels, unsafe, strict=True))
    ]
    pushed = [] if asked["pushed"] is None else asked["pushed"][asked["pushed"] >= 0].tolist()
    is_packed = isinstance(row["label"], list)
    numbers = dict.fromkeys(row["_tasft_row"]) if is_packed else [row["_tasft_row"]]
    place, label = ", ".join(rows[i]["place"] for i in numbers), None if is_packed else row["label"]
    tokens = [tokenizer.decode([token]) for token in ids]
    return RowMasks(place, label, tokens, uses, max_length, tokenizer.decode(pushed))


def _asked(trainer: TASFTTrainer, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the trainer's loss asks its model for: `input_ids`, `labels` `[1, T]` and which are unsafe (not -1)."""

    class Asked(Exception):
        pass

    def model(**inputs):
        raise Asked(inputs)

    try:
        trainer.compute_loss(model, batch)
    except Asked as asked:
        return asked.args[0]
    raise RuntimeError("the trainer's loss did not ask its model")


def _shown(token: str) -> str:
    """A token with its line breaks marked, and no control character that a terminal would obey."""
    visible = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in token)
    return visible.replace("\n", "⏎\n")
