"""Engines: whoever runs a unit, a process, a job or a shell, its files are the same, and what is lost is lost alone."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

import pandas as pd
import pytest
import slurm_cluster
import test_runs
import torch
from tasks import Task, work
from test_runs import DECODING, HELD_OUT, PROMPTS, weights
from transformers import TrainerCallback, TrainerControl, TrainerState

from tasft_lib import cli, models
from tasft_lib.evaluation.rates import rates_table
from tasft_lib.experiments import answers, arms, designs, engine, methods, running, status
from tasft_lib.experiments.answers import measure_all, run_all
from tasft_lib.storage import files, integrity

spec = test_runs.spec  # a fixture


@pytest.fixture(autouse=True)
def no_engine_is_named(monkeypatch):
    """Whatever a command under test names is forgotten after the test."""
    for name in ("TASFT_ENGINE", "TASFT_ENGINE_OPTIONS"):
        monkeypatch.setenv(name, "")


def test_many_arms_in_worker_processes_give_what_one_process_gives(spec, tmp_path, monkeypatch):
    both = [spec, replace(spec, method="sft")]
    alone = run_all(both, PROMPTS, [DECODING], workers=1)
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "other"))
    together = run_all(both, PROMPTS, [DECODING], workers=2)
    pd.testing.assert_frame_equal(alone, together)
    measured = measure_all(both, HELD_OUT, workers=2)
    pd.testing.assert_frame_equal(measured, measure_all(both, HELD_OUT, workers=1))
    assert measured["arm"].unique().tolist() == [arm.name for arm in both]


def test_a_lost_worker_takes_its_own_unit_and_no_other(monkeypatch):
    monkeypatch.setattr(engine, "_killed_for_memory", iter(range(9)).__next__)
    tasks = [Task(name) for name in ("killed", "a", "wrong", "b", "c")]
    done = dict(engine.results(work, tasks, 2))
    assert [done[i] for i in (1, 3, 4)] == ["a done", "b done", "c done"]
    assert isinstance(done[0], ChildProcessError) and "memory ran out" in str(done[0])
    assert str(done[2]) == "no such rows"


def test_a_worker_looks_once_at_what_its_units_share():
    looks = [Task(f"looks {i}") for i in range(6)]
    seen = {result for _, result in engine.results(work, looks, 2)}
    assert seen < {task.name for task in looks} and len(seen) <= 2


def test_each_worker_has_a_gpu_to_itself(monkeypatch):
    monkeypatch.setattr(engine, "_gpus", lambda: ["5", "7"])
    monkeypatch.setattr(engine, "_start_worker", None)  # imports take seconds; a worker that is spawned needs none
    done = dict(engine.results(work, [Task("device")] * 2, 2))
    assert set(done.values()) <= {"5", "7"} and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_real_model_that_is_alone_takes_all_cores(spec, monkeypatch):
    monkeypatch.setattr(models, "CORES", 3)

    def threads(arm) -> int:
        arms.load_model(arm)
        return torch.get_num_threads()

    try:
        assert threads(spec) == 3
        assert threads(replace(spec, model="miniworld-smoke")) == 1  # its bytes are the same everywhere
        assert threads(spec) == 3
        monkeypatch.setenv(engine.SHARED, "1")
        assert threads(spec) == 1
    finally:
        torch.set_num_threads(1)


def test_a_worker_and_a_job_are_not_alone(monkeypatch):
    alone = [Task("alone")] * 2
    assert {result for _, result in engine.results(work, alone, 1)} == {"True"}
    assert {result for _, result in engine.results(work, alone, 2)} == {"False"}
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    assert not engine.is_alone()


def test_an_arm_that_fails_leaves_a_record_until_it_is_whole(spec, monkeypatch):
    train = arms.train
    monkeypatch.setattr(answers, "train", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(ValueError, match="no space left on the disk; make room"):
        run_all([spec], PROMPTS, [DECODING])
    (row,) = status.status(spec.folder.parents[1])
    assert (row["arm"], row["state"]) == (spec.name, "failed") and "make room" in row["log"]
    monkeypatch.setattr(answers, "train", train)
    judged = run_all([spec], PROMPTS, [DECODING], "compliance")
    (row,) = status.status(spec.folder.parents[1])
    assert row["state"] == "answered" and (spec.folder / "judgements" / "compliance.jsonl").exists()
    # Rates are read without answers; each set of prompts has its own, and what was damaged is counted again.
    run_all([spec], PROMPTS.head(1), [DECODING], "compliance")
    assert status.rates(spec.folder.parents[1])["n"].sum() == len(PROMPTS) + 1
    counted = spec.folder / "counts.jsonl"
    counted.write_text(counted.read_text().replace('"step": 6', '"step": 7'))
    run_all([spec], PROMPTS, [DECODING], "compliance")
    read, columns = status.rates(spec.folder.parents[1]), ["kind", "n", "harmful", "rate", "low", "high", "score"]
    assert read["arm"].tolist() == [spec.name] and read["seed"].tolist() == [spec.seed]
    pd.testing.assert_frame_equal(read[columns], rates_table(judged, ["kind"])[columns], check_dtype=False)


def test_a_signal_saves_a_checkpoint_that_the_next_start_goes_on_from(spec, tmp_path, monkeypatch):
    arms.train(spec)
    expected = weights(spec)
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "signalled"))

    class Stopped(BaseException):
        """What the signal does to a process that would end."""

    def stop(*_):
        raise Stopped

    class Sender(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGUSR2)

    make = methods.make_trainer

    def make_with_sender(*args, **options):
        trainer = make(*args, **options)
        trainer.add_callback(Sender())
        return trainer

    before = signal.signal(signal.SIGUSR2, stop)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(methods, "make_trainer", make_with_sender)
            with pytest.raises(Stopped):
                arms.train(spec)
        (row,) = status.status(spec.folder.parents[1])
        assert row["step"] == "3 of 6" and list(arms.checkpoints(spec)) == [2, 3]
        arms.train(spec)
        assert signal.getsignal(signal.SIGUSR2) is stop
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert arms.read_manifest(spec)["resumed_from"] == "checkpoint-3" and list(arms.checkpoints(spec)) == [2, 4, 6]
    assert all(value.equal(expected[name]) for name, value in weights(spec).items())


def test_jobs_give_what_units_give_and_are_submitted_once_by_two_drivers(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path))
    monkeypatch.setenv("TASFT_ENGINE", "local")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with ThreadPoolExecutor(2) as drivers:
        one, other = drivers.map(lambda _: dict(engine.results(work, [Task("a"), Task("killed")], 2)), range(2))
    for seen in (one, other):
        assert seen[0] == "a done" and isinstance(seen[1], ChildProcessError) and "was lost" in str(seen[1])
    assert len(list((tmp_path / "jobs").glob("*_submitted.pkl"))) == 2


@contextmanager
def at_most(seconds: int):
    """A job that no node ever takes is waited for without end."""

    def stop(*_):
        raise TimeoutError(f"no result after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not slurm_cluster.can_start(), reason="no Slurm here: apt-get install slurm-wlm munge, as root")
def test_a_cluster_gives_what_processes_give(spec, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    both = [spec, replace(spec, method="sft")]
    here = run_all(both, PROMPTS, [DECODING], "compliance", workers=1)
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path / "other"))
    monkeypatch.setenv("TASFT_ENGINE", "slurm")
    with ExitStack() as stack:
        try:
            stack.enter_context(slurm_cluster.cluster(tmp_path / "slurm"))
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"Slurm is installed and does not start here: {error}")
        stack.enter_context(at_most(300))
        pd.testing.assert_frame_equal(run_all(both, PROMPTS, [DECODING], "compliance"), here)
        for options in (files.project_root() / "params" / "engines").glob("*.yaml"):
            monkeypatch.setenv("TASFT_ENGINE_OPTIONS", str(options))
            engine.check()


def test_an_engine_that_is_not_there_is_told_before_anything_is_begun(monkeypatch, capsys, tmp_path):
    assert cli.main(["reproduce", "--engine", "ray", "--profile", "smoke"]) == 1
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path))
    assert "choose one of processes, local, debug, slurm" in capsys.readouterr().err
    pytest.importorskip("submitit")
    (tmp_path / "options.yaml").write_text("gpus: 1\n")
    options = ["--engine", "local", "--engine_options", str(tmp_path / "options.yaml")]
    assert cli.main(["reproduce", *options, "--profile", "smoke"]) == 1
    assert "options.yaml: submitit takes no such options" in capsys.readouterr().err


def test_an_arm_that_was_written_is_run_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path))
    assert cli.main(["reproduce", "--profile", "smoke", "--notebooks", "safety", "--write_arms"]) == 0
    names = capsys.readouterr().out.split()
    assert names[0].startswith("sft-") and len(names) == len(set(names)) > 3
    asked = []
    monkeypatch.setattr(designs.Study, "answers", lambda self, specs: asked.extend(specs))
    assert cli.main(["arm", names[1]]) == 0
    assert [arm.name for arm in asked] == names[1:2]
    assert cli.main(["arm", "emd-0"]) == 1 and "--write_arms writes it" in capsys.readouterr().err


def test_a_training_tells_how_far_it_is(tmp_path, monkeypatch):
    told, state = running.Running(tmp_path), TrainerState(max_steps=9)
    told.on_train_begin(None, state, None)
    state.global_step = 4
    told.on_step_end(None, state, TrainerControl())
    assert json.loads((tmp_path / "running.json").read_text())["step"] == 0  # not at every step: a disk has other work
    monkeypatch.setattr(running, "EVERY", 0)
    told.on_step_end(None, state, TrainerControl())
    assert json.loads((tmp_path / "running.json").read_text())["step"] == 4


def test_status_reads_files_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TASFT_RUNS", str(tmp_path))
    for name in ("sft-1", "emd-2", "emd-3", "emd-2.old", "base-4"):
        (tmp_path / "arms" / name).mkdir(parents=True)
    (tmp_path / "arms" / "sft-1" / "manifest.json").write_text("{}")
    now = time.time()
    told = {"host": "elsewhere", "pid": 1, "started": now - 600, "from_step": 10, "steps": 70, "step": 30, "at": now}
    (tmp_path / "arms" / "emd-2" / "running.json").write_text(json.dumps(told))
    (tmp_path / "arms" / "emd-2" / "trainer" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "emd-3.abc.json").write_text('{"job": "7_1", "log": "7_1.err"}')
    (tmp_path / "jobs" / "unsafe-5.abc.json").write_text('{"job": "8", "log": "8.err"}')
    assert cli.main(["status"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in table[1:5]] == [
        ["emd-2", "running"],
        ["emd-3", "waiting"],
        ["sft-1", "trained"],
        ["unsafe-5", "waiting"],
    ]
    assert table[1][2:6] == ["30", "of", "70", "elsewhere"] and table[1][-2:] == ["20", "min"]
    assert table[2][-1] == "7_1.err"
    gone = told | {"host": socket.gethostname(), "pid": 2**22 + 1}  # no process has such a number
    (tmp_path / "arms" / "emd-2" / "running.json").write_text(json.dumps(gone))
    assert [status.status(tmp_path)[0][name] for name in ("state", "step", "left")] == ["stopped", "20 of 70", ""]
    shutil.rmtree(tmp_path / "arms")
    shutil.rmtree(tmp_path / "jobs")
    assert status.status(tmp_path) == []


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    assert integrity.disk_faults(tmp_path) == [] and not list(tmp_path.glob(".disk"))
    monkeypatch.setattr(integrity, "FileLock", lambda file: nullcontext())
    (fault,) = integrity.disk_faults(tmp_path)
    assert "does not stop another" in fault
