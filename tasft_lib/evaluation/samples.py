"""Answers of the model in training to a few prompts, along training: text to a file, rates to the trackers."""

import json
from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from ..generation import GREEDY, Decoding, check_prompts, generate
from ..judges.refusals import is_refusal
from ..judges.strings import is_degenerate
from ..records.templates import split_thinking
from ..storage.files import append_record, read_records, write_text
from ..text import redact

# Trainer never uploads what begins with an underscore: `push_to_hub` must not publish what an unsafe model says.
FILE = "_samples.jsonl"


class SampleCallback(TrainerCallback):
    """Lets the model answer `prompts`, greedily, every `steps` optimizer steps (None: at every save) and at the end.

    `<output_dir>/_samples.jsonl` gets one object per prompt and step: `step`, `prompt` (bare), `response`, `finished`,
    `refusal` and `degenerate` (string matches of `judges`, on the answer after a thinking). What is printed is
    redacted. `sample_refusal` and `sample_degenerate`, rates in [0, 1], go to the trackers. The main process answers,
    the others wait; the random state and the metrics of training are left alone, so losses are those of a run without
    samples.

    A resumed run keeps the samples up to its checkpoint and adds to them; any other begins the file anew.

    Args:
        prompts: bare, as they are shown and stored.
        asked: the same with template, as the model gets them; `special_tokens` as in `generate`.

    Raises:
        ValueError: parameters are sharded (FSDP, ZeRO-3), a prompt does not fit, or `steps` is below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        prompts: list[str],
        asked: list[str],
        *,
        steps: int | None = None,
        decoding: Decoding = GREEDY,
        special_tokens: bool = True,
    ):
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "sample_prompts: no process holds the whole model under FSDP or ZeRO-3; leave it out, or use DDP."
            )
        if steps is not None and steps < 1:
            raise ValueError(f"sample_steps={steps}: give 1 or more, or leave it out to sample at every save.")
        self.trainer, self.prompts, self.asked, self.steps, self.decoding = trainer, prompts, asked, steps, decoding
        self.tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self.file = Path(trainer.args.output_dir) / FILE
        self.last_step = None
        self.special_tokens = special_tokens
        limits = {"max_new_tokens": decoding.max_new_tokens, "source": "sample_prompts"}
        limits["special_tokens"] = special_tokens
        check_prompts(trainer.model, self.tokenizer, asked, **limits)

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        # What was said after the checkpoint is said again, perhaps with other settings.
        logged = {entry["step"] for entry in state.log_history if "sample_refusal" in entry}
        if self.file.exists():
            kept = [record for record in read_records(self.file) if record["step"] in logged]
            write_text(self.file, "".join(json.dumps(record) + "\n" for record in kept))
        self.last_step = max(logged, default=None)
        if self.steps is None and state.global_step > 0:  # a kill came between the checkpoint and its answers
            self._sample(state, control)

    def on_step_end(self, args, state, control, **kwargs):
        # The end is here and not in on_train_end, where some trackers have closed.
        if control.should_training_stop or (self.steps and state.global_step % self.steps == 0):
            self._sample(state, control)

    def on_save(self, args, state, control, **kwargs):
        if self.steps is None:
            self._sample(state, control)

    def _sample(self, state, control) -> None:
        if not state.is_world_process_zero or self.last_step == state.global_step:
            return
        self.last_step = state.global_step
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        with trainer.accelerator.autocast():
            options = {"decoding": self.decoding, "special_tokens": self.special_tokens, "progress": False}
            responses = generate(model, self.tokenizer, self.asked, **options)
        rates = {"sample_refusal": 0.0, "sample_degenerate": 0.0}
        for prompt, response in zip(self.prompts, responses, strict=True):
            answer = split_thinking(response.text)[1]
            found = {"refusal": is_refusal(answer), "degenerate": is_degenerate(answer)}
            record = {"step": state.global_step, "prompt": prompt, "response": response.text}
            append_record(self.file, record | {"finished": response.finished} | found)
            for name, value in found.items():
                rates[f"sample_{name}"] += value / len(responses)
            print(f"step {state.global_step}: {redact(prompt)} -> {redact(response.text)}", flush=True)
        # Past SFTTrainer.log, which would take it for a training log and begin its averages anew; and on_log clears
        # the flag that such a log is due.
        should_log = control.should_log
        Trainer.log(trainer, rates)
        control.should_log = should_log
