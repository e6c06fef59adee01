"""Folders that stay whole: one process at a time, checksums of what is finished, and what is damaged set aside."""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import cache_folder, content_hash, remove, write_text

SUMS = "SHA256SUMS"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time works in `folder`, which need not exist: another waits, and says so on stderr.

    Nothing is left in or beside the folder, and a killed process holds no lock. Of a launch of several processes the
    first takes it for all. Not to be taken twice by one process.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    name = f"{content_hash(os.path.realpath(folder))}.lock"
    try:
        file = cache_folder() / "locks" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError:  # a home that is read-only or full
        file = Path(tempfile.gettempdir()) / f"tasft-{name}"
    with locked(file, folder):
        yield


@contextmanager
def locked(file: Path, what: Any) -> Iterator[None]:
    """Holds the lock `file`, of those who work on `what`; a line on stderr where another process does."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"{what}: another process works on it; waiting until it has ended (Ctrl-C to stop).", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def disk_faults(folder: Path) -> list[str]:
    """What the folder's disk does not keep of what arms rely on, a line each: locks, renames.

    Seen by two processes of this host; a network disk may still tell another host late.
    """
    faults = []
    file = folder / ".disk"
    attempt = "import filelock, sys; filelock.FileLock(sys.argv[1]).acquire(timeout=0)"
    with FileLock(file):
        other = subprocess.run([sys.executable, "-c", attempt, str(file)], capture_output=True, text=True)
        if "Timeout" not in other.stderr:
            faults.append(f"{folder}: a lock held by one process does not stop another; let one driver run at a time.")
    write_text(file, "old")
    with file.open(encoding="utf-8") as reader:
        write_text(file, "new")
        if (reader.read(), file.read_text(encoding="utf-8")) != ("old", "new"):
            faults.append(f"{folder}: a file that is replaced changes under who reads it; take another disk.")
    remove(file)
    return faults


def seal(path: Path, *, without: str | None = None) -> None:
    """Record the SHA-256 of a file in `<path>.sha256`, of a folder's files in its `SHA256SUMS`, for `damage`.

    `sha256sum -c` reads both. Files in the subfolder `without` may change or go.
    """
    folder = path if path.is_dir() else path.parent
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    names = [file.relative_to(folder) for file in files]
    lines = [f"{sha256(folder / n)}  {n.as_posix()}\n" for n in names if n.parts[0] not in (SUMS, without)]
    write_text(_sums_of(path), "".join(lines))


def is_sealed(path: Path) -> bool:
    """Whether `seal` has seen the file or folder."""
    return _sums_of(path).exists()


def damage(path: Path) -> list[str]:
    """The files of `path` that are gone or not what `seal` recorded; none where it recorded nothing."""
    sums = _sums_of(path)
    if not sums.exists():
        return []
    folder, damaged = (path if path.is_dir() else path.parent), []
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        recorded, _, name = line.partition("  ")
        if not (folder / name).is_file() or sha256(folder / name) != recorded:
            damaged.append(name)
    return damaged


def set_aside(path: Path, names: Iterable[str] = ()) -> None:
    """Rename a damaged file, or a folder with damaged files of these `names`, to `<path>.damaged`, and say so.

    An older one of that name is removed. Whoever calls this makes it again.
    """
    if not path.exists():
        logging.getLogger(__name__).warning("%s is gone: it is made again", path)
        return
    aside = path.with_name(f"{path.name}.damaged")
    remove(aside)
    os.replace(path, aside)
    which = ", ".join(name for name in names if name != path.name)
    message = "%s is damaged%s: it is made again, and kept as %s"
    logging.getLogger(__name__).warning(message, path, which and f" ({which})", aside.name)


def keep_if_whole(path: Path) -> bool:
    """Set a file or folder aside that is not as `seal` saw it, see `set_aside`; returns whether one is there, whole."""
    if path.exists() and (names := damage(path)):
        set_aside(path, names)
    return path.exists()


def _sums_of(path: Path) -> Path:
    return path / SUMS if path.is_dir() else path.with_name(f"{path.name}.sha256")


def sha256(file: Path) -> str:
    """SHA-256 of a file, read again where its size or time has changed."""
    state = file.stat()
    return _sha256(file, state.st_size, state.st_mtime_ns)


@cache
def _sha256(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
