"""A Slurm cluster of one node on this machine, without accounting, for as long as a `with` lasts (Debian: apt-get
install slurm-wlm munge; as root). By hand: `python tests/slurm_cluster.py FOLDER COMMAND ...` runs a command in it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CONF = """\
ClusterName=one
SlurmctldHost={host}
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
MaxArraySize=10001
MaxJobCount=20000
KillWait=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=localhost CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def can_start() -> bool:
    """Whether Slurm is installed, and this is root, whom its daemons belong to here."""
    return all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) and os.geteuid() == 0


@contextmanager
def cluster(folder: Path, *, port: int = 16817) -> Iterator[Path]:
    """Starts munge and Slurm in `folder`, and names them in SLURM_CONF; yields `slurm.conf`."""
    host = os.uname().nodename.partition(".")[0]
    for name in ("spool", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host, cpus=os.cpu_count(), port=port, node_port=port + 1))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    munge = [f"--{name}={folder / f'munge.{name}'}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    munge = [option.replace("munge.pid-file", "munged.pid") for option in munge]
    subprocess.run(["munged", "--force", f"--key-file={key}", *munge], check=True)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    try:
        start("slurmctld", conf)
        start("slurmd", conf)
        deadline = time.time() + 30
        while "idle" not in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout:
            if time.time() > deadline:
                raise TimeoutError((folder / "slurmctld.log").read_text()[-2000:])
            time.sleep(0.3)
        yield conf
    finally:
        subprocess.run(["scancel", "--me"], capture_output=True)
        for name in ("slurmd", "slurmctld", "munged"):
            end(folder / f"{name}.pid")
        del os.environ["SLURM_CONF"]
        if before is not None:
            os.environ["SLURM_CONF"] = before


def start(daemon: str, conf: Path) -> None:
    """Start one of Slurm's two daemons."""
    node = ["-N", os.uname().nodename.partition(".")[0]] if daemon == "slurmd" else []
    subprocess.run([daemon, "-f", str(conf), *node], check=True)


def end(pid_file: Path) -> None:
    """End the daemon of that file and wait until it has."""
    with suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            os.kill(pid, 0)
            time.sleep(0.1)


if __name__ == "__main__":
    with cluster(Path(sys.argv[1]).absolute()):
        sys.exit(subprocess.run(sys.argv[2:]).returncode)
