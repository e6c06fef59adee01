"""What many arms are made of is looked at once: a file's hash, thousands of rows and their tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_seen: dict[tuple[str, Any], Any] | None = None


@contextmanager
def looked_at_once() -> Iterator[None]:
    """In here; a worker is always in here, for it lives as long as one grid of arms (`engine`)."""
    global _seen
    before, _seen = _seen, {} if _seen is None else _seen
    try:
        yield
    finally:
        _seen = before


def begin() -> None:
    """Be in `looked_at_once` until this process ends."""
    global _seen
    _seen = {}


def once(what: str, source: Any, look: Callable[[], Any]) -> Any:
    """What `look` says of the source (hashable); of the same one once in `looked_at_once`."""
    if _seen is None:
        return look()
    if (what, source) not in _seen:
        _seen[what, source] = look()
    return _seen[what, source]
