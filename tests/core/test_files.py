"""Files: one process at a time in a folder."""

import ast
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tasft_lib import files

PACKAGE = Path(files.__file__).parent
# Modules and functions that Windows has not.
POSIX = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
POSIX_CALLS = (
    "fork",
    "killpg",
    "getuid",
    "geteuid",
    "setsid",
    "getpgid",
    "sched_getaffinity",
    "uname",
    "nice",
    "SIGKILL",
)

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


def test_what_is_not_as_it_was_sealed_is_named(tmp_path, caplog):
    folder, file = tmp_path / "set", tmp_path / "rows.jsonl"
    (folder / "activations").mkdir(parents=True)
    for path in (file, folder / "a.arrow", folder / "b.json", folder / "activations" / "x.f32"):
        path.write_text("a line\nanother\n")
    files.seal(folder, without="activations")
    files.seal(file)
    subprocess.run(["sha256sum", "-c", "--quiet", files.SUMS], cwd=folder, check=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "activations" / "x.f32").unlink()
    assert files.damage(folder) == files.damage(file) == files.damage(tmp_path / "never sealed") == []
    (folder / "a.arrow").write_text("a line\nanothe\n")
    (folder / "b.json").unlink()
    file.write_text("a line\n")
    assert files.damage(folder) == ["a.arrow", "b.json"] and files.damage(file) == ["rows.jsonl"]
    files.set_aside(folder, files.damage(folder))
    files.set_aside(file)
    assert f"{folder} is damaged (a.arrow, b.json)" in caplog.text and f"{file} is damaged:" in caplog.text
    assert not folder.exists() and not file.exists()
    assert (tmp_path / "set.damaged" / "notes.txt").exists() and (tmp_path / "rows.jsonl.damaged").exists()


def test_a_record_that_changed_is_named_and_passed_over(tmp_path, caplog):
    file = tmp_path / "answers.jsonl"
    records = [{"text": f"ä\ud83d {i}", "score": score} for i, score in enumerate((0.1, float("nan"), None))]
    files.append_records(file, map(files.checked, records))
    assert [record["text"] for record in files.read_records(file)] == [record["text"] for record in records]
    assert all("crc32" not in record for record in files.read_records(file))
    file.write_text(file.read_text().replace("0.1", "0.7") + '{"text": "of an earlier version"}\n{"text": "to')
    read = [record["text"] for record in files.read_records(file)]
    assert read == [records[1]["text"], records[2]["text"], "of an earlier version"]
    assert f"{file}: line 1 is damaged" in caplog.text and caplog.text.count("damaged") == 1


def test_json_that_is_none_names_its_file(tmp_path):
    file = tmp_path / "manifest.json"
    for text in ('{"a": 1', "", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json: no JSON"):
            files.read_json(file)


def test_what_a_kill_left_goes_with_the_next_writing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = [
        tmp_path / f".a.json.{process.pid}",
        tmp_path / f".b.json.{process.pid}",
        tmp_path / f".a.json.{os.getppid()}",
    ]
    for path in left:
        path.write_text("half")
    files.write_json(tmp_path / "a.json", {})
    files.write_text(tmp_path / "b.json", "")
    assert [path.exists() for path in left] == [False, False, True], "the last is of a process that lives"


def test_a_model_is_the_same_wherever_it_lies_and_whatever_lies_beside(tmp_path):
    for name in ("model", "copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    (tmp_path / "copy" / "checkpoint-4").mkdir()
    (tmp_path / "copy" / "checkpoint-4" / "model.safetensors").write_bytes(b"others")
    (tmp_path / "rows.json").write_text(json.dumps([]))
    both = [str(tmp_path / name) for name in ("model", "copy")]
    assert files.model_identity(both[0]) == files.model_identity(both[1])
    revisions = {files.named(model, None)[1] for model in both}
    assert len(revisions) == 1 and None not in revisions
    assert files.named("owner/name", "abc") == ("owner/name", "abc")
    assert files.named(str(tmp_path / "rows.json"), None)[0] == "rows.json"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_windows_has_all_that_is_imported_and_text_is_read_as_utf_8(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            assert not modules & set(POSIX), f"line {node.lineno}: import it where it is used"
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Attribute) and node.attr in POSIX_CALLS), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "read_text":
            in_proc = "/proc/" in ast.unparse(node)
            assert node.keywords or in_proc, f"line {node.lineno}: Windows reads another encoding than UTF-8"


@pytest.mark.parametrize("file", sorted((PACKAGE / "commands").glob("*.py")), ids=lambda file: file.stem)
def test_a_command_that_fills_a_folder_works_alone_in_it(file):
    source = file.read_text(encoding="utf-8")
    fills = "output_dir" in source and file.stem not in (
        "flags",
        "card",
    )  # the first is no command, the second one file
    assert "folder_lock(" in source or not fills
