"""A pytest plugin: nbval's kernels are forks of one process that has imported what the notebooks import.

Every notebook still has a process of its own; but for the imports, which take ten CPU seconds, nothing is shared.
"""

import gc
import multiprocessing
import os

from jupyter_client.provisioning import local_provisioner

from tasft_lib.storage.files import end_with_parent

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "ipykernel.kernelapp",
        "tasft_lib.bench.measure",
        "tasft_lib.experiments.designs",
        "tasft_lib.reporting.figures",
        "tasft_lib.reporting.tables",
    ]
)


def serve(ready, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Be the kernel that `ipykernel_launcher` would be with these arguments."""
    from ipykernel.kernelapp import launch_new_instance

    end_with_parent()
    gc.freeze()
    os.setsid()
    os.environ.update(environment)
    os.chdir(folder)
    ready.send("in a group of its own, so that a signal to it reaches nobody else")
    launch_new_instance(argv=arguments)


class Kernel:
    """What jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], *, env: dict[str, str], cwd: str, **_):
        # Where matplotlib is imported before the kernel starts, it can't be told by the kernel where figures go.
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
        ours, theirs = context.Pipe()
        arguments = command[command.index("ipykernel_launcher") + 1 :]
        self.process = context.Process(target=serve, args=(theirs, arguments, env, cwd))
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


local_provisioner.launch_kernel = Kernel
