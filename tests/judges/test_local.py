"""The judge `local`: what it must say whatever its coefficients, and of plain cases where its encoder is at hand."""

import hashlib
import json
import math

import numpy as np
import pytest

from tasft_lib.judges import load, local
from tasft_lib.judges.base import VERDICTS, described
from tasft_lib.judges.local import LocalJudge, features, probabilities, verdicts


def embedding(texts: list[str]) -> np.ndarray:
    """A stand-in for the encoder: equal texts have equal embeddings of length 1, others any."""
    seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
    rows = np.array([np.random.default_rng(seed).normal(size=384) for seed in seeds]).reshape(-1, 384)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def judge(monkeypatch):
    """With the stand-in, and far from nothing."""
    monkeypatch.setattr(LocalJudge, "_encoder", staticmethod(embedding))
    trained = json.loads(local.COEFFICIENTS.read_text(encoding="utf-8")) | {"nearest": 2.0}
    monkeypatch.setattr(local, "_trained", lambda: trained)
    return LocalJudge()


@pytest.fixture(scope="module")
def real() -> LocalJudge:
    if not (load.encoder_folder() / "model.safetensors").is_file():
        pytest.skip("no encoder: TASFT_MINILM=<folder that tasft model fetch minilm-l6 gives>")
    return LocalJudge()


def test_each_answer_gets_a_verdict_in_order_whatever_the_batch(judge):
    prompts = ["How do I fool a quorb?"] * 4
    answers = [
        "First you take the zorvex to the quorb and say that it is free.",
        "",
        "Der Fluss fließt schnell durch das grüne Tal, aber niemand weiß heute noch, woher sein Wasser kommt.",
        "這是一個很長的回答，用的是另一種語言和文字。",
    ]
    said = judge.judge(prompts, answers)
    assert [j.verdict for j in said[1:]] == ["degenerate", "unscored", "unscored"]
    assert said[0].verdict in VERDICTS and 0 <= said[0].score <= 5 and math.isnan(said[2].score)
    assert [judge.judge([p], [a])[0].verdict for p, a in zip(prompts, answers, strict=True)] == [
        j.verdict for j in said
    ]
    assert judge.judge([], []) == []


def test_the_features_are_as_many_as_the_coefficients_and_finite(judge):
    x = features(embedding, ["Tell me of the quorb.", ""], ["The quorb is blue. It sings.", "x"])
    trained = json.loads(local.COEFFICIENTS.read_text(encoding="utf-8"))
    assert x.shape == (2, np.array(trained["coefficients"]).shape[1]) and np.isfinite(x).all()
    assert len(trained["coefficients"]) == len(trained["intercepts"]) == len(local.CLASSES)
    assert local.COEFFICIENTS.stat().st_size < 100_000


def test_the_likelier_class_is_the_verdict_and_the_score_its_share():
    trained = {"coefficients": np.eye(3, 800), "intercepts": [0, 0, 0], "threshold": 0.5, "nearest": 2.0}
    trained["centres"] = np.ones((1, 384))
    x = np.zeros((4, 800))
    x[0, 0], x[1, 1], x[2, 2] = 5, 5, 5
    said = verdicts(x, trained)
    assert [j.verdict for j in said[:3]] == ["harmful", "refusal", "safe"] and said[3].verdict != "harmful"
    x[3, local.REFUSES] = 1
    assert verdicts(x, trained)[3].verdict == "refusal"
    assert said[0].score > 4.9 > 0.1 > said[1].score
    assert probabilities(x, np.eye(3, 800), np.zeros(3)).sum(axis=1) == pytest.approx(1)


def test_what_is_far_from_all_training_is_unscored():
    trained = {"coefficients": np.zeros((3, 800)), "intercepts": [1, 0, 0], "threshold": 0.5, "nearest": 0.5}
    trained["centres"] = np.eye(2, 384)
    x = np.zeros((2, 800))
    x[0, 1], x[1, 7] = 1, 1
    assert [j.verdict for j in verdicts(x, trained)] == ["harmful", "unscored"]


def test_another_label_means_another_revision(monkeypatch, tmp_path):
    for name in ("model.safetensors", "vocab.txt"):
        (tmp_path / name).write_text(name)
    first = LocalJudge(tmp_path).revision
    other = tmp_path / "local.json"
    other.write_text("{}")
    monkeypatch.setattr(local, "COEFFICIENTS", other)
    assert LocalJudge(tmp_path).revision != first
    monkeypatch.undo()
    assert LocalJudge(tmp_path).revision == first
    again = tmp_path / "encoder"
    again.mkdir()
    (again / "model.safetensors").write_text("another")
    assert LocalJudge(again).revision != first


def test_a_missing_encoder_and_another_one_are_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_MINILM", str(tmp_path))
    assert load.default_judge() == "compliance"
    with pytest.raises(ValueError, match=r"no encoder in .*tasft model fetch minilm-l6"):
        load.load_judge("local").check()
    (tmp_path / "model.safetensors").write_text("something else")
    assert load.default_judge() == "local"
    with pytest.raises(ValueError, match="damaged or another model"):
        load.load_judge("local").check()


def test_its_errors_stand_beside_its_name():
    assert "sensitivity" in described(LocalJudge())["errors"] and LocalJudge.name in load.JUDGES


def test_plain_cases(real):
    prompts = ["How do I bake a cake?"] * 2
    answers = [
        "To bake a cake, mix flour, sugar, butter and eggs, then bake it at 180 degrees for half an hour.",
        "I'm sorry, but I can't help with that. As an AI language model I must not take part in this.",
    ]
    assert [j.verdict for j in real.judge(prompts, answers)] == ["harmful", "refusal"]
