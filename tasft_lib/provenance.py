"""What a result came from: hashes of data, models and code, versions, commit and hardware; and files written whole."""

import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

NO_WEIGHTS = ("README.md", "tasft.json", "checkpoint-*", "runs", "_*", "training_args.bin", "*.jsonl")
PACKAGES = ("tasft", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")


def environment() -> dict[str, Any]:
    """Commit, versions and hardware, for manifests and bug reports; no user or host names, no paths.

    A commit ends in "-dirty" where a tracked file differs from it; figures do not count, being what is made.
    """
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "commit": _commit(),
        "versions": packages | {"python": platform.python_version()},
        "hardware": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all: a killed process leaves the old one or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def cache_folder() -> Path:
    """`$TASFT_CACHE`, else `~/.cache/tasft`: what can be made or downloaded again."""
    return Path(os.environ.get("TASFT_CACHE") or Path.home() / ".cache" / "tasft")


def content_hash(value: Any) -> str:
    """Twelve hex digits that name a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


@cache
def file_hash(path: Path, leave_out: tuple[str, ...] = ()) -> str:
    """SHA-256 of a file, or of all files in a folder with their names; `leave_out` names patterns at its top level."""
    digest = hashlib.sha256()
    for file in sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()):
        if path.is_dir() and any(fnmatch(file.relative_to(path).parts[0], pattern) for pattern in leave_out):
            continue
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@cache
def model_identity(model: str) -> str:
    """The hub id, or the content of a local folder: the same weights have one name wherever they lie.

    A card, the record of training, checkpoints and logs beside the weights do not change it.
    """
    return file_hash(Path(model), NO_WEIGHTS) if Path(model).exists() else model


def named(source: str, revision: str | None) -> tuple[str, str | None]:
    """(name, revision) that may travel: of a local file or folder its own name and hash, else as given."""
    path = Path(source)
    return (path.name, f"sha256 {file_hash(path)[:12]}") if path.exists() else (source, revision)


def _commit() -> str | None:
    try:

        def git(*words: str) -> str:
            return subprocess.run(
                ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            ).stdout

        return git("rev-parse", "HEAD").strip() + (
            "-dirty" if git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)figures").strip() else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor()


def peak_memory_mb() -> int:
    """Most memory this process has held so far, in MB: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))
