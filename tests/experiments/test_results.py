"""What a notebook leaves is named by its manifest, and what an earlier run left is gone before the next."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from tasft_lib.experiments import results


@pytest.fixture
def figures(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_FIGURES", str(tmp_path))
    (tmp_path / "smoke").mkdir()
    return tmp_path / "smoke"


def test_the_manifest_names_what_was_saved(figures, capsys):
    leaves = results.Results(SimpleNamespace(profile="smoke", notebook="safety", benign=str(figures / "rows.json")))
    table = pd.DataFrame({"rate": [1 / 3, 0]})
    assert leaves.save(table, "table") is table
    figure = plt.figure()
    assert leaves.save(figure, "rates") is figure
    leaves.save(table, "table")
    leaves.record(seeds=3)
    assert (figures / "safety_table.csv").read_text() == "rate\n0.333333\n0\n"
    manifest = json.loads((figures / "safety_manifest.json").read_text())
    assert manifest["files"] == ["safety_rates.png", "safety_table.csv"] and manifest["seeds"] == 3
    assert manifest["parameters"]["benign"] == "rows.json", "a place on this machine is nobody's business"
    assert {path.name for path in figures.iterdir()} == {*manifest["files"], "safety_manifest.json"}
    assert capsys.readouterr().out.split() == [str(figures / name) for name in manifest["files"]]


def test_an_earlier_run_is_removed_and_no_other_notebook(figures):
    for name in ("performance_old.csv", "performance_filter_times.csv", "safety_table.csv", "elsewhere.csv"):
        (figures / name).touch()
    (figures / "performance_manifest.json").write_text('{"files": ["elsewhere.csv", "gone.csv"]}')
    results.remove("smoke", "performance")
    assert {path.name for path in figures.iterdir()} == {"performance_filter_times.csv", "safety_table.csv"}
    results.remove("never run", "performance")


def test_a_notebook_run_by_hand_leaves_the_published_figures_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("TASFT_FIGURES", raising=False)
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path))
    assert results.folder_of("mini") == tmp_path / "figures" / "mini"
    results.publish()
    assert results.folder_of("mini") == results.project_root() / "figures" / "mini"
