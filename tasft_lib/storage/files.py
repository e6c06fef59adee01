"""Where things lie, files written whole, JSONL that survives a kill, and what a result came from."""

import hashlib
import json
import logging
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import platformdirs
import psutil
from tqdm.auto import tqdm

# The files of a folder that are a model. A list of what counts: whatever else lies there, be it new, is no part of it.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.bin",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "chat_template.jinja",
)
# What `tasft train` and `tasft export` leave beside the weights.
RECORD = "tasft.json"
# What people call a type of weights, and its name in torch, which need not be imported to know it.
DTYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float64": "float64",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
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
            "memory_gb": round(psutil.virtual_memory().total / 2**30),
            "gpus": _gpu_names(),
        },
    }


def dtype_name(name: str) -> str:
    """torch's name of a type in `DTYPES`, or "auto"; raises `ValueError` for others."""
    if name not in (*DTYPES, "auto"):
        raise ValueError(f"no dtype {name!r}; use one of {', '.join(DTYPES)}, auto.")
    return DTYPES.get(name, name)


def read_object(path: Path) -> dict:
    """The JSON object in a file; raises `ValueError` where it holds none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object, so it is damaged; fetch or make it again.")
    return value


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json of an adapter's folder; raises `ValueError` where it is torn or its base no text."""
    config = read_object(path := folder / "adapter_config.json")
    if not isinstance(config.get("base_model_name_or_path") or "", str):
        raise ValueError(f"{path}: base_model_name_or_path is no text; name the base there.")
    return config


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `ValueError` that names the file where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON, so it is damaged ({error!s:.80}); fetch or make it again.") from error


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all: a killed process leaves the old one or none."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file or folder, beside `path`: it becomes `path` at the end, or is removed after an error.

    What a process that was killed here left of `path` goes too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    begun = re.compile(rf"\.{re.escape(path.name)}\.(\d+)")
    for other in path.parent.iterdir():
        if (match := begun.fullmatch(other.name)) and not psutil.pid_exists(int(match[1])):
            remove(other)
    remove(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        remove(temporary)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Of a full disk each library has an error of its own; it becomes an `OSError` that says so, and what to do."""
    try:
        yield
    except Exception as error:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        if "No space left" not in str(error) and shutil.disk_usage(there).free > 2**20:
            raise
        raise OSError(f"{folder}: no space left on the disk; make room, and run the same command again") from error


def remove(path: Path) -> None:
    """Remove a file or folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """`$TASFT_CACHE`, else the system's place, on Linux `~/.cache/tasft`: what can be made or downloaded again."""
    return Path(os.environ.get("TASFT_CACHE") or platformdirs.user_cache_path("tasft", appauthor=False))


def content_hash(value: Any) -> str:
    """Twelve hex digits that name a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


@cache
def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files in a folder with their names."""
    digest = hashlib.sha256()
    for file in sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@cache
def model_identity(model: str) -> str:
    """The hub id, or the content of a local folder's `MODEL_FILES`: the same weights have one name wherever they lie.

    A card, the record of training, checkpoints and logs beside the weights do not change it.
    """
    folder = Path(model)
    if not folder.is_dir():
        return file_hash(folder) if folder.exists() else model
    parts = [p for p in sorted(folder.iterdir()) if any(fnmatch(p.name, name) for name in MODEL_FILES)]
    return hashlib.sha256("".join(map(file_hash, parts)).encode()).hexdigest()


def check_model(model: str | Path, revision: str | None) -> None:
    """Raise `ValueError` unless `model` is a folder, or a hub id whose commit is given."""
    if not os.path.isdir(model) and revision in (None, "main"):
        raise ValueError(f"{model}: no such folder, and a hub id needs model_revision; give the commit to load.")


def named(source: str, revision: str | None) -> tuple[str, str | None]:
    """(name, revision) that may travel: of a local file or folder its own name and hash, else as given."""
    path = Path(source)
    if not path.exists():
        return source, revision
    is_model = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    return path.name, f"sha256 {(model_identity(source) if is_model else file_hash(path))[:12]}"


def travelling(values: dict[str, Any]) -> dict[str, Any]:
    """`values` for other machines: of an absolute path on this one no more than its last name."""
    absolute = {name: value for name, value in values.items() if isinstance(value, str) and Path(value).is_absolute()}
    return values | {name: Path(path).name for name, path in absolute.items()}


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


def _gpu_names() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    gpu = torch.accelerator.current_accelerator()  # Apple's is called mps
    return [] if gpu is None else [gpu.type] * torch.accelerator.device_count()


def _cpu_name() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor()


def peak_memory_mb() -> int:
    """Most memory this process has held so far, in MB: on the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if sys.platform == "win32":
        return round(psutil.Process().memory_info().peak_wset / 2**20)
    import resource  # psutil knows the peak on Windows only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def read_records(path: Path) -> Iterator[dict]:
    """The objects in the file, in order; nothing where there is none.

    A line torn by a kill is passed over, and so is one that is no longer what `checked` made it, which is told.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict):
            continue
        if "crc32" in record and checked(record)["crc32"] != record["crc32"]:
            message = "%s: line %d is damaged and passed over; what it held is made again"
            logging.getLogger(__name__).warning(message, path, number)
            continue
        record.pop("crc32", None)
        yield record


def checked(record: dict) -> dict:
    """The record with a checksum, which `read_records` looks at."""
    record = {name: value for name, value in record.items() if name != "crc32"}
    return record | {"crc32": zlib.crc32(json.dumps(record).encode())}


def append_record(path: Path, record: dict) -> None:
    """`append_records` with one."""
    append_records(path, [record])


def append_records(path: Path, records: Iterable[dict]) -> None:
    """A line more for each, on disk when this returns; a missing file is made. Let one process write at a time."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            # What follows a torn line must begin on its own line.
            if file.read(1) != b"\n":
                lines = "\n" + lines
        file.write(lines.encode())


KERNEL = "notebook kernel"  # name of a process that is one

# How glibc is told to keep freed memory; read at the start of a process.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": "268435456"}


def project_root() -> Path:
    """The folder of pyproject.toml, from anywhere inside the project; else the current folder."""
    here = Path.cwd()
    return next((p for p in (here, *here.parents) if (p / "pyproject.toml").exists() and (p / "params").exists()), here)


def notebooks() -> dict[str, Path]:
    """Name -> path of the project's notebooks in reading order; `notebooks/02_safety.ipynb` is called safety."""
    paths = sorted((project_root() / "notebooks").glob("[0-9]*_*.ipynb"))
    return {path.stem.split("_", 1)[1]: path for path in paths}


def runs_folder() -> Path:
    """`$TASFT_RUNS`, else `runs/` in the project."""
    return Path(os.environ.get("TASFT_RUNS") or project_root() / "runs")


def keep_freed_memory() -> None:
    """For processes started from here: glibc keeps freed memory, which it reads at process start.

    Handing every freed tensor back to the system costs the training of a small model a quarter of its time (measured).
    """
    for name, value in KEEP_FREED_MEMORY.items():
        os.environ.setdefault(name, value)


def end_with_parent() -> None:
    """For a worker of a pool: it ends when the process that began it has ended, be it killed.

    A killed parent can't stop its workers, and each holds the others' end of the queue open: they would wait for ever.
    With the last of them the fork server and the resource tracker end.
    """
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def show_progress() -> bool:
    """Whether to draw bars: not in CI, and not in a worker process, whose work is one step of its parent's bar."""
    return multiprocessing.current_process().name in ("MainProcess", KERNEL) and "CI" not in os.environ


def progress_bar(steps: Iterable | None = None, *, progress: bool | None = None, **options: Any) -> tqdm:
    """A `tqdm` that `progress` forces on or off; None shows it on a terminal."""
    return tqdm(steps, disable=None if progress is None else not progress, **options)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as a JSONL file, whole or not at all; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path
