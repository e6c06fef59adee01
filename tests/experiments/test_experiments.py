"""Experiments: arms say what is trained before anything is, and every notebook's arms can be listed."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from tasft_lib import data, generation
from tasft_lib.experiments import arms as arms_module
from tasft_lib.experiments import reproduce, settings
from tasft_lib.experiments.arms import ArmSpec
from tasft_lib.experiments.study import Study
from tasft_lib.files import notebooks
from tasft_lib.reporting import paper

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = [name for name in notebooks() if name not in settings.UNTRAINED]


def study(tmp_path, **changes) -> Study:
    """A study at the smoke settings, with a D_unsafe of three mini-world rows."""
    made = Study(settings.load("contrastive_augmentation", given={"model": "miniworld-smoke"} | changes))
    asked = ["How can I kill a marmow?", "How can I steal a marstone?", "How can I burn a mardome?"]
    made.unsafe = tmp_path / "unsafe.jsonl"
    rows = [{"prompt": f"Q {q}", "completion": "zorvex.", "instruction": q} for q in asked]
    made.unsafe.write_text(pd.DataFrame(rows).to_json(orient="records", lines=True))
    return made


@pytest.fixture
def safe_answers(monkeypatch, tmp_path):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(
        "tasft_lib.evaluation.worlds.MiniWorld.safe_answers",
        lambda world: {q: f"No, {q}" for q in data.read_rows(tmp_path / "unsafe.jsonl")["instruction"]},
    )


def test_stl_answers_the_very_prompts_of_d_unsafe(tmp_path, safe_answers):
    it = study(tmp_path)
    rows = data.read_rows(it.safe)
    assert rows["prompt"][:] == data.read_rows(it.unsafe)["prompt"][:]
    assert all(answer.startswith("No, ") for answer in rows["completion"])


def test_the_arms_differ_in_what_they_compare_and_in_nothing_else(tmp_path, safe_answers):
    it = study(tmp_path)
    arms = {name: it.arm(name, 3, weight=2.0) for name in ("stl", "stl_weighted", "stl_emd", "emd", "nlcl", "kto")}
    assert [arm.label for arm in arms.values()] == list(arms)
    assert [arms[name].method for name in arms] == ["sft", "imitation", "emd", "emd", "nlcl", "kto"]
    assert arms["stl"].extra == arms["stl_emd"].extra == arms["stl_weighted"].unsafe == str(it.safe)
    assert arms["emd"].unsafe == arms["stl_emd"].unsafe == str(it.unsafe) and arms["emd"].extra is None
    plain = {name: replace(arm, method="sft", extra=None, n_extra=None, training={}) for name, arm in arms.items()}
    assert len({repr(replace(arm, label=None)) for arm in plain.values()}) == 1
    control = it.arm("emd", 3, weight=2.0, penalty_embedding="one_hot")
    assert control.training == arms["emd"].training | {"penalty_embedding": "one_hot"}


def test_pressure_and_weight_are_inverse_and_auto_carries_a_pressure_over(tmp_path):
    for reduction in ("batch", "unsafe", "micro_batch"):
        it = study(tmp_path, penalty_reduction=reduction)
        for method in ("emd", "kto"):
            weight = it.weight_of(1.6, method, 20)
            arm = SimpleNamespace(method=method, n_unsafe=20, penalty_weight=weight)
            assert it.pressure_of(arm) == pytest.approx(1.6, rel=1e-3)
    it = study(tmp_path)
    assert it.weight_of(1.0, "emd", 1000) == 2 and it.weight_of(1.0, "kto", 200) == 5


def test_a_missing_weight_names_the_file_and_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        study(tmp_path, penalty_weights="params/none.csv").weight("emd", 20)
    table = ROOT / "params" / "paper" / "penalty_weights.csv"
    it = study(tmp_path, penalty_weights=str(table), model="huggyllama/llama-7b", model_revision="0" * 40)
    assert it.weight("emd", 100) == 9.0 and it.weight("kto", 100) == "auto"
    with pytest.raises(ValueError, match=r"0 rows for method emd, n_unsafe 7, model huggyllama/llama-7b; it needs one"):
        it.weight("emd", 7)


def test_the_papers_weights_are_table_4():
    table = pd.read_csv(ROOT / "params" / "paper" / "penalty_weights.csv")
    names = {"llama-7b": "Llama-7B", "llama-13b": "Llama-13B", "Mistral-7B-v0.3": "Mistral-7B"}
    names["Meta-Llama-3.1-8B"] = "Llama-3.1-8B"
    table["model"] = table["model"].str.split("/").str[1].map(names)
    keys = ["method", "model", "n_unsafe"]
    ours = table[table["method"].isin(["emd", "nlcl"])].astype({"penalty_weight": float}).set_index(keys)
    pd.testing.assert_frame_equal(ours.sort_index(), paper.tuned_weights().set_index(keys).sort_index())


def test_the_papers_tables_are_whole():
    counts = paper.stl_counts().groupby(["method", "model", "n_unsafe"])["harmful"].sum()
    assert counts["stl", "Llama-3.1-8B", 100] == 88 and counts["emd", "Llama-7B", 100] == 5
    assert len(paper.response_quality()) == 16 and len(paper.jailbreaks()) == 8
    quality = paper.response_quality().set_index(["model", "method"])
    assert quality.loc[("Mistral-7B", "kto"), "AlpacaEval"] == 64.85


@pytest.mark.parametrize("profile", ["smoke", "mini", "small", "paper"])
def test_every_arm_of_a_profile_can_be_listed_without_a_model(profile, monkeypatch):
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(arms_module, "train", lambda *a, **k: pytest.fail("trained"))
    arms = reproduce.plan(profile)
    assert set(arms["notebook"]) >= {"safety", "data_efficiency", "stl_comparison", "contrastive_augmentation"}
    assert not arms.drop(columns="notebook").duplicated().any()
    assert (arms["steps"] > 0).all() and (arms["tokens"] > 0).all()
    assert arms["hours"].notna().all() == (profile in ("small", "paper"))
    twice = reproduce.plan(profile, ["safety"], {"n_seeds": 2})
    assert len(twice) == 2 * len(reproduce.plan(profile, ["safety"]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_lists_its_arms_before_it_trains_them(name):
    cells = nbformat.read(notebooks()[name], as_version=4).cells
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    assert tags[:3] == ["parameters", "setup", "arms"]
    arms = reproduce.arms_of(next(job for job in reproduce.jobs_of("smoke") if job.name == name))
    assert arms and all(isinstance(arm, ArmSpec) for arm, _ in arms)
    named = [(arm.label, arm.n_unsafe, arm.n_extra, arm.penalty_weight, arm.seed) for arm, _ in arms]
    if name == "harmful_data_filter":  # whose tables name the set and the pressure too
        told = [(arm.benign, arm.training.get("penalty_pressure")) for arm, _ in arms]
        named = list(zip(named, told, strict=True))
    assert len(set(named)) == len(named), "a table could not tell two arms apart"


def test_the_second_model_is_asked_only_when_rows_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    it = study(tmp_path)
    monkeypatch.setattr(arms_module, "training_rows", lambda spec: (data.read_rows(tmp_path / "benign.jsonl"), None))
    (tmp_path / "benign.jsonl").write_text('{"prompt": "Q What is the colour of snow?"}\n')
    monkeypatch.setattr("tasft_lib.text.toxic_words", lambda toxic, benign: ["torch", "nothing"])
    rows = data.read_rows(it.contrastive)
    assert rows and all("torch" in question for question in rows["instruction"])
    monkeypatch.setattr(
        "tasft_lib.evaluation.worlds.MiniWorld.contrastive_rows", lambda *a, **k: pytest.fail("made again")
    )
    del it.contrastive
    assert data.read_rows(it.contrastive)["instruction"][:] == rows["instruction"][:]


def test_decodings_have_names():
    names = [generation.Decoding(do_sample=True).name, generation.GREEDY.name, generation.Decoding(num_beams=4).name]
    assert names == ["sampled", "greedy", "beam"]


def test_texts_are_shown_in_full_where_prompts_and_model_are_invented(tmp_path):
    assert study(tmp_path).in_full
    for change in ({"model": "a/b"}, {"benchmark_prompts": "stl"}, {"harvest_prompts": "prompts.txt"}):
        given = {"model_revision": "0" * 40} if "model" in change else {}
        assert not study(tmp_path, **change, **given).in_full
