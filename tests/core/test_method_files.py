"""The method is five short files that a reader may take alone."""

from pathlib import Path

import tasft_lib

METHOD = ("losses", "fused_head", "forward", "config", "trainer")


def test_they_are_short():
    lines = {name: len((Path(tasft_lib.__file__).parent / f"{name}.py").read_text().splitlines()) for name in METHOD}
    assert sum(lines.values()) < 1200, lines
