"""What is published is what a notebook made: every file in `figures/` is named by the manifest beside it."""

import json
import re
import subprocess
from pathlib import Path

import pandas as pd

from tasft_lib.reporting import claims, tables

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = {
    Path(line)
    for line in subprocess.run(
        ["git", "ls-files", "figures"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
}
MANIFESTS = sorted(path for path in COMMITTED if path.name.endswith("_manifest.json"))
README = (ROOT / "figures" / "README.md").read_text()
SECOND_MACHINE = pd.read_csv(ROOT / "figures" / "second_machine.csv")


def manifest(path: Path) -> dict:
    return json.loads((ROOT / path).read_text())


def test_every_committed_file_is_named_by_a_manifest_and_every_named_file_exists():
    named = {path.parent / file for path in MANIFESTS for file in manifest(path)["files"]}
    pages = {path for path in COMMITTED if path.name in ("report.md", "README.md", "second_machine.csv")}
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
        assert (ROOT / "figures" / target).exists(), target


def test_what_the_second_machine_is_compared_with_is_in_the_tables():
    verdicts = claims.claims_table("mini").set_index("claim")["verdict"]
    rows = SECOND_MACHINE[SECOND_MACHINE["kind"] == "verdict"]
    assert dict(zip(rows["name"], rows["here"], strict=True)) == verdicts.to_dict()
    mini = ROOT / "figures" / "mini"
    arms = pd.read_csv(mini / "data_efficiency_table.csv").query("decoding == 'sampled'")
    arms = arms.assign(place=[f", {n} unsafe rows" if n else "" for n in arms["n_unsafe"]])
    filters = pd.read_csv(mini / "harmful_data_filter_table.csv")
    filters = filters.query("n_safe == 0 and contamination == 0.1 and share in (0, 0.1)")
    arms = pd.concat([arms, filters.assign(place=", contamination 0.1")])
    arms = {tables.NAMES.get(arm["method"], arm["method"]) + arm["place"]: arm for _, arm in arms.iterrows()}
    for row in SECOND_MACHINE[SECOND_MACHINE["kind"] != "verdict"].itertuples():
        assert tables.rate_text(arms[row.name], row.kind) == row.here, row.name


def test_what_is_said_of_the_second_machine_is_in_its_table():
    said = " ".join(README.split("## On another CPU")[1].split())
    verdicts = SECOND_MACHINE[SECOND_MACHINE["kind"] == "verdict"]
    assert f"Of {len(verdicts)} verdicts {(verdicts['here'] != verdicts['there']).sum()} differ" in said
    rates = SECOND_MACHINE[SECOND_MACHINE["kind"] != "verdict"]
    there, here = ([f"{float(text.split(' %')[0]):.0f}" for text in rates[side]] for side in ("there", "here"))
    pairs = re.findall(r"(\d+) % [a-z-]*(?: at \d+ unsafe rows)? ?\((\d+) %", said)
    pairs += re.findall(r"(\d+) % over-refusal instead of (\d+) %", said)
    assert len(pairs) == 9 and set(pairs) <= set(zip(there, here, strict=True))
