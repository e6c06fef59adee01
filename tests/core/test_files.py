"""Files: one process at a time in a folder."""

import threading

from tasft_lib import files


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
