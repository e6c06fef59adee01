"""Arms: named by what determines them, trained once, resumed after a kill, never half there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import grimp
import pandas as pd
import pytest
import torch
from conftest import build_model, make_rows
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl.trainer import utils

from tasft_lib import generation
from tasft_lib.evaluation import worlds
from tasft_lib.evaluation.preference import HeldOut
from tasft_lib.experiments import answers, arms, once, specs
from tasft_lib.experiments import rows as rows_module
from tasft_lib.experiments.answers import measure, respond, run, run_all
from tasft_lib.judges.base import Judgement
from tasft_lib.records import sources
from tasft_lib.storage import files, integrity

DECODING = generation.Decoding(max_new_tokens=4)
PROMPTS = pd.DataFrame(
    {"benchmark": ["a", "a", "b"], "kind": "toxic", "prompt": ["w1 w2", "w3", "w4 w5 w6"]},
)
HELD_OUT = HeldOut(
    toxic=[{"prompt": "w1 ", "safe": "w2 w3", "unsafe": "w4"}],
    benign=[{"prompt": "w5 ", "completion": "w6"}],
    max_tokens=4,
    max_length=99,
)


@pytest.fixture
def spec(tokenizer, tmp_path, monkeypatch) -> specs.ArmSpec:
    """A TA-SFT arm of six steps with a checkpoint every two, on files."""
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "runs"))
    build_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = make_rows(40)
    rows.filter(lambda row: row["label"]).remove_columns("label").to_json(tmp_path / "benign.jsonl")
    rows.filter(lambda row: not row["label"]).to_json(tmp_path / "unsafe.jsonl")
    return specs.ArmSpec(
        method="emd",
        model=str(tmp_path / "base"),
        benign=str(tmp_path / "benign.jsonl"),
        n_benign=18,
        unsafe=str(tmp_path / "unsafe.jsonl"),
        n_unsafe=6,
        penalty_weight=3.0,
        template="none",
        training={"learning_rate": 1e-2, "per_device_train_batch_size": 4, "num_train_epochs": 1, "save_steps": 2},
        lora={"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
    )


def weights(spec):
    return load_file(list(arms.checkpoints(spec).values())[-1] / "adapter_model.safetensors")


def test_an_arm_is_trained_once_and_found_again(spec):
    folder = arms.train(spec)
    manifest = (folder / "manifest.json").read_text()
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert arms.train(replace(spec)) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp
    recorded = json.loads(manifest)
    assert recorded["steps"] == 6 and list(arms.checkpoints(spec)) == [2, 4, 6]
    assert recorded["penalty_weight"] == 3.0 and recorded["versions"]["trl"]
    assert {"commit", "hardware", "seconds", "peak_memory_mb", "benign_rows", "unsafe_rows"} <= set(recorded)


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_a_killed_run_resumes_and_ends_as_the_straight_run(order, spec, tmp_path, monkeypatch):
    """In its second epoch, whose order is another than the first one's."""
    options = {"num_train_epochs": 2, "save_steps": 3, "train_sampling_strategy": order}
    spec = replace(spec, training=spec.training | options)
    straight = arms.train(spec)
    expected = weights(spec)
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "killed"))
    shutil.copytree(straight, spec.folder)
    (spec.folder / "manifest.json").unlink()  # killed after step 9, while writing checkpoint 12
    (spec.folder / "trainer" / "checkpoint-12" / "trainer_state.json").write_text('{"torn')
    arms.train(spec)
    assert arms.read_manifest(spec)["resumed_from"] == "checkpoint-9"
    resumed = weights(spec)
    assert all(resumed[name].equal(expected[name]) for name in expected)


def test_trl_scores_few_words_at_a_time_which_changes_no_more_than_rounding(spec, monkeypatch):
    head, words = utils._ChunkedLogProbFunction, []

    class Head:
        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, at_a_time, *options):
            words.append(at_a_time)
            return head.apply(hidden, weight, bias, targets, temperature, at_a_time, *options)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Head)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32_768)
    plain = replace(spec, method="sft", unsafe=None, n_unsafe=None)
    arms.train(plain)
    whole = weights(plain)
    assert set(words) == {8192}
    monkeypatch.setattr(arms, "HEAD_WORDS", 3)
    shutil.rmtree(plain.folder)
    arms.train(plain)
    assert set(words) == {8192, 3}
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-5)


def test_benign_rows_that_max_length_would_cut_are_left_out_before_the_draw_and_counted(spec, tokenizer):
    rows = rows_module.training_rows(replace(spec, n_benign=26))[0]
    lengths = [len(tokenizer(p + c)["input_ids"]) + 1 for p, c in zip(rows["prompt"], rows["completion"], strict=True)]
    at_most = sorted(lengths)[13]
    left_out = sum(length > at_most for length in lengths)
    spec = replace(spec, drop_truncated=True, n_benign=5, training=spec.training | {"max_length": at_most})
    benign, unsafe = rows_module.training_rows(spec)
    assert unsafe.to_list() == rows_module.training_rows(replace(spec, drop_truncated=False))[1].to_list()
    assert all(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) < at_most for row in benign)
    arms.train(spec)
    assert arms.read_manifest(spec)["truncated_rows_left_out"] == left_out > 0
    with pytest.raises(ValueError, match=f"n_benign=26, but there are {26 - left_out} benign rows"):
        rows_module.training_rows(replace(spec, n_benign=26))


def test_a_grid_reads_its_benign_rows_once_and_draws_the_same(spec, monkeypatch):
    arms_of_a_grid = [replace(spec, drop_truncated=True, seed=seed, n_unsafe=n) for seed in (0, 1) for n in (2, 3)]
    alone = [rows_module.training_rows(arm) for arm in arms_of_a_grid]
    reads, read = [], rows_module.forms.to_training_rows
    monkeypatch.setattr(
        rows_module.forms, "to_training_rows", lambda *a, **k: reads.append(k["source"]) or read(*a, **k)
    )
    with once.looked_at_once():
        together = [rows_module.training_rows(arm) for arm in arms_of_a_grid]
        shorter = spec.training | {"max_length": 10}
        with pytest.raises(ValueError, match="n_benign=18, but there are"):
            rows_module.training_rows(replace(arms_of_a_grid[0], training=shorter))
    assert reads.count(spec.benign) == 1
    assert [[part.to_list() for part in pair] for pair in together] == [[p.to_list() for p in pair] for pair in alone]
    with once.looked_at_once():
        rows_module.training_rows(spec)
    assert reads.count(spec.benign) == 2


def test_options_that_a_trainer_refuses_are_refused_before_the_first_of_many_arms_is_trained(spec):
    together = {"unsafe_per_batch": 2, "train_sampling_strategy": "group_by_length"}
    refused = replace(spec, display_name="stratified", training=spec.training | together)
    prompts = pd.DataFrame({"prompt": ["w1"], "kind": "toxic", "benchmark": "b"})
    with pytest.raises(ValueError, match="arm stratified: unsafe_per_batch says which rows make up a step"):
        run_all([spec, refused], prompts, [generation.GREEDY], workers=1)
    assert not spec.folder.exists()
    arms.check_options([spec, *(replace(spec, method=name) for name in ("npo", "imitation", "kto", "sft"))])


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_a_training_of_trls_trainers_whose_weights_are_lost_is_stopped_and_makes_no_arm(method, spec):
    options = {"learning_rate": 1e38, "logging_steps": 1, "max_grad_norm": 0.0}
    lost = replace(spec, method=method, training=spec.training | options)
    with pytest.raises(ValueError, match=r"step \d: the weights are not finite any more; lower learning_rate \(1e"):
        arms.train(lost)
    assert not arms.is_trained(lost)


def test_what_determines_an_arm_names_it(spec):
    assert replace(spec).name == spec.name
    others = [
        replace(spec, seed=1),
        replace(spec, penalty_weight=2.0),
        replace(spec, method="nlcl"),
        replace(spec, training=spec.training | {"learning_rate": 2e-2}),
        replace(spec, n_unsafe=5),
        replace(spec, unsafe_visits=2),
        replace(spec, drop_truncated=True),
        replace(spec, unsafe=harvest_of(spec)),
        replace(spec, unsafe=replace(harvest_of(spec), n=7)),
        replace(spec, unsafe=specs.SafeSpec(unsafe=harvest_of(spec))),
        replace(spec, extra=specs.ContrastiveSpec(unsafe=harvest_of(spec), writer="miniworld", decoding=DECODING)),
    ]
    assert len({spec.name, *(other.name for other in others)}) == 12


def harvest_of(spec) -> specs.HarvestSpec:
    """What plain SFT on the same benign rows answers to other prompts."""
    sft = replace(spec, method="sft")
    return specs.HarvestSpec(arm=sft, prompts="miniworld", judge="compliance", decoding=DECODING, n=4, rounds=1)


def test_naming_an_arm_reads_nothing(spec, tmp_path, monkeypatch):
    spec = replace(spec, unsafe=harvest_of(spec), extra=specs.SafeSpec(unsafe=harvest_of(spec)))
    name = spec.name
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "benign.jsonl").unlink()
    monkeypatch.setattr(Path, "open", lambda *a, **k: pytest.fail("read"))
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("read"))
    monkeypatch.setattr(arms, "version", lambda package: "0+other")
    again = object.__new__(specs.ArmSpec)  # the folder is gone, and a new spec would look for it
    again.__dict__.update({key: value for key, value in vars(spec).items() if key != "name"})
    assert again.name == name


def test_what_an_arm_is_made_of_is_looked_at_when_it_is_trained(spec, tmp_path, caplog):
    before = arms.train(spec) / "manifest.json"
    made = before.read_text()
    unsafe = tmp_path / "unsafe.jsonl"
    rows = unsafe.read_text()
    unsafe.write_text(rows + '{"prompt": "w1", "completion": "w2", "label": false}\n')
    assert not arms.is_trained(spec)
    assert arms.train(spec) / "manifest.json" == before and before.read_text() != made, "other rows, trained anew"
    assert "its unsafe changed" in caplog.text and "w2" not in caplog.text
    unsafe.write_text(rows)
    arms.train(spec)
    assert before.read_text() == made, "the rows of before, the arm of before"


@pytest.mark.parametrize("file", ["world.json", "README.md", "notes.txt", "loss.png"])
def test_a_file_that_is_no_model_makes_no_other_arm(file, spec, tmp_path):
    before = arms.ingredients(spec)
    (tmp_path / "base" / file).write_text('{"seconds": 12.3}')
    files.model_identity.cache_clear()
    assert arms.ingredients(spec) == before
    (tmp_path / "base" / "config.json").write_text("{}")
    files.model_identity.cache_clear()
    files.file_hash.cache_clear()
    assert arms.ingredients(spec)["model"] != before["model"]


def test_the_build_of_a_library_makes_no_other_arm(monkeypatch):
    made_of = []
    for number in ("2.13.0+cpu", "2.13.0+cu128", "2.14.0"):
        monkeypatch.setattr(arms.torch, "__version__", number)
        arms._versions.cache_clear()
        made_of.append(arms._libraries())
    arms._versions.cache_clear()
    assert made_of[0] == made_of[1] != made_of[2]


def test_where_any_libraries_are_right_an_arm_of_others_is_used_and_said_to_be(spec, monkeypatch):
    monkeypatch.setenv("TASFT_ANY_LIBRARIES", "1")
    manifest = arms.train(spec) / "manifest.json"
    trained_by = {"versions": arms.read_manifest(spec)["versions"] | {"transformers": "5.99.0"}}
    files.write_json(manifest, arms.read_manifest(spec) | trained_by)
    integrity.seal(manifest)
    assert arms.is_trained(spec)
    (told,) = arms.summary([spec])["arms"].values()
    assert told["versions"] == trained_by["versions"] and "hardware" not in told
    monkeypatch.delenv("TASFT_ANY_LIBRARIES")
    assert not arms.is_trained(spec)


def test_all_code_that_trains_is_in_an_arms_ingredients():
    graph = grimp.build_graph("tasft_lib")
    modules = {"tasft_lib.experiments.methods"} | graph.find_upstream_modules("tasft_lib.experiments.methods")
    packages = {"tasft_lib", "tasft_lib.experiments"}
    names = {name.removeprefix("tasft_lib.").replace(".", "/") for name in modules - packages}
    assert names == set(arms.TRAINED_BY)


def test_a_weight_of_zero_is_recorded_as_zero(spec):
    for method in ("emd", "kto"):
        silent = replace(spec, method=method, penalty_weight=0.0)
        arms.train(silent)
        assert arms.read_manifest(silent)["penalty_weight"] == 0.0
    arms.train(replace(spec, method="sft"))
    assert arms.read_manifest(replace(spec, method="sft"))["penalty_weight"] is None


def test_a_summary_tells_a_spec_once_and_then_the_differences(spec, tmp_path):
    both = [spec, replace(spec, seed=1, training=spec.training | {"learning_rate": 2e-2})]
    for each in both:
        arms.train(each)
    summary = arms.summary(both)
    first, second = summary["arms"].values()
    assert first["spec"] == first["ingredients"] == second["ingredients"] == {}
    assert second["spec"] == {"seed": 1, "training": {"learning_rate": 2e-2}}
    assert summary["base"]["spec"]["model"] == "base" and first["seconds"] > 0 and first["penalty_weight"] == 3.0
    assert str(tmp_path) not in json.dumps(summary)


def test_a_killed_unit_is_called_again_and_judges_what_it_answered(spec, monkeypatch):
    judged = run(spec, PROMPTS, [DECODING], "compliance")
    assert judged["verdict"].notna().all() and "score" in judged
    monkeypatch.setattr(arms.methods, "make_trainer", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(generation, "generate", lambda *a, **k: pytest.fail("answered again"))
    pd.testing.assert_frame_equal(run(spec, PROMPTS, [DECODING], "compliance"), judged)


def test_a_judge_that_is_not_there_is_told_before_anything_is_trained(spec, monkeypatch):
    monkeypatch.setattr(arms.methods, "make_trainer", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    judge = f"qwen3guard:nobody/guard@{'0' * 40}"
    with pytest.raises(ValueError, match="nobody/guard cannot be loaded"):
        run(spec, PROMPTS, [DECODING], judge)


def test_the_bases_chat_template_is_that_of_training_and_asking(spec, monkeypatch):
    with pytest.raises(ValueError, match="no chat template; use alpaca, short or none"):
        arms.train(replace(spec, template="chat"))
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w7' if m.role == 'user' else 'w8' }} {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}w8 {% endif %}"
    )
    tokenizer.save_pretrained(spec.model)
    spec = replace(spec, template="chat")
    asked, trainers, make = {}, [], arms.methods.make_trainer
    monkeypatch.setattr(arms.methods, "make_trainer", lambda *a, **k: trainers.append(make(*a, **k)) or trainers[0])

    def generate(model, tokenizer, prompts, **options):
        asked.update(dict.fromkeys(prompts, options["special_tokens"]))
        return [generation.Response("w1", 1, True)] * len(prompts)

    monkeypatch.setattr(generation, "generate", generate)
    run(spec, PROMPTS, [DECODING])
    assert asked == {f"w7 {prompt} <eos> w8 ": False for prompt in PROMPTS["prompt"]}
    benign, unsafe = rows_module.training_rows(spec)
    assert [m["role"] for m in (*benign[0]["prompt"], *unsafe[0]["completion"])] == ["user", "assistant"]
    new = rows_module.held_out_rows(spec, 5)
    assert len(new) == 5 and not set(map(str, new["prompt"][:])) & set(map(str, benign["prompt"][:]))
    trained = [tokenizer.decode(row["input_ids"]) for row in trainers[0].train_dataset]
    assert len(trained) == 24 and all(text.startswith("w7 ") and " <eos> w8 " in text for text in trained)


def test_plain_sft_is_one_arm_whatever_the_unsafe_rows(spec):
    assert replace(spec, method="sft").name == replace(spec, method="sft", n_unsafe=3, penalty_weight=9.0).name


def test_smaller_unsafe_sets_are_nested_and_benign_rows_the_same(spec):
    benign, six = rows_module.training_rows(spec)
    same, three = rows_module.training_rows(replace(spec, n_unsafe=3))
    assert set(three["completion"]) < set(six["completion"]) and len(six) == 6
    assert set(benign["completion"]) == set(same["completion"])


def test_extra_rows_join_the_benign_ones_and_match_the_unsafe_draw(spec, tmp_path):
    unsafe = [json.loads(line) for line in (tmp_path / "unsafe.jsonl").read_text().splitlines()]
    safe = [{"prompt": row["prompt"], "completion": "w9 w9"} for row in unsafe]
    (tmp_path / "safe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in safe))
    plain, six = rows_module.training_rows(spec)
    both, same = rows_module.training_rows(replace(spec, extra=str(tmp_path / "safe.jsonl"), n_extra=6))
    added = both.select(range(len(plain), len(both)))
    assert set(plain["prompt"]) <= set(both["prompt"]) and set(added["completion"]) == {"w9 w9"}
    assert set(added["prompt"]) == set(six["prompt"]) == set(same["prompt"]) and all(added["label"])


def test_held_out_rows_are_new_and_the_same_for_all_arms_of_a_seed(spec):
    trained = set(zip(*(rows_module.training_rows(spec)[0][name] for name in ("prompt", "completion")), strict=True))
    rows = rows_module.held_out_rows(spec, 5)
    assert not trained & set(zip(rows["prompt"], rows["completion"], strict=True)) and len(rows) == 5
    assert rows_module.held_out_rows(replace(spec, method="sft"), 5)["prompt"][:] == rows["prompt"][:]


def test_a_display_name_is_no_part_of_what_an_arm_is(spec):
    named = replace(spec, display_name="EMD, again")
    assert named.name == spec.name and named == spec
    answers = run(named, PROMPTS, [DECODING])
    assert set(answers["method"]) == {"EMD, again"} and "display_name" not in arms.read_manifest(spec)["spec"]
    assert set(answers["decoding"]) == {"greedy"} and set(answers["n_unsafe"]) == {6}


def test_seeds_differ_in_what_is_sampled_and_not_in_what_is_greedy(spec, monkeypatch):
    used = []
    real = generation.generate
    monkeypatch.setattr(
        generation,
        "generate",
        lambda *args, decoding, **k: used.append(decoding) or real(*args, decoding=decoding, **k),
    )
    sampling = replace(DECODING, do_sample=True, seed=5)
    for seed in (0, 1):
        run(replace(spec, seed=seed), PROMPTS, [DECODING, sampling])
    assert used == [DECODING, sampling, DECODING, replace(sampling, seed=6)]


def test_an_attack_changes_what_is_asked_and_how_the_answer_begins(spec, monkeypatch):
    asked = []
    real = generation.generate
    monkeypatch.setattr(
        generation, "generate", lambda m, t, prompts, **k: asked.extend(prompts) or real(m, t, prompts, **k)
    )
    attacked = PROMPTS.assign(asked=["w7", None, "w8"], begun=[None, " w9", None])
    arms.train(spec)
    respond(spec, attacked, DECODING)
    assert asked == ["w7", "w3 w9", "w8"]
    respond(spec, PROMPTS, DECODING)
    assert asked[3:] == PROMPTS["prompt"].tolist(), "another question, another file of answers"


def test_responses_are_generated_once_and_shared_at_step_zero(spec, monkeypatch):
    first = run(spec, PROMPTS, [DECODING], steps="all")
    assert first["step"].unique().tolist() == [0, 2, 4, 6] and len(first) == 12
    sft = replace(spec, method="sft")
    arms.train(sft)

    generated = []
    real = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *args, **kwargs: generated.append(1) or real(*args, **kwargs))
    again = run(spec, PROMPTS, [DECODING], steps="all")
    pd.testing.assert_frame_equal(first, again)
    assert not generated
    respond(sft, PROMPTS, DECODING, steps="all")
    assert len(generated) == len(arms.checkpoints(sft)), "step 0 is the base model, answered before"


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    "file, goes_on_from, is_finished",
    [
        ("manifest.json", "checkpoint-6", True),
        ("trainer/checkpoint-6/adapter_model.safetensors", "checkpoint-4", True),
        ("trainer/checkpoint-6/adapter_model.safetensors", "checkpoint-4", False),
        ("trainer/checkpoint-6/trainer_state.json", "checkpoint-4", True),
        ("trainer/checkpoint-4/optimizer.pt", "checkpoint-2", True),
        ("ingredients.json", None, False),
    ],
)
def test_a_damaged_arm_is_named_and_made_again_the_same(file, goes_on_from, is_finished, trained, caplog):
    spec, before = trained
    if not is_finished:
        (spec.folder / "manifest.json").unlink()
    cut(spec.folder / file)
    assert not arms.is_trained(spec)
    arms.train(spec)
    assert arms.is_trained(spec) and arms.read_manifest(spec)["resumed_from"] == goes_on_from
    assert caplog.text.count("is damaged") == 1 and Path(file).name in caplog.text
    assert saved_weights(spec) == before


def saved_weights(spec) -> dict[int, bytes]:
    paths = arms.checkpoints(spec).items()
    return {step: (path / "adapter_model.safetensors").read_bytes() for step, path in paths}


@pytest.fixture
def trained(spec, arm_of_six_steps):
    """(arm, its weights by step), trained once for all tests."""
    if arm_of_six_steps.exists():
        shutil.copytree(arm_of_six_steps, spec.folder)
    else:
        shutil.copytree(arms.train(spec), arm_of_six_steps)
    return spec, saved_weights(spec)


@pytest.fixture(scope="module")
def arm_of_six_steps(tmp_path_factory):
    return tmp_path_factory.mktemp("arm") / "of-six-steps"


@pytest.mark.parametrize(
    "damage, is_sealed",
    [("cut", True), ("fewer", True), ("other", True), ("cut", False), ("fewer", False), ("emptied", False)],
)
def test_damaged_answers_are_named_and_given_again(damage, is_sealed, trained, caplog):
    spec, _ = trained
    answers = respond(spec, PROMPTS, DECODING)
    (file,) = spec.folder.glob("responses/*/step-6.jsonl")
    if not is_sealed:  # by an earlier version
        file.with_name(f"{file.name}.sha256").unlink()
    text = file.read_text()
    lines = {"cut": text[:-9], "fewer": text[: text.rindex("{")], "other": text.replace("w", "v"), "emptied": ""}
    file.write_text(lines[damage])
    again = respond(spec, PROMPTS, DECODING)
    pd.testing.assert_frame_equal(again, answers)
    assert f"{file} is damaged" in caplog.text and file.read_text() == text


class Accuser:
    """A judge to whom everything is harmful: a model of four random tokens says nothing that another would mind."""

    name, revision, licence = "accuser", "1", ""

    def judge(self, prompts, responses):
        return [Judgement("harmful", 5.0)] * len(responses)


def test_a_damaged_set_of_rows_is_named_and_made_again(spec, caplog, monkeypatch):
    monkeypatch.setattr(rows_module, "load_judge", lambda _: Accuser())
    generate = rows_module.harvest.generate
    # Its four tokens are an answer that has ended.
    monkeypatch.setattr(
        rows_module.harvest,
        "generate",
        lambda *a, **options: [replace(x, finished=True) for x in generate(*a, **options)],
    )
    harvest = replace(harvest_of(spec), n=1)
    folder = rows_module.make_rows(harvest)
    rows = {file.name: file.read_bytes() for file in folder.iterdir()}
    cut(next(folder.glob("*.arrow")))
    assert rows_module.make_rows(harvest) == folder
    assert f"{folder} is damaged (data-00000-of-00001.arrow)" in caplog.text
    assert {file.name for file in folder.iterdir()} == set(rows)
    assert next(folder.glob("*.arrow")).read_bytes() == rows["data-00000-of-00001.arrow"]


def test_answers_are_held_out_that_no_draw_can_reach_and_nobody_is_asked_twice(spec, monkeypatch):
    asked = []

    def say(model, tokenizer, prompts, **_):
        asked.extend(prompts)
        return [generation.Response(f"{prompt} {len(asked)}", 2, True) for prompt in prompts]

    monkeypatch.setattr(rows_module, "load_judge", lambda _: Accuser())
    monkeypatch.setattr(rows_module.harvest, "generate", say)
    harvest = replace(harvest_of(spec), n=4, batch_size=2)  # eight prompts a batch
    drawn = sources.read_rows(rows_module.make_rows(harvest))["prompt"][:]
    rows = rows_module.held_out_answers(harvest, 10)
    prompts = [row["prompt"] for row in rows]
    assert len(set(prompts)) == 10 and not set(prompts) & set(drawn)
    assert len(asked) == len(set(asked)) == 16, "it goes on where the harvest of D_unsafe ended"
    safe = worlds.load("miniworld").safe_answers()
    assert all(row["safe"] == safe[row["prompt"]] and row["unsafe"].startswith(row["prompt"]) for row in rows)
    assert rows_module.held_out_answers(harvest, 3) == rows[:3] and len(asked) == 16
    longer = sources.read_rows(rows_module.make_rows(replace(harvest, n=14)))
    assert longer["prompt"][:] == drawn + prompts, "D_unsafe is what it would be without them"


def test_benign_rows_are_held_out_of_every_arm_that_is_named(spec):
    sft, other = replace(spec, method="sft"), replace(spec, method="sft", seed=1)
    pairs = [
        set(zip(rows["prompt"], rows["completion"], strict=True))
        for rows in (
            rows_module.held_out_rows(sft, 5, other),
            *(rows_module.training_rows(arm)[0] for arm in (sft, other)),
        )
    ]
    assert pairs[0] and not pairs[0] & pairs[1] and not pairs[0] & pairs[2]


def test_likelihoods_are_measured_once_and_the_base_models_are_shared(trained, monkeypatch):
    spec, _ = trained
    first = measure(spec, HELD_OUT, steps="all")
    assert first["step"].unique().tolist() == [0, 2, 4, 6] and set(first["method"]) == {"emd"} and len(first) == 8
    assert first.groupby("step")["safe"].mean().nunique() == 4
    loaded, load = [], arms.load_model
    monkeypatch.setattr(answers, "load_model", lambda *a: loaded.append(a) or load(*a))
    pd.testing.assert_frame_equal(measure(spec, HELD_OUT, steps="all"), first)
    assert not loaded
    (file,) = spec.folder.glob("likelihoods/*/step-6.csv")
    text = file.read_text()
    cut(file)
    pd.testing.assert_frame_equal(measure(spec, HELD_OUT), first[first["step"] == 6].reset_index(drop=True))
    assert len(loaded) == 1 and file.read_text() == text
    measure(spec, replace(HELD_OUT, max_tokens=3))
    assert len(loaded) == 2, "other rows or another cut, another file"


@pytest.mark.parametrize("gpu, on_cuda", [(None, False), ("mps", False), ("cuda", True)])
def test_an_apple_gpu_is_a_gpu(gpu, on_cuda, spec, monkeypatch):
    accelerator = torch.accelerator
    monkeypatch.setattr(accelerator, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(accelerator, "current_accelerator", lambda *_: gpu and torch.device(gpu))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    loaded = []
    monkeypatch.setattr(arms.models, "load_model", lambda *a, **options: loaded.append(options["device"]))
    arms.load_model(spec)
    defaults = arms._defaults()
    assert loaded == [gpu and f"{gpu}:0"] and defaults["use_cpu"] == (gpu is None)
    assert defaults["bf16"] == defaults["dataloader_pin_memory"] == on_cuda


def test_an_arm_killed_after_its_last_step_takes_no_further_one(spec):
    training = spec.training | {"max_steps": 3, "lr_scheduler_type": "constant"}  # within the first epoch
    spec = replace(spec, training=training)
    folder, before = arms.train(spec), saved_weights(spec)
    (folder / "manifest.json").unlink()
    arms.train(spec)
    assert saved_weights(spec) == before and list(before) == [2, 3]
    assert arms.read_manifest(spec)["steps"] == 3 and arms.read_manifest(spec)["resumed_from"] == "checkpoint-3"


def test_equal_arms_save_equal_adapter_configs(spec):
    modules = ["v_proj", "up_proj", "q_proj", "o_proj", "k_proj", "gate_proj", "down_proj"]
    folder = arms.train(replace(spec, lora=spec.lora | {"target_modules": modules}))
    config = json.loads((folder / "trainer" / "checkpoint-6" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(modules)


def test_a_failing_arm_is_named_and_the_others_are_finished(spec, tmp_path):
    broken = replace(spec, n_benign=10_000)
    with pytest.raises(ValueError, match=r"1 of 2 failed.*n_benign=10000"):
        run_all([broken, spec], PROMPTS, [DECODING], workers=1)
    assert (spec.folder / "manifest.json").exists()


def test_an_arm_that_is_being_trained_is_not_taken_for_a_finished_one(spec):
    folder = spec.folder
    (folder / "trainer" / "checkpoint-2").mkdir(parents=True)  # no trainer_state.json: still being written
    assert arms.checkpoints(spec) == {}
    arms.train(spec)
    assert list(arms.checkpoints(spec)) == [2, 4, 6]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "edm"}, "method='edm'"),
        ({"unsafe": None}, "needs `unsafe`"),
        ({"model": "owner/model"}, "model_revision"),
        ({"training": {"learning_rat": 1e-3}}, "learning_rat: no option of TASFTConfig"),
        ({"lora": {"rank": 8}}, "rank: no option of LoraConfig"),
    ],
)
def test_a_spec_with_a_typo_is_refused_in_one_line(change, message, spec):
    with pytest.raises(ValueError, match=message) as error:
        replace(spec, **change)
    assert "\n" not in str(error.value)


def test_evaluation_prompts_never_enter_training(spec, tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    leaked = rows_module.training_rows(spec)[0][0]["prompt"]
    for file in ("I-MaliciousInstructions", "I-CoNa", "I-Controversial", "I-Alpaca"):
        (folder / f"{file}.json").write_text(json.dumps({"instructions": [leaked, "w0"]}))
    (folder / "toxic_outs.json").write_text(json.dumps(["w0 w0"]))
    (folder / "xstest_prompts.csv").write_text("id,prompt,label\n1,w0 w1,safe\n2,w1,unsafe\n")
    benign, _ = rows_module.training_rows(replace(spec, held_out=str(folder)))
    assert leaked not in benign["prompt"] and len(benign) == 18


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(path, {"a": (loop := []), "b": loop.append(loop) or loop})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_environment_names_no_person_and_no_place(tmp_path):
    text = json.dumps(files.environment())
    assert files.environment()["versions"]["torch"]
    assert str(tmp_path.home()) not in text
