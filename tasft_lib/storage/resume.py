"""What a training goes on from: its checkpoints, sealed when written, in order, and what is torn in one."""

from pathlib import Path

from transformers import TrainerCallback

from .files import read_object
from .integrity import damage, seal


class Seal(TrainerCallback):
    """Checksums in each checkpoint when all else is in it, so a torn one is known."""

    def on_save(self, args, state, control, **kwargs) -> None:
        args.distributed_state.wait_for_everyone()  # each process writes its own random state
        if args.should_save:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


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
