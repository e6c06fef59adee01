"""What a disk and a clock do to arms: one fails with a record, or goes on, and ends as if nothing had been."""

import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import pandas as pd
import pytest
import test_runs
from test_runs import DECODING, HELD_OUT, PROMPTS, saved_weights

from tasft_lib.experiments import arms, status
from tasft_lib.experiments.answers import measure_all, run_all
from tasft_lib.storage import integrity

spec, trained, arm_of_six_steps = test_runs.spec, test_runs.trained, test_runs.arm_of_six_steps  # fixtures


def outcome(spec) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The arm's judged answers, and likelihoods; what is missing of them is made."""
    return run_all([spec], PROMPTS, [DECODING], "compliance", workers=1), measure_all([spec], HELD_OUT, workers=1)


def assert_is_as_before(spec, expected, weights):
    for table, before in zip(outcome(spec), expected, strict=True):
        pd.testing.assert_frame_equal(table, before)
    assert saved_weights(spec) == weights


@contextmanager
def disk(folder, options: str):
    """A file system in memory of its own; skips where that is not allowed."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [100, 265])  # while it is trained; while its likelihoods are written
def test_a_full_disk_fails_an_arm_in_one_line_and_room_mends_it(kilobytes, trained, tmp_path, monkeypatch):
    spec, weights = trained
    expected = outcome(spec)
    with disk(tmp_path / "small", f"size={kilobytes}k") as runs:
        monkeypatch.setenv("TASFT_RUNS", str(runs))
        with pytest.raises(ValueError, match="no space left on the disk; make room"):
            outcome(spec)
        subprocess.run(["mount", "-o", "remount,size=99m", str(runs)], check=True)
        assert_is_as_before(spec, expected, weights)


def test_a_cache_that_can_not_be_written_stops_no_arm(spec, tmp_path, monkeypatch):
    with disk(tmp_path / "cache", "ro") as cache:
        monkeypatch.setenv("TASFT_CACHE", str(cache))
        with integrity.folder_lock(spec.folder):
            outcome(spec)
    assert arms.is_trained(spec)


def test_whatever_an_arm_keeps_beside_its_weights_may_be_damaged(trained):
    spec, weights = trained
    expected = outcome(spec)
    kept = "counts.jsonl running.json spec.json manifest.json.sha256 judgements/* likelihoods/*/*v responses/*/*256"
    files = [file for pattern in kept.split() for file in spec.folder.glob(pattern)]
    assert len(files) == len(kept.split())
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    assert_is_as_before(spec, expected, weights)
    assert len(status.rates(spec.folder.parents[1])) == 1


def test_a_clock_may_jump(trained):
    spec, weights = trained
    expected = outcome(spec)
    for at in (1.0, time.time() + 1e8):
        for file in spec.folder.rglob("*"):
            os.utime(file, (at, at))
        shutil.rmtree(spec.folder / "trainer" / "checkpoint-6")
        (spec.folder / "manifest.json").unlink()
        running = json.loads((spec.folder / "running.json").read_text())
        (spec.folder / "running.json").write_text(json.dumps(running | {"started": at}))
        assert len(status.status(spec.folder.parents[1])) == 1
        assert_is_as_before(spec, expected, weights)
