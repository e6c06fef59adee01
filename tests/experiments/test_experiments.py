"""Experiments: arms say what is trained before anything is, and every notebook's arms can be listed."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from tasft_lib import generation
from tasft_lib.experiments import designs, engine, reproduce, settings
from tasft_lib.experiments import rows as rows_module
from tasft_lib.experiments.study import Study
from tasft_lib.records import sources
from tasft_lib.reporting import paper, report
from tasft_lib.storage import files, integrity
from tasft_lib.storage.files import notebooks

ROOT = Path(__file__).resolve().parents[2]
# The others train nothing.
NOTEBOOKS = [name for name in notebooks() if hasattr(designs, name)]


def study(**changes) -> Study:
    """A study at the smoke settings."""
    return Study(settings.load("contrastive_augmentation", given={"model": "miniworld-smoke"} | changes))


@pytest.fixture
def harvested(monkeypatch, tmp_path) -> Path:
    """Three mini-world rows, which every harvest is taken to have made."""
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    prompts = ["How can I kill a marmow?", "How can I steal a marstone?", "How can I burn a mardome?"]
    rows = [{"prompt": f"Q {q}", "completion": "zorvex.", "instruction": q} for q in prompts]
    path = files.write_rows(tmp_path / "unsafe.jsonl", rows)
    monkeypatch.setattr(rows_module, "_harvest", lambda spec: path)
    return path


def test_stl_answers_the_very_prompts_of_d_unsafe(harvested, monkeypatch):
    unsafe = sources.read_rows(harvested)
    safe_answers = "tasft_lib.evaluation.worlds.MiniWorld.safe_answers"
    monkeypatch.setattr(safe_answers, lambda world: {q: f"No, {q}" for q in unsafe["instruction"]})
    rows = sources.read_rows(rows_module.make_rows(study().safe()))
    assert rows["prompt"][:] == unsafe["prompt"][:]
    assert all(answer.startswith("No, ") for answer in rows["completion"])
    monkeypatch.setattr(safe_answers, lambda world: {})
    with pytest.raises(ValueError, match="no safe answer to 3 prompts"):
        rows_module.make_rows(study().safe())


def test_the_arms_differ_in_what_they_compare_and_in_nothing_else():
    it = study()
    arms = {name: it.arm(name, 3, weight=2.0) for name in ("stl", "stl_weighted", "stl_emd", "emd", "nlcl", "kto")}
    assert [arm.display_name for arm in arms.values()] == list(arms)
    assert [arms[name].method for name in arms] == ["sft", "imitation", "emd", "emd", "nlcl", "kto"]
    assert arms["stl"].extra == arms["stl_emd"].extra == arms["stl_weighted"].unsafe == it.safe()
    assert arms["emd"].unsafe == arms["stl_emd"].unsafe == it.unsafe() and arms["emd"].extra is None
    plain = {name: replace(arm, method="sft", extra=None, n_extra=None, training={}) for name, arm in arms.items()}
    assert len({repr(replace(arm, display_name=None)) for arm in plain.values()}) == 1
    control = it.arm("emd", 3, weight=2.0, penalty_embedding="one_hot")
    assert control.training == arms["emd"].training | {"penalty_embedding": "one_hot"}


def test_an_arm_stands_on_the_base_model_of_its_seed_with_the_rows_of_that_base_alone():
    it = study(model="miniworld", n_seeds=3)
    bases = ["miniworld", "miniworld-1", "miniworld-2"]
    for seed, base in enumerate(bases):
        arms = {name: it.arm(name, 3, weight=2.0, seed=seed) for name in ("sft", "stl", "stl_weighted", "emd", "kto")}
        assert {arm.model for arm in arms.values()} == {base}
        for rows in (
            arms["emd"].unsafe,
            arms["kto"].unsafe,
            arms["stl"].extra.unsafe,
            arms["stl_weighted"].unsafe.unsafe,
        ):
            assert rows.arm == arms["sft"]
        assert it.contrastive(seed).unsafe == arms["emd"].unsafe == it.unsafe(seed)
        assert it.contrastive(seed).decoding.max_new_tokens == it.config.max_length  # what a training row can hold
        assert it.plain(seed) == [arms["sft"]]
    assert it.sft == it.arm("sft") and [arm.model for arm in designs.build_unsafe_set(it)] == bases
    # All seeds of another model stand on it, and share what its first plain SFT arm answers.
    it = study(n_seeds=3, seed=4)
    assert [arm.seed for arm in it.plain(6)] == [4, 5, 6] and it.unsafe(6) == it.unsafe() == it.unsafe(4)
    assert it.unsafe().arm == it.sft and designs.build_unsafe_set(it) == [it.sft]


def test_visits_are_the_same_for_the_unsafe_rows_and_for_stls_answers_to_them():
    it = study(unsafe_visits=3)
    arms = {name: it.arm(name, 3, weight=2.0) for name in ("sft", "stl", "stl_weighted", "stl_emd", "emd", "kto")}
    visits = {name: (arm.unsafe_visits, arm.extra_visits) for name, arm in arms.items()}
    assert visits.pop("sft") == (1, 1) and visits.pop("stl") == (1, 3) and visits.pop("stl_emd") == (3, 3)
    assert set(visits.values()) == {(3, 1)}
    assert arms["sft"] == study().sft  # D_unsafe is harvested from the same arm
    with_contrast = it.arm("emd", 3, weight=2.0, extra=it.contrastive())
    assert with_contrast.extra_visits == 1
    # 9 of n visits are unsafe, so λ is a third of what 3 rows seen once would need, up to the share of the rest.
    n = it.config.n_benign
    assert it.weights.of_pressure(1.0, "emd", 3) == pytest.approx((n + 9) / 9, rel=1e-3)
    assert it.weights.of_pressure(1.0, "kto", 3) == pytest.approx(n / 9, rel=1e-3)


def test_extra_rows_are_there_as_often_as_they_are_visited(harvested):
    spec = replace(study().sft, n_benign=5, extra=str(harvested), n_extra=2, template="short")
    (once, _), (thrice, _) = (rows_module.training_rows(replace(spec, extra_visits=n)) for n in (1, 3))
    answers = [sorted(rows["completion"][5:]) for rows in (once, thrice)]
    assert len(once) == 7 and answers[1] == sorted(answers[0] * 3)
    assert once.to_list()[:5] == thrice.to_list()[:5]


def test_the_distance_of_an_arm_names_its_components():
    it = study(penalty_embedding="isotropic", penalty_components=2)
    assert it.arm("emd", 3, weight=2.0).training["penalty_components"] == 2
    assert "penalty_components" not in it.arm("emd", 3, weight=2.0, penalty_embedding="lm_head").training
    assert "penalty_components" not in it.arm("nlcl", 3, weight=2.0).training
    assert study().arm("emd_exact", 3, weight=2.0, penalty_embedding="isotropic").training["penalty_components"] == 3


def test_pressure_and_weight_are_inverse_and_auto_carries_a_pressure_over():
    for reduction in ("batch", "unsafe", "micro_batch"):
        weights = study(penalty_reduction=reduction).weights
        for method in ("emd", "kto"):
            weight = weights.of_pressure(1.6, method, 20)
            arm = SimpleNamespace(method=method, n_unsafe=20, penalty_weight=weight)
            assert weights.pressure_of(arm) == pytest.approx(1.6, rel=1e-3)
    weights = study().weights
    assert weights.of_pressure(1.0, "emd", 1000) == 2 and weights.of_pressure(1.0, "kto", 200) == 5


def test_a_missing_weight_names_the_file_and_what_it_needs():
    with pytest.raises(ValueError, match="no such file"):
        study(penalty_weights="params/none.csv").weights.of_table("emd", 20)
    table = ROOT / "params" / "paper" / "penalty_weights.csv"
    weights = study(penalty_weights=str(table), model="huggyllama/llama-7b", model_revision="0" * 40).weights
    assert weights.of_table("emd", 100) == 9.0 and weights.of_table("kto", 100) == "auto"
    with pytest.raises(ValueError, match=r"0 rows for method emd, n_unsafe 7, model huggyllama/llama-7b; it needs one"):
        weights.of_table("emd", 7)


def test_an_arm_has_the_weight_that_was_chosen_on_its_own_base_model(tmp_path):
    table = tmp_path / "weights.csv"
    table.write_text("model,method,n_unsafe,penalty_weight\nminiworld,emd,20,3\nminiworld-1,emd,20,12\n")
    it = study(model="miniworld", penalty_weights=str(table), n_seeds=2)
    arms = [it.arm(method, 20, seed=seed) for method in ("emd", "stl_weighted") for seed in it.seeds]
    assert [(arm.model, arm.penalty_weight) for arm in arms] == 2 * [("miniworld", 3.0), ("miniworld-1", 12.0)]
    twice = SimpleNamespace(method="emd_contrastive", n_unsafe=20, penalty_weight=24.0, seed=1)
    assert it.weights.factor_of(twice) == 2.0
    with pytest.raises(ValueError, match="model miniworld-2; it needs one"):
        it.arm("emd", 20, seed=2)


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


@pytest.mark.parametrize("profile", ["smoke", "mini", "pocket", "small", "paper"])
def test_every_arm_of_a_profile_is_listed(profile):
    arms = reproduce.plan(profile)
    assert set(arms["notebook"]) >= {"safety", "data_efficiency", "stl_comparison", "contrastive_augmentation"}
    assert not arms.drop(columns="notebook").duplicated().any()
    assert (arms["steps"] > 0).all() and (arms["tokens"] > 0).all()
    assert arms["hours"].notna().all() == (profile in ("pocket", "small", "paper"))
    twice = reproduce.plan(profile, ["safety"], {"n_seeds": 2})
    assert len(twice) == 2 * len(reproduce.plan(profile, ["safety"]))


@pytest.mark.parametrize(
    "notebook, change, message",
    [
        ("safety", {"n_seeds": 0}, "n_seeds=0: give 1 or more"),
        ("safety", {"n_unsafe": -1}, "n_unsafe=-1: give 0 or more"),
        ("safety", {"num_train_epochs": 0}, "num_train_epochs=0.0: give more than 0"),
        ("safety", {"learning_rate": "nan"}, "learning_rate=nan: give more than 0"),
        ("data_efficiency", {"sizes": "0 3"}, r"sizes=\[0, 3\]: give 1 or more"),
        ("method", {}, "method: no arms to list"),
    ],
)
def test_a_plan_of_nothing_is_refused_in_one_line(notebook, change, message):
    with pytest.raises(ValueError, match=message):
        reproduce.plan("smoke", [notebook], change)


def test_the_report_is_made_where_the_figures_went(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("TASFT_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setattr(reproduce, "execute", lambda job: None)
    monkeypatch.setattr(report, "build", lambda profile, folder: built.append(folder))
    built = []
    reproduce.reproduce("smoke", ["method"])
    assert built == [tmp_path / "figures" / "smoke"]


def test_a_notebook_knows_whether_another_one_runs_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(report, "build", lambda *_: "")
    alone = {}
    monkeypatch.setattr(reproduce, "execute", lambda job: alone.update({job.name: engine.is_alone()}))
    reproduce.reproduce("smoke", ["build_unsafe_set", "safety", "method"])
    assert alone == {"build_unsafe_set": True, "safety": False, "method": False} and engine.is_alone()


def test_outside_the_project_it_is_said_where_to_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run this inside a checkout of the project"):
        reproduce.jobs_of("mini")


def test_many_notebooks_of_one_profile_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path))
    locked = []
    monkeypatch.setattr(integrity, "folder_lock", lambda folder: locked.append(folder) or nullcontext())
    monkeypatch.setattr(reproduce, "execute", lambda job, prepare_only: None)
    assert len(reproduce.reproduce("smoke", ["method"], prepare_only=True)) == 1
    assert locked == [tmp_path / "smoke"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_listing_and_naming_a_notebooks_arms_touches_no_file(name, monkeypatch):
    job = next(job for job in reproduce.jobs_of("smoke") if job.name == name)
    it = designs.study_of(settings.load(name, given=job.parameters))
    with monkeypatch.context() as patch:
        for place in ("builtins.open", "io.open", "os.open", "os.mkdir", "os.replace", "os.scandir"):
            patch.setattr(place, lambda *a, **k: pytest.fail("touched a file"))
        arms = getattr(designs, name)(it)
        named = [arm.name for arm in arms]
    assert arms and len(set(named)) == len({repr(replace(arm, display_name=None)) for arm in arms})
    listed = [(arm.display_name, arm.n_unsafe, arm.n_extra, arm.penalty_weight, arm.seed) for arm in arms]
    if name == "harmful_data_filter":  # whose tables name the set and the pressure too
        told = [(arm.benign, arm.training.get("penalty_pressure")) for arm in arms]
        listed = list(zip(listed, told, strict=True))
    if name == "trade_off":  # the adapters, and STL's visits
        listed = [(*told, arm.lora["r"], arm.extra_visits) for told, arm in zip(listed, arms, strict=True)]
    assert len(set(listed)) == len(listed), "a table could not tell two arms apart"


@pytest.mark.parametrize("name", notebooks())
def test_a_notebook_trains_the_arms_that_the_plan_lists(name):
    cells = nbformat.read(notebooks()[name], as_version=4).cells
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    if name not in NOTEBOOKS:
        assert "arms" not in tags
        return
    assert tags[:3] == ["parameters", "setup", "arms"]
    source = next(cell.source for cell in cells if "arms" in cell.metadata.get("tags", []))
    called = "harmful_data_filter.design(study)" if name == "harmful_data_filter" else f"designs.{name}(study)"
    assert called in source


def test_the_second_model_is_asked_only_when_rows_are_missing(tmp_path, harvested, monkeypatch):
    monkeypatch.setattr(rows_module, "training_rows", lambda spec: (sources.read_rows(tmp_path / "benign.jsonl"), None))
    (tmp_path / "benign.jsonl").write_text('{"prompt": "Q What is the colour of snow?"}\n')
    monkeypatch.setattr("tasft_lib.text.toxic_words", lambda toxic, benign: ["torch", "nothing"])
    rows = sources.read_rows(rows_module.make_rows(study().contrastive()))
    assert rows and all("torch" in question for question in rows["instruction"])
    monkeypatch.setattr(
        "tasft_lib.evaluation.worlds.MiniWorld.contrastive_rows", lambda *a, **k: pytest.fail("made again")
    )
    assert sources.read_rows(rows_module.make_rows(study().contrastive()))["instruction"][:] == rows["instruction"][:]


def test_decodings_have_names():
    names = [generation.Decoding(do_sample=True).name, generation.GREEDY.name, generation.Decoding(num_beams=4).name]
    assert names == ["sampled", "greedy", "beam"]


def test_captions_name_a_model_that_is_not_invented():
    profile = study().config.profile
    assert study().subject == study(model="miniworld-1").subject == profile
    assert study(model="/models/smollm.gguf").subject == f"{profile} (smollm.gguf)"
    assert study(model="Qwen/Qwen3-0.6B", model_revision="0" * 40).subject == f"{profile} (Qwen3-0.6B)"


def test_texts_are_shown_in_full_where_prompts_and_model_are_invented():
    assert study().in_full
    for change in ({"model": "a/b"}, {"benchmark_prompts": "stl"}, {"harvest_prompts": "prompts.txt"}):
        given = {"model_revision": "0" * 40} if "model" in change else {}
        assert not study(**change, **given).in_full
