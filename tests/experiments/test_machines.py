"""Machines: one table of verdicts and rates, and which verdicts change from machine to machine."""

import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
from test_tables import judged

from tasft_lib.evaluation.rates import summary
from tasft_lib.experiments import machines, settings
from tasft_lib.storage import files


@pytest.fixture
def folders(tmp_path):
    """Tables of two machines: on the second one EMD at 20 rows is as harmful as NLCL."""
    for name, harmful in (("here", 0), ("there", 90)):
        arms = {("sft", 0): "h" * 100}
        arms |= {(method, n): "r" * 100 for method in ("emd", "nlcl") for n in (200, 60)}
        arms |= {("nlcl", 20): "h" * 100, ("emd", 20): "h" * harmful + "r" * (100 - harmful)}
        answers = judged({(method, n, seed): text for (method, n), text in arms.items() for seed in range(3)})
        (tmp_path / name).mkdir()
        table = summary(answers, ["method", "n_unsafe", "penalty_weight", "decoding"])
        table.to_csv(tmp_path / name / "data_efficiency_table.csv", index=False)
    return {name: tmp_path / name for name in ("here", "there")}


def test_a_row_for_each_verdict_that_was_run_and_for_each_end_of_a_method(folders):
    table = machines.compared("mini", folders).set_index(["kind", "name"])
    few = ("verdict", "F3: with few examples EMD holds where NLCL fails")
    assert table.loc[few].tolist() == ["reproduced", "open"]
    assert [name for kind, name in table.index if kind == "verdict"] == [few[1]]
    assert "EMD n = 20 90.0 % of 100" in table.loc[("evidence", few[1]), "there"]
    assert table.loc[("harm", "EMD, 20 unsafe rows")].tolist() == [
        "0.0 % of 100 (0.0-3.7), seeds 0.0-0.0",
        "90.0 % of 100 (82.6-94.5), seeds 90.0-90.0",
    ]
    assert ("harm", "SFT") in table.index and ("harm", "EMD, 60 unsafe rows") not in table.index


def test_a_verdict_changes_unless_it_is_open(folders):
    assert machines.changed(machines.compared("mini", folders)) == []
    row = {"kind": "verdict", "name": "F", "a": "reproduced", "b": "open", "c": "not reproduced"}
    rate = row | {"kind": "harm", "a": "1 %", "c": "2 %"}
    not_run = row | {"name": "G", "c": "-"}
    assert machines.changed(pd.DataFrame([row, rate, not_run])) == ["changes: F"]


def test_the_hash_of_the_weights_is_of_the_arms_that_manifests_name(tmp_path):
    def hashed(content: str) -> dict[str, str]:
        folder = tmp_path / "runs" / "arms" / "emd-1" / "trainer" / "checkpoint-7"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{content}.txt").touch()
        (folder / "adapter_model.safetensors").write_text(content)
        files.file_hash.cache_clear()
        return machines.weights(tmp_path / "runs", tmp_path)

    files.write_json(tmp_path / "safety_manifest.json", {"arms": {"emd-1": {"steps": 7}}})
    assert hashed("a") == hashed("a") != hashed("b") and list(hashed("a")) == ["safety"]
    shutil.rmtree(tmp_path / "runs")
    assert machines.weights(tmp_path / "runs", tmp_path) == {"safety": None}


def test_what_a_notebook_was_given_stands_in_the_manifest_and_is_the_same_on_all_machines(tmp_path):
    for name, sizes in (("here", [60]), ("there", [60]), ("elsewhere", [100])):
        told = vars(settings.load("jailbreak", "mini", {"sizes": sizes}))
        (tmp_path / name).mkdir()
        files.write_json(tmp_path / name / "jailbreak_manifest.json", {"parameters": told})
    here, there, elsewhere = (tmp_path / name for name in ("here", "there", "elsewhere"))
    assert machines.parameters([here, there, tmp_path / "not run"]) == {"jailbreak": {"sizes": [60]}}
    with pytest.raises(ValueError, match="jailbreak was run with other parameters"):
        machines.parameters([here, elsewhere])


def test_each_machine_runs_the_same_command_in_folders_of_its_own(tmp_path, monkeypatch, folders):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TASFT_FIGURES", str(tmp_path / "figures"))
    calls = []
    done = SimpleNamespace(returncode=0)
    run = SimpleNamespace(run=lambda command, env: calls.append((command, env)) or done)
    monkeypatch.setattr(machines, "subprocess", run)
    monkeypatch.setattr(machines, "compared", lambda profile, made: pd.DataFrame({"kind": ["harm"], "name": ["SFT"]}))
    machines.main(["--profile", "smoke", "--seeds", "2", "-p", "judge", "compliance"])
    assert len({tuple(command) for command, _ in calls}) == 1 and calls[0][0][-5:] == [
        "--seeds",
        "2",
        "-p",
        "judge",
        "compliance",
    ]
    assert [env.get("MKL_CBWR") for _, env in calls] == [None, None, None, "COMPATIBLE"]
    for place in ("TASFT_RUNS", "TASFT_FIGURES"):  # as it is, arms are shared with other runs
        assert len({env[place] for _, env in calls}) == 4
    told = files.read_json(tmp_path / "figures" / "machines_manifest.json")
    assert told["files"] == ["machines.csv"] and list(told["machines"]) == list(machines.MACHINES)


def test_a_machine_may_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TASFT_FIGURES", str(tmp_path / "figures"))
    calls = []
    done = SimpleNamespace(returncode=0)
    run = SimpleNamespace(run=lambda command, env: calls.append(env.get("MKL_CBWR")) or done)
    monkeypatch.setattr(machines, "subprocess", run)
    monkeypatch.setattr(machines, "compared", lambda profile, made: pd.DataFrame({"kind": ["harm"], "name": ["SFT"]}))
    machines.main(["--machines", "MKL, compatible", "as it is"])
    machines.main(["--machines"])
    assert calls == ["COMPATIBLE", None]
    assert (tmp_path / "figures" / "machines.csv").exists()


def test_a_command_that_fails_ends_all_with_its_code_and_its_own_words_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TASFT_FIGURES", str(tmp_path / "figures"))
    with pytest.raises(SystemExit) as stopped:
        machines.main(["--profile", "smoke", "--notebooks", "safetey"])
    assert stopped.value.code == 1
    told = capfd.readouterr()
    assert "safetey" in told.err and "Traceback" not in told.err and told.out.count("no change") == 1


def test_headline_rates_of_a_profile_that_samples_nothing_are_greedy(folders):
    (folder, *_) = folders.values()
    (folder / "data_efficiency_table.csv").unlink()
    greedy = judged({("sft", 0, 0): "h" * 100, ("emd", 9, 0): "r" * 100}, decoding="greedy")
    summary(greedy, ["method", "n_unsafe", "decoding"]).to_csv(folder / "safety_table.csv", index=False)
    table = machines.compared("mini", {"here": folder}).set_index(["kind", "name"])["here"]
    assert table["harm", "EMD, 9 unsafe rows"].startswith("0") and table["harm", "SFT"].startswith("100")
