"""Files: one process at a time in a folder."""

import subprocess
import sys
import threading

import psutil

from tasft_lib import files

POOL = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from tasft_lib import files

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, mp_context=context, initializer=files.end_with_parent) as pool:
        [pool.submit(time.sleep, 0.1).result() for _ in range(4)]  # a worker waits for more, another works
        pool.submit(time.sleep, 600)
        time.sleep(0.2)
        print("works", flush=True)
        time.sleep(600)
"""


def test_a_second_one_in_a_folder_waits_with_a_word_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    order, first_is_in, first_may_go = [], threading.Event(), threading.Event()

    def first():
        with files.folder_lock(tmp_path / "out"):
            first_is_in.set()
            first_may_go.wait(20)
            order.append("first")

    def second():
        with files.folder_lock(tmp_path / "link" / ".." / "out"):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert first_is_in.wait(20)
    threads[1].start()
    with files.folder_lock(tmp_path / "another"):  # other folders are free
        told = ""
        while "another process works on it" not in told and threads[1].is_alive():
            threads[1].join(0.05)
            told += capsys.readouterr().err
    first_may_go.set()
    for thread in threads:
        thread.join(20)
    assert order == ["first", "second"]
    assert not (tmp_path / "another").exists() and list((tmp_path / "out").iterdir()) == []


def test_ranks_of_one_launch_do_not_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path))
    with files.folder_lock(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        with files.folder_lock(tmp_path / "out"):
            pass


def test_a_lock_needs_no_home(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    with files.folder_lock(tmp_path / "out"):
        assert [path.name.startswith("tasft-") for path in tmp_path.glob("*.lock")] == [True]


def test_a_killed_process_leaves_no_worker_no_fork_server_and_no_tracker(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    process = subprocess.Popen([sys.executable, tmp_path / "pool.py"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "works\n"
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    for orphan in alive:
        orphan.kill()
    assert len(started) >= 3 and not alive
