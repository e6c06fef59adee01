"""Integrity: one process at a time in a folder, and what is damaged is known."""

import subprocess
import threading
from pathlib import Path

import pytest

from tasft_lib.cli import COMMANDS
from tasft_lib.storage import integrity

PACKAGE = Path(integrity.__file__).parents[1]


def test_a_second_one_in_a_folder_waits_with_a_word_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    order, first_is_in, first_may_go = [], threading.Event(), threading.Event()

    def first():
        with integrity.folder_lock(tmp_path / "out"):
            first_is_in.set()
            first_may_go.wait(20)
            order.append("first")

    def second():
        with integrity.folder_lock(tmp_path / "link" / ".." / "out"):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert first_is_in.wait(20)
    threads[1].start()
    with integrity.folder_lock(tmp_path / "another"):  # other folders are free
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
    second_is_in = threading.Event()

    def second():
        with integrity.folder_lock(tmp_path / "out"):
            second_is_in.set()

    with integrity.folder_lock(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        threading.Thread(target=second, daemon=True).start()
        assert second_is_in.wait(20)


def test_a_lock_needs_no_home(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(integrity.tempfile, "gettempdir", lambda: str(tmp_path))
    with integrity.folder_lock(tmp_path / "out"):
        assert [path.name.startswith("tasft-") for path in tmp_path.glob("*.lock")] == [True]


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"card"}))  # which writes one file
def test_a_command_that_fills_a_folder_works_alone_in_it(command):
    source = (PACKAGE / "commands" / f"{command}.py").read_text(encoding="utf-8")
    assert "folder_lock(" in source or "output_dir" not in source


def test_what_is_not_as_it_was_sealed_is_named(tmp_path, caplog):
    folder, file = tmp_path / "set", tmp_path / "rows.jsonl"
    (folder / "activations").mkdir(parents=True)
    for path in (file, folder / "a.arrow", folder / "b.json", folder / "activations" / "x.f32"):
        path.write_text("a line\nanother\n")
    integrity.seal(folder, without="activations")
    integrity.seal(file)
    subprocess.run(["sha256sum", "-c", "--quiet", integrity.SUMS], cwd=folder, check=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "activations" / "x.f32").unlink()
    assert integrity.damage(folder) == integrity.damage(file) == integrity.damage(tmp_path / "never sealed") == []
    (folder / "a.arrow").write_text("a line\nanothe\n")
    (folder / "b.json").unlink()
    file.write_text("a line\n")
    assert integrity.damage(folder) == ["a.arrow", "b.json"] and integrity.damage(file) == ["rows.jsonl"]
    assert not integrity.keep_if_whole(folder) and not integrity.keep_if_whole(file)
    assert f"{folder} is damaged (a.arrow, b.json)" in caplog.text and f"{file} is damaged:" in caplog.text
    assert not folder.exists() and not file.exists()
    assert (tmp_path / "set.damaged" / "notes.txt").exists() and (tmp_path / "rows.jsonl.damaged").exists()
