"""Records: whole or not at all, named by their settings, tabulated."""

import json
import multiprocessing
import os
import signal

import geodesic
import pytest
from geodesic import records


def record(**settings):
    """A small record in the shape that experiment.run writes."""
    stage = {"lss_mean": 1.5, "lsr_mean": 1.2, "ots": [{"share": 0.5, "cost_ratio": 0.9, "n": 10}]}
    part = {"accuracy": 0.8, "loss": 0.3, "stages": [stage]}
    return {
        "settings": {"dataset": "digits", "network": "resnet", "weight_decay": 0.0, "seed": 0} | settings,
        "status": "ok",
        "final": {"train": part, "test": part},
        "provenance": {"seconds": 1.0, "device": "cpu", "geodesic": geodesic.__version__, "data_fingerprint": "a"},
    }


def test_what_was_written_is_read_back(tmp_path):
    path = records.write(record(), tmp_path)
    assert records.read(path) == record()
    assert path.name == records.name(record()["settings"]) + ".json"


def test_name_depends_on_every_setting_and_not_on_their_order():
    a, b = {"x": 1, "y": 2}, {"y": 2, "x": 1}
    assert records.name(a) == records.name(b)
    assert records.name(a) != records.name({"x": 1, "y": 3})


def _die_before_the_rename(folder):
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    records.write(record(), folder)


def test_a_kill_between_write_and_rename_leaves_no_record(tmp_path):
    """The process dies with the text on disk under another name: a reader must not see it."""
    process = multiprocessing.get_context("fork").Process(target=_die_before_the_rename, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1  # the partial file is there …
    assert list(records.load(tmp_path)) == []  # … and is not a record


def test_a_full_disk_leaves_the_old_record(tmp_path, monkeypatch):
    path = records.write(record(), tmp_path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.write(record(), tmp_path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_lists_of_numbers_stay_on_one_line(tmp_path):
    value = record() | {"history": [[1.5, 2.25], [3.0, 4.0]], "names": ["a", "b"]}
    path = records.write(value, tmp_path)
    assert "[1.5, 2.25]" in path.read_text()
    assert records.read(path) == value


def test_refuses_a_record_cut_in_half(tmp_path):
    path = records.write(record(), tmp_path)
    path.write_text(path.read_text()[:200])
    with pytest.raises(ValueError, match=r"is not a whole record .* delete it and run its settings again"):
        records.read(path)


def test_refuses_a_record_without_a_key(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"settings": {}, "final": None}))
    with pytest.raises(ValueError, match="lacks status, provenance"):
        records.read(path)


def test_refuses_to_write_a_non_finite_number(tmp_path):
    with pytest.raises(ValueError, match="finite numbers only"):
        records.write(record() | {"loss": float("nan")}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_says_which_folder_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        records.rows(tmp_path / "nowhere")


def written(folder, seed, dataset="digits", **provenance):
    one = record(seed=seed, dataset=dataset)
    one["provenance"] |= provenance
    return records.write(one, folder)


@pytest.mark.parametrize("made", ["0.0.9", "1.0.0", None])
def test_a_record_of_other_code_is_refused_for_a_figure(tmp_path, made):
    path = written(tmp_path, 0, geodesic=made)
    with pytest.raises(ValueError, match=rf"{path.name} was made by geodesic {made}, and this is .*run its settings"):
        list(records.load(tmp_path))


def test_a_release_that_computes_the_same_is_not(tmp_path, monkeypatch):
    """0.3.1 and 0.3.2 agree; a notebook's own digest stands in place of a version."""
    monkeypatch.setattr(geodesic, "__version__", "0.3.2")
    written(tmp_path, 0, geodesic="0.3.1")
    written(tmp_path, 1, geodesic="0.2.0", code="notebook 1234")
    assert len(list(records.load(tmp_path))) == 2


def test_a_record_of_other_data_is_refused_for_a_figure(tmp_path):
    """Two data sets under one name; another data set in the same folder is no matter."""
    written(tmp_path, 0)
    records.write(
        record(dataset="mnist") | {"provenance": record()["provenance"] | {"data_fingerprint": "c"}}, tmp_path
    )
    assert len(records.rows(tmp_path)) == 2
    written(tmp_path, 1, data_fingerprint="b")
    with pytest.raises(ValueError, match=r"other data than \w{16}\.json: digits with fingerprint [ab], not [ab];"):
        records.rows(tmp_path)


def test_rows_are_flat_and_complete(tmp_path):
    records.write(record(), tmp_path)
    records.write(record(seed=1) | {"status": "diverged", "final": None}, tmp_path)
    rows = {row["seed"]: row for row in records.rows(tmp_path)}
    assert rows[0]["lss_mean"] == 1.5
    assert rows[0]["ots_share"] == 0.5
    assert rows[0]["ots_n"] == 10
    assert rows[0]["test_accuracy"] == 0.8
    assert rows[1]["status"] == "diverged"
    assert rows[1]["lss_mean"] is None
    assert rows[0].keys() == rows[1].keys()


def test_rows_of_several_stages_hold_lists(tmp_path):
    two = record()
    two["final"]["test"]["stages"] *= 2
    records.write(two, tmp_path)
    assert records.rows(tmp_path)[0]["lss_mean"] == [1.5, 1.5]


def test_rows_refuse_another_part(tmp_path):
    with pytest.raises(ValueError, match="part='validation' must be 'train' or 'test'"):
        records.rows(tmp_path, "validation")


def test_summary_is_mean_and_sample_deviation():
    """1, 2, 3 have mean 2 and sample deviation 1; None does not count."""
    rows = [{"k": 0, "v": v} for v in (1.0, 2.0, 3.0, None)] + [{"k": 1, "v": 5.0}]
    assert records.summarise(rows, ["k"], "v") == {(0,): (2.0, 1.0, 3), (1,): (5.0, 0.0, 1)}


def test_committed_records_are_whole():
    """Everything under results/ that figures are drawn from can be read, and is named after its settings."""
    folders = {path.parent for path in records.RESULTS.glob("*/*.json")} - {records.RESULTS / "benchmarks"}
    assert folders
    for folder in folders:
        for one in records.load(folder):
            assert (folder / f"{records.name(one['settings'])}.json").exists()
