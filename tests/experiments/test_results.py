"""What a notebook leaves is named by its manifest, and what an earlier run left is gone before the next."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from tasft_lib.experiments import performance, results


@pytest.fixture
def figures(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_FIGURES", str(tmp_path))
    (tmp_path / "smoke").mkdir()
    return tmp_path / "smoke"


def test_the_manifest_names_what_was_saved(figures, capsys):
    own = {"benign": str(figures / "rows.json"), "task_files": [str(figures / "boolq.json")], "sizes": [20]}
    leaves = results.Results(SimpleNamespace(profile="smoke", notebook="safety", **own))
    table = pd.DataFrame({"rate": [1 / 3, 0]})
    assert leaves.save(table, "table") is table
    figure = plt.figure()
    assert leaves.save(figure, "rates") is figure
    leaves.save(table, "table")
    leaves.record(seeds=3)
    assert (figures / "safety_table.csv").read_text() == "rate\n0.333333\n0\n"
    manifest = json.loads((figures / "safety_manifest.json").read_text())
    assert manifest["files"] == ["safety_rates.png", "safety_table.csv"] and manifest["seeds"] == 3
    places = {"benign": "rows.json", "task_files": ["boolq.json"], "sizes": [20]}  # on this machine: nobody's business
    assert manifest["parameters"].items() >= places.items()
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


def test_where_the_time_of_a_run_went(tmp_path, monkeypatch):
    def executed(begin: int, cells: list[tuple[str, list[str], float]], duration: float | None):
        def clock(seconds: float) -> str:
            return f"2026-01-01T00:00:{seconds:09.6f}"

        written, now = [{"cell_type": "markdown", "metadata": {}, "source": ["# Title"]}], begin + 4.0
        for source, tags, seconds in cells:
            times = {"start_time": clock(now), "end_time": clock(now + seconds), "duration": seconds}
            written.append({"cell_type": "code", "source": [source], "metadata": {"tags": tags, "papermill": times}})
            now += seconds
        whole = {"start_time": clock(begin), "duration": duration}
        return json.dumps({"metadata": {"papermill": whole}, "cells": written})

    monkeypatch.setenv("TASFT_RUNS", str(tmp_path))
    assert performance.whole_run("mini").empty
    (tmp_path / "mini").mkdir()
    cells = [
        ("n = 1", ["parameters"], 0.5),
        ("import pandas\nx", ["setup"], 1.5),
        ("train()\nmore", [], 7.0),
        ("plot()", [], 2.0),
    ]
    (tmp_path / "mini" / "safety.ipynb").write_text(executed(20, cells, 16.0))
    (tmp_path / "mini" / "build_unsafe_set.ipynb").write_text(executed(3, cells, 16.0))
    (tmp_path / "mini" / "jailbreak.ipynb").write_text(executed(3, cells, None))  # stopped
    table = performance.whole_run("mini")
    assert table["notebook"].tolist() == ["build_unsafe_set", "safety"] and table["begin"].tolist() == [0, 17]
    assert table.loc[1, ["start", "longest", "rest", "cell"]].tolist() == [6.0, 7.0, 3.0, "train()"]
