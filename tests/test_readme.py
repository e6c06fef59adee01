"""README tells the truth: its table is the committed one, its commands and options exist, its links lead somewhere."""

import json
import re
from dataclasses import fields
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from trl import ModelConfig, ScriptArguments

from tasft_lib import TASFTConfig, cli, tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_results_table_is_made_from_the_committed_csv():
    table = pd.read_csv(ROOT / "figures" / "mini" / "safety_table.csv")
    shown = re.search(r"<!-- results:begin -->\n(.*?)<!-- results:end -->", README, re.DOTALL)[1]
    assert tables.readme_table(table) in shown


def test_the_performance_table_is_made_from_the_committed_csvs():
    figures = ROOT / "figures" / "bench"
    heads, steps = (pd.read_csv(figures / f"performance_{name}.csv") for name in ("table", "step"))
    shown = re.search(r"<!-- performance:begin -->\n(.*?)<!-- performance:end -->", README, re.DOTALL)[1]
    assert tables.readme_performance(heads, steps) in shown
    manifest = json.loads((figures / "performance_manifest.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", manifest["commit"]), "from a clean commit"


def test_the_published_numbers_trace_to_a_manifest():
    manifest = json.loads((ROOT / "figures" / "mini" / "safety_manifest.json").read_text())
    table = pd.read_csv(ROOT / "figures" / "mini" / "safety_table.csv")
    assert re.fullmatch(r"[0-9a-f]{40}", manifest["commit"]), "from a clean commit"
    assert manifest["versions"]["trl"] and manifest["hardware"]["cores"]
    methods = {arm["spec"]["method"] for arm in manifest["arms"].values()}
    assert set(table["method"]) == methods
    assert {row.method: row.penalty_weight for row in table.itertuples() if row.method != "sft"} == {
        method: f"{weight}" for method, weight in manifest["chosen"].items()
    }


def test_every_local_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_commands_exist(capsys):
    for command in set(re.findall(r"^tasft (\w+)", README, re.MULTILINE)):
        with pytest.raises(SystemExit) if command not in ("train",) else pytest.MonkeyPatch.context():
            cli.main([command, "--help"])
        assert f"tasft {command}" in capsys.readouterr().out
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_configuration_shown_has_only_known_options():
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1]
    known = {f.name for cls in (TASFTConfig, ModelConfig, ScriptArguments) for f in fields(cls)}
    ours = set(re.findall(r"^        (\w+): .* = field", Path(cli.__file__).read_text(), re.MULTILINE))
    assert set(yaml.safe_load(block)) <= known | ours


def test_every_notebook_is_listed():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in README
        assert nbformat.read(path, as_version=4).cells[0].source.startswith("# ")
