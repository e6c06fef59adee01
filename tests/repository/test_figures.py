"""What is published is what a notebook made: every file in `figures/` is named by the manifest beside it."""

import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.usefixtures("published")
ROOT = Path(__file__).resolve().parents[2]
COMMITTED = {
    Path(line)
    for line in subprocess.run(
        ["git", "ls-files", "figures"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
}
MANIFESTS = sorted(path for path in COMMITTED if path.name.endswith("_manifest.json"))
README = (ROOT / "figures" / "README.md").read_text()


def manifest(path: Path) -> dict:
    return json.loads((ROOT / path).read_text())


def test_every_committed_file_is_named_by_a_manifest_and_every_named_file_exists():
    named = {path.parent / file for path in MANIFESTS for file in manifest(path)["files"]}
    pages = {path for path in COMMITTED if path.name in ("report.md", "README.md", "which_method.md")}
    assert COMMITTED - pages - {*MANIFESTS} == named


def test_no_table_is_committed_twice():
    # mini's report and its verdict on λ are made from the search's table.
    tables = [
        path for path in COMMITTED if path.suffix == ".csv" and path != Path("figures/mini/penalty_weight_table.csv")
    ]
    assert len({(ROOT / path).read_bytes() for path in tables}) == len(tables)


def test_the_commit_of_every_manifest_is_in_the_list():
    for path in MANIFESTS:
        assert f"`{manifest(path)['commit'][:7]}`" in README, path


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / "figures" / target.partition("#")[0]).exists(), target


def test_no_verdict_flips_between_the_machines_unless_it_is_open():
    if Path("figures/machines.csv") not in COMMITTED:
        pytest.skip("not run yet: make machines")
    table = pd.read_csv(ROOT / "figures" / "machines.csv")
    machines, described = list(table.columns[2:]), manifest(Path("figures/machines_manifest.json"))["machines"]
    assert set(machines) == set(described)
    # Otherwise nothing was emulated; oneDNN's setting alone changed nothing on the CPU of the committed run.
    weights = [told["weights"] for told in described.values()]
    on_all = set.intersection(*map(set, weights))
    assert len({tuple(own[name] for name in sorted(on_all)) for own in weights}) >= len(machines) - 1
    for row in table[table["kind"] == "verdict"].itertuples(index=False):
        assert len({*row[2:]} - {"open", "-"}) <= 1, row[1]
