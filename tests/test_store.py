"""Files that are whole or not there, folders that are tried in time, locks."""

import multiprocessing
import os
import stat
import threading
import time

import pytest
from geodesic import store


def test_a_reader_sees_one_whole_file_whoever_writes(tmp_path):
    """Eight threads of one process, which share its number, write one file many times over."""
    texts = {letter: letter * 50_000 for letter in "abcdefgh"}
    threads = [
        threading.Thread(target=lambda t=text: [store.write(tmp_path / "x.json", t) for _ in range(20)])
        for text in texts.values()
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "x.json").exists():
            assert (tmp_path / "x.json").read_text() in texts.values()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_a_killed_process_left_is_cleared_away_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: None)  # as if killed before it
    monkeypatch.setattr(store.Path, "unlink", lambda *_, **__: None)
    store.write(tmp_path / "a.json", "1")
    store.write(tmp_path / "b.json", "1")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    store.clear_partial(tmp_path, "a")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("b.")


def test_a_folder_is_tried_and_goes_again_if_it_stayed_empty(tmp_path):
    with store.writable(tmp_path / "x" / "y", "the records"):
        assert (tmp_path / "x" / "y").is_dir()
    assert list(tmp_path.iterdir()) == []
    with store.writable(tmp_path / "x" / "y", "the records") as folder:
        (folder / "1").touch()
    assert (tmp_path / "x" / "y" / "1").exists()


def test_a_folder_that_takes_no_file_is_named_before_anything_is_done(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"file/out, the folder of the records, cannot be written to \(Not a directory\)"),
        store.writable(tmp_path / "file" / "out", "the records"),
    ):
        pytest.fail("entered")


def test_a_full_disk_is_found_by_its_content(tmp_path, monkeypatch):
    """The name of a file still finds room where its content does not."""

    def full(path, _):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Path, "write_bytes", full)
    with (
        pytest.raises(OSError, match=r"the folder of the checkpoints, cannot be written to \(No space left"),
        store.writable(tmp_path / "new", "the checkpoints"),
    ):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


def _count(folder, rounds):
    """Add one to a number in a file, under a lock that is removed each time."""
    for _ in range(rounds):
        while True:
            with store.lock(folder / "lock", remove=True) as held:
                if held is not None:
                    number = int((folder / "number").read_text())
                    time.sleep(0)
                    (folder / "number").write_text(str(number + 1))
                    break


def test_a_lock_that_is_removed_on_release_still_excludes(tmp_path):
    """Four processes, 100 times each: a lock on a file that has just been deleted would let two in at once."""
    (tmp_path / "number").write_text("0")
    started = [multiprocessing.get_context("fork").Process(target=_count, args=(tmp_path, 100)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert (tmp_path / "number").read_text() == "400"
    assert not (tmp_path / "lock").exists()


def test_digests_are_of_contents(tmp_path):
    (tmp_path / "a").write_text("one")
    assert store.digest("one") == store.digest(b"one") == store.digest(tmp_path / "a")
    assert store.digest("one") != store.digest("two")


def test_the_digest_of_the_library_covers_every_module(tmp_path, monkeypatch):
    """One in a package of its own, too; new names count."""
    (tmp_path / "wing").mkdir()
    digests = []
    monkeypatch.setattr(store, "__file__", str(tmp_path / "store.py"))
    for name, text in (("a.py", "1"), ("wing/b.py", "1"), ("wing/b.py", "2"), ("c.py", "")):
        (tmp_path / name).write_text(text)
        digests.append(store.library.__wrapped__())
    assert len(set(digests)) == 4


def test_a_file_keeps_the_rights_of_its_folder(tmp_path):
    """Nothing private: another user of a shared folder reads a record."""
    old = os.umask(0o022)
    try:
        path = store.write(tmp_path / "x", "1")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
