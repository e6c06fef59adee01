"""Files: whole or not at all, JSON and JSONL that are damaged, a model's identity, workers that end; Windows."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tasft_lib.storage import files

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
from tasft_lib.storage import files

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(2, mp_context=context, initializer=files.end_with_parent) as pool:
        [pool.submit(time.sleep, 0.1).result() for _ in range(4)]  # a worker waits for more, another works
        pool.submit(time.sleep, 600)
        time.sleep(0.2)
        print("works", flush=True)
        time.sleep(600)
"""


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
