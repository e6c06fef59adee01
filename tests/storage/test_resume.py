"""A training's checkpoints: in the order of training, and a torn one is known."""

from tasft_lib.storage import integrity
from tasft_lib.storage.resume import by_step, torn


def test_they_come_in_the_order_of_training(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-9.damaged", "other-1"):
        (tmp_path / name).mkdir()
    assert list(by_step(tmp_path).items()) == [(n, tmp_path / f"checkpoint-{n}") for n in (9, 10)]
    assert by_step(tmp_path / "gone") == {}


def test_what_is_torn_in_one_is_named(tmp_path):
    state, weights = tmp_path / "trainer_state.json", tmp_path / "model.safetensors"
    assert torn(tmp_path) == ["trainer_state.json is missing"]
    state.write_text('{"global_st')
    assert torn(tmp_path) == ["trainer_state.json"], "cut off before it was sealed"
    state.write_text("{}")
    weights.write_bytes(b"weights")
    assert torn(tmp_path) == []
    integrity.seal(tmp_path)
    weights.write_bytes(b"weight")
    assert torn(tmp_path) == ["model.safetensors"]
    state.write_text("{")
    assert torn(tmp_path) == ["model.safetensors", "trainer_state.json"]
