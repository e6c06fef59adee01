"""What is published is what a notebook made: every file in `figures/` is named by the manifest beside it."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = {
    Path(line)
    for line in subprocess.run(
        ["git", "ls-files", "figures"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if "second_cpu" not in line
}
MANIFESTS = sorted(path for path in COMMITTED if path.name.endswith("_manifest.json"))


@pytest.mark.parametrize("folder", sorted({path.parent for path in MANIFESTS}), ids=lambda folder: folder.name)
def test_every_committed_file_is_named_by_a_manifest_and_every_named_file_exists(folder):
    manifests = [path for path in MANIFESTS if path.parent == folder]
    named = {folder / file for path in manifests for file in json.loads((ROOT / path).read_text())["files"]}
    assert {path for path in COMMITTED if path.parent == folder} - {folder / "report.md"} == named | {*manifests}
