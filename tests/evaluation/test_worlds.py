"""Worlds: one protocol, two of them, and what each can't give it says."""

import inspect
import shutil
from pathlib import Path

import pytest

from tasft_lib.evaluation import worlds
from tasft_lib.evaluation.worlds import MiniWorld, PublishedFiles, World
from tasft_lib.judges.base import ExactJudge
from tasft_lib.judges.load import load_judge


def test_a_world_is_named_by_its_source():
    assert isinstance(worlds.load("miniworld"), MiniWorld)
    assert worlds.load("stl") == PublishedFiles("stl")


@pytest.mark.parametrize("world", [MiniWorld, PublishedFiles])
def test_both_worlds_have_the_whole_protocol(world):
    for name, method in inspect.getmembers(World, inspect.isfunction):
        if not name.startswith("_"):
            own = inspect.signature(getattr(world, name)).parameters
            missing = set(inspect.signature(method).parameters) - set(own)
            assert not missing or any(p.kind is p.VAR_KEYWORD for p in own.values()), (name, missing)


def test_a_hub_id_is_neither_a_folder_nor_built_here(tmp_path):
    assert worlds.is_hub_id("owner/name")
    assert not any(map(worlds.is_hub_id, ("miniworld", "miniworld-7", "miniworld-smoke", str(tmp_path))))
    assert worlds.is_hub_id("miniworld-large")
    assert worlds.base_model("owner/name") == "owner/name"


def test_the_mini_world_keeps_its_splits_apart():
    world = worlds.load("miniworld")
    splits = [set(world.evaluation_prompts(split=split)["prompt"]) for split in ("development", "evaluation")]
    assert not set.intersection(*splits) and not set(world.harvest_prompts()) & set.union(*splits)
    few = world.evaluation_prompts(per_benchmark=3)
    assert (few.groupby("benchmark").size() == 3).all() and set(few["kind"]) == {"toxic", "benign", "seemingly toxic"}
    assert set(world.question_kinds()) == set(world.evaluation_prompts().query("kind == 'benign'")["prompt"])
    assert set(world.safe_answers()) == set(world.harvest_prompts())


def test_a_world_of_files_says_what_it_lacks(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w1 w2?"}\n')
    world = worlds.load(str(file))
    assert world.file == file and world.harvest_prompts() == ["w1 w2?"]
    assert world.failures(100) == {} and world.contrastive_rows(["w1"], 1, seed=0) is None
    with pytest.raises(ValueError, match="prompts without safe answers"):
        world.safe_answers()


def test_only_the_judge_that_knows_its_world_is_exact():
    exact = load_judge("miniworld")
    assert isinstance(exact, ExactJudge) and not isinstance(load_judge("compliance"), ExactJudge)
    world = worlds.load("miniworld")
    benign = world.evaluation_prompts().query("kind == 'benign'")["prompt"].tolist()[:5]
    assert exact.are_correct([*benign, "w1?"], ["Nobody knows."] * 6) == [False] * 5 + [None]
    assert exact.harm_words("w1 w2") == set()


def test_a_built_model_that_is_damaged_is_named_and_built_again(tmp_path, monkeypatch, caplog):
    def build(config):
        folder = tmp_path / "miniworld" / "hash"
        if not folder.exists():
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"weights of the mini-world")
        return folder

    monkeypatch.setattr(worlds.miniworld, "build_base_model", build)
    weights = Path(worlds.base_model("miniworld-3")) / "model.safetensors"
    weights.write_bytes(b"weights of the")
    assert worlds.base_model("miniworld-3") == str(weights.parent)
    assert weights.read_bytes() == b"weights of the mini-world"
    assert f"{weights.parent} is damaged (model.safetensors)" in caplog.text


def test_a_base_model_that_comes_with_tasft_is_read_where_it_lies_and_its_bytes_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(worlds.miniworld, "build_base_model", lambda config: pytest.fail("pre-trained"))
    shipped = Path(worlds.base_model("miniworld-smoke"))
    assert shipped.parent == worlds.miniworld.BASES
    monkeypatch.setattr(worlds.miniworld, "BASES", tmp_path)
    copy = shutil.copytree(shipped, tmp_path / "miniworld-smoke")
    assert worlds.base_model("miniworld-smoke") == str(copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or gone; install tasft again.*git checkout"):
        worlds.base_model("miniworld-smoke")
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="SHA256SUMS is damaged or gone"):
        worlds.base_model("miniworld-smoke")


def test_a_seed_of_the_mini_world_has_a_base_model_of_its_own_and_other_models_have_one(monkeypatch):
    assert [worlds.base_of_seed("miniworld", seed) for seed in range(3)] == ["miniworld", "miniworld-1", "miniworld-2"]
    assert {worlds.base_of_seed(model, 2) for model in ("miniworld-smoke", "a/b")} == {"miniworld-smoke", "a/b"}
    seeds = []
    monkeypatch.setattr(worlds.miniworld, "build_base_model", lambda config: seeds.append(config.seed) or Path("none"))
    for name in ("miniworld", "miniworld-12"):
        worlds.pretrain(name)
    assert seeds == [0, 12]
    with pytest.raises(ValueError, match="a/b: nothing to pre-train; give miniworld"):
        worlds.pretrain("a/b")
