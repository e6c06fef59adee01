"""What a training says of itself while it runs, and what it does when it is told to end: save, and leave."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from ..storage.files import write_json

# What Slurm sends before a limit, and what a machine sends that goes down.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR2") if hasattr(signal, name)]
EVERY = 5.0  # seconds between two writes of how far it is


class Running(TrainerCallback):
    """Writes `running.json` in the arm's folder. On a signal a checkpoint follows the step in hand, whatever the step.

    Then the signal does what it would have done: a job of submitit's submits itself anew, another process ends.
    """

    def __init__(self, folder: Path):
        self.folder, self.received, self.handlers = folder, None, {}
        self.told: dict[str, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are waited for in here; only a main thread gets them."""
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            self._stop_listening()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Who trains, since when, from which step on and to which."""
        where = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        self.told = where | {"started": time.time(), "from_step": state.global_step, "steps": state.max_steps}
        self._tell(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """How far it is, now and then; a checkpoint where a signal has come."""
        if time.time() - self.told["at"] >= EVERY:
            self._tell(state.global_step)
        control.should_save |= self.received is not None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is whole; the signal may have its way."""
        self._tell(state.global_step)
        if self.received is not None:
            number, self.received = self.received, None
            self._stop_listening()
            os.kill(os.getpid(), number)

    def _tell(self, step: int) -> None:
        self.told |= {"step": step, "at": time.time()}
        write_json(self.folder / "running.json", self.told)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def _stop_listening(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
