"""Notebook kernels that are forks of one process which has imported the libraries; imports take ten CPU seconds each.

Every notebook still has a process of its own. What a kernel starts in turn, the workers that train its arms, are forks
of the same process (`multiprocessing` hands a fork server on).
"""

import gc
import multiprocessing
import os
from typing import Any

from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from ..storage.files import KERNEL, end_with_parent

NAME = "tasft-fork"  # as it is registered in pyproject.toml


def fork_kernels() -> None:
    """Let the kernels that this process starts be forks. Windows has none; a GPU that was looked at survives none."""
    import torch

    if "forkserver" in multiprocessing.get_all_start_methods() and not torch.accelerator.is_available():
        os.environ["JUPYTER_DEFAULT_PROVISIONER_NAME"] = NAME
        # A kernel that is stopped leaves semaphores; the tracker removes them, and warns of what no user can mend.
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")


class ForkProvisioner(LocalProvisioner):
    """What jupyter_client starts a local kernel with, but that it forks and executes no new interpreter."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        self.cwd = kwargs.get("cwd") or os.getcwd()
        self.process = _Kernel(cmd[cmd.index("ipykernel_launcher") + 1 :], kwargs["env"], self.cwd)
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class _Kernel:
    """What a provisioner asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: str):
        # Where matplotlib is imported before the kernel starts, it can't be told by the kernel where figures go.
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
        context = multiprocessing.get_context("forkserver")
        # tqdm first: where a kernel is loaded already, it draws widgets, and whoever runs a batch sees none.
        libraries = ["tqdm.auto", "ipykernel.kernelapp", f"{__package__}.designs"]
        context.set_forkserver_preload([*libraries, "tasft_lib.bench.measure", "tasft_lib.reporting.figures"])
        ours, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, arguments, environment, folder), name=KERNEL)
        self.process.start()
        ours.recv()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()


def _serve(ready, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Be the kernel that `ipykernel_launcher` would be with these arguments."""
    from ipykernel.kernelapp import launch_new_instance

    end_with_parent()
    gc.freeze()
    os.setsid()
    os.environ.update(environment)
    os.chdir(folder)
    ready.send("in a group of its own, so that a signal to it reaches nobody else")
    # Else each prints ten lines to the driver's terminal, on how to connect to it.
    launch_new_instance(argv=[*arguments, "--quiet"])
