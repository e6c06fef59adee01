"""What a training goes on from: whole checkpoints in order, what is torn in one, the sums that its log averages."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .files import read_object, remove
from .integrity import damage, seal

# What trainers add up between two lines of their log and over all steps, and begin anew when a training goes on.
_SUMS = (
    "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens", "_metrics", "_sums",
    "_steps_since_log",
)  # fmt: skip


def keep_whole(trainer: Trainer) -> None:
    """Let each checkpoint get the trainer's sums and checksums, a torn one is known by them, before older ones go.

    Trainer lets the older ones go first, counts folders set aside among them, and takes those changed last for new.
    """
    save = trainer._save_checkpoint

    def save_whole(model, trial):
        args = trainer.args
        limit, args.save_total_limit = args.save_total_limit, None
        save(model, trial)
        args.save_total_limit = limit
        folder = Path(args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if not args.save_only_model:
            torch.save(_sums(trainer), folder / _sums_file(args))
        args.distributed_state.wait_for_everyone()  # each process writes its sums and random state
        if args.should_save:
            seal(folder)
            remove_old(trainer)

    trainer._save_checkpoint = save_whole


def remove_old(trainer: Trainer) -> None:
    """Remove the oldest checkpoints beyond `save_total_limit`, but not the one of this step nor the best one."""
    limit, state = trainer.args.save_total_limit, trainer.state
    kept = {f"checkpoint-{state.global_step}", Path(state.best_model_checkpoint or "").name}
    saved = list(by_step(Path(trainer.args.output_dir)).values())
    old = [path for path in saved if path.name not in kept]
    if limit is not None and limit > 0:
        for path in old[: max(0, len(saved) - max(limit, len(saved) - len(old)))]:
            remove(path)


class LengthOrder(TrainerCallback):
    """Rows of one length together in an order that follows from seed and epoch, so a resumed training goes on with it.

    transformers draws it from the global random state, which at the start of an epoch is another one then.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        batches = getattr(train_dataloader, "batch_sampler", None)
        sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)  # a rank's batches, or all
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(args.seed + int(state.epoch))


class GoOn(TrainerCallback):
    """Gives a trainer back what it had added up, so that its log goes on as if it had never stopped."""

    def __init__(self, trainer: Trainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if args.should_save:
            remove_old(self.trainer)  # a kill may have left half of one
        restore_sums(self.trainer, self.checkpoint)


def restore_sums(trainer: Trainer, checkpoint: Path) -> bool:
    """Give a trainer the sums of a checkpoint, if it holds some; `train_loss` is then the mean over all steps."""
    file = checkpoint / _sums_file(trainer.args)
    if not file.exists():
        return False
    for name, value in torch.load(file, map_location=trainer.args.device, weights_only=True).items():
        held = getattr(trainer, name, None)
        if isinstance(value, dict):
            held["train"].update(value)
        elif isinstance(held, dict):
            held["train"] = value.cpu()
        else:
            setattr(trainer, name, value)
    log = trainer.log

    def log_whole(logs: dict[str, float], *args: Any) -> None:
        if "train_loss" in logs:  # Trainer's is that of the steps since
            logs["train_loss"] = trainer._total_loss_scalar / trainer.state.global_step
        log(logs, *args)

    trainer.log = log_whole
    return True


def _sums(trainer: Trainer) -> dict[str, Any]:
    """The trainer's own attributes of `_SUMS`; of those that tell training from evaluation, training's."""
    sums = {name: getattr(trainer, name) for name in _SUMS if hasattr(trainer, name)}
    sums = {name: value.get("train") if isinstance(value, dict) else value for name, value in sums.items()}
    plain = {name: dict(value) if isinstance(value, dict) else value for name, value in sums.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _sums_file(args: Any) -> str:
    return f"log_sums_{args.process_index}.pt"


def by_step(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint in the folder, in the order of training, whole or not."""
    steps = ((path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*"))
    return dict(sorted((int(step), path) for step, path in steps if step.isdecimal()))


def torn(checkpoint: Path) -> list[str]:
    """What in a checkpoint is damaged or was never written, nothing where it is whole."""
    try:
        read_object(checkpoint / "trainer_state.json")  # Trainer writes it last
    except OSError:
        return ["trainer_state.json is missing"]
    except ValueError:
        return damage(checkpoint) or ["trainer_state.json"]
    return damage(checkpoint)
