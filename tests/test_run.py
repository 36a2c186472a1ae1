"""The command `run`: every run once, no record lost, nothing trained for a folder that takes no file."""

import contextlib

import pytest
from geodesic import experiment, records, store
from geodesic.__main__ import main
from PIL import Image

UNTRAINED = ("run", "--epochs", 0, "--ots-points", 50, "--quiet")


def shell(*arguments):
    return [str(argument) for argument in arguments]


@pytest.fixture
def trained(monkeypatch):
    """The seeds of the networks that are trained from now on."""
    seen = []
    train = experiment.training.train_many

    def noting(jobs, **options):
        for job, progress in train(jobs, **options):
            seen.append(job.recipe.seed)
            yield job, progress

    monkeypatch.setattr(experiment.training, "train_many", noting)
    return seen


def test_a_run_asked_for_twice_is_computed_once(tmp_path, capsys, trained):
    assert main(shell(*UNTRAINED, "--seed", 3, 3, "--weight-decay", 0, 0.0, "--out", tmp_path)) == 0
    assert trained == [3]
    assert capsys.readouterr().out.count("record written") == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]  # no lock stays


def test_what_another_process_computes_is_waited_for(tmp_path, capsys, monkeypatch, trained):
    """Its lock is held when the command looks; the other one finishes seed 0 and gives up seed 1."""
    settings = [experiment.Settings(epochs=0, ots_points=(50,), seed=seed) for seed in (0, 1)]
    record = experiment.run(settings[0])
    trained.clear()
    with contextlib.ExitStack() as other:
        for one in settings:
            other.enter_context(store.lock(tmp_path / "locks" / records.name(one.to_dict())))

        def look(_):
            records.write(record, tmp_path)
            other.close()

        monkeypatch.setattr("geodesic.__main__.time.sleep", look)
        assert main(shell(*UNTRAINED, "--seed", 0, 1, 2, "--out", tmp_path)) == 0
    said = capsys.readouterr()
    assert trained == [2, 1]
    assert (said.out.count("record written"), said.out.count("record reused")) == (2, 1)
    assert said.err == "geodesic: some runs are being computed by another process; waiting for their records\n"


@pytest.mark.parametrize("text", ["null", "5", '{"settings": {}, "final": null}', "{"])
def test_a_record_that_is_none_is_named_and_computed_again(tmp_path, capsys, text):
    path = tmp_path / f"{records.name(experiment.Settings(epochs=0, ots_points=(50,)).to_dict())}.json"
    path.write_text(text)
    assert main(shell("report", tmp_path)) == 2
    assert f"geodesic: not counted: {path}" in capsys.readouterr().err
    assert main(shell(*UNTRAINED, "--out", tmp_path)) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"geodesic: {path} ")
    assert said.err.endswith("; it is computed again\n")
    assert records.read(path)["status"] == "ok"


def test_a_record_of_other_images_is_not_reused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GEODESIC_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "pets [ v2 ]"
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (images / place).mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (8, 8), (k, 30 * k, 3 * k)).save(images / place / f"{k}.png")
    small = ("--batch-size", 8, "--eval-points", 4, "--ots-points", 4, "--width", 4, "--depth", 1, "--plane-points", 2)
    arguments = shell("run", "--epochs", 0, *small, "--quiet", "--dataset", f"folder:{images}", "--out", tmp_path / "o")
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "record reused" in capsys.readouterr().out
    Image.new("RGB", (8, 8), (200, 1, 1)).save(images / "train" / "a" / "3.png")
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "was made from other data: fingerprint " in said.err
    assert "record written" in said.out


@pytest.mark.parametrize("option", ["--out", "--checkpoints"])
def test_a_folder_that_cannot_be_written_to_is_named_before_training(tmp_path, capsys, trained, option):
    (tmp_path / "file").touch()
    assert main(shell(*UNTRAINED, "--out", tmp_path / "out", option, tmp_path / "file" / "x")) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'file' / 'x'}, the folder of the " in error
    assert error.count("\n") == 1
    assert trained == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_at_the_end_loses_no_record_and_not_the_other_runs(tmp_path, capsys, monkeypatch):
    write, calls = store.write, []

    def full_at_first(path, content):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(store, "write", full_at_first)
    monkeypatch.setattr(records.tempfile, "tempdir", str(tmp_path))
    assert main(shell(*UNTRAINED, "--seed", 0, 1, "--out", tmp_path / "out")) == 2
    said = capsys.readouterr()
    (kept,) = tmp_path.glob("geodesic-*.json")
    assert f"(No space left on device); it is in {kept}: move it to {calls[0]}" in said.err
    assert records.read(kept)["settings"]["seed"] == 0
    assert [records.read(path)["settings"]["seed"] for path in (tmp_path / "out").glob("*.json")] == [1]


def test_a_finished_run_leaves_no_checkpoint(tmp_path):
    arguments = shell(
        "run", "--epochs", 1, "--batch-size", 64, "--ots-points", 50, "--quiet", "--out", tmp_path / "out"
    )
    assert main([*arguments, "--checkpoints", str(tmp_path / "unfinished")]) == 0
    assert not (tmp_path / "unfinished").exists()
