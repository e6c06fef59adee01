"""The method is five short files that a reader may take alone."""

import subprocess
import sys
from pathlib import Path

import tasft_lib

METHOD = ("losses", "fused_head", "forward", "config", "trainer")


def test_they_are_short():
    lines = {name: len((Path(tasft_lib.__file__).parent / f"{name}.py").read_text().splitlines()) for name in METHOD}
    assert sum(lines.values()) < 1200, lines


def test_they_load_no_plotting_and_no_statistics_package():
    script = (
        "import sys, tasft_lib.trainer\n"
        "print([p for p in ('matplotlib', 'seaborn', 'statsmodels', 'sklearn') if p in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
