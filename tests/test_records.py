"""Records: whole or not at all, named by their settings, tabulated."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import geodesic
import pytest
from geodesic import records, settings, store


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


@pytest.mark.parametrize("text", ["folder:pets [ v2 ]", "[\n 1,\n 2 ]", "a [ 1,   2 ] b", 'é ] \ud800 "[  ]"'])
def test_strings_are_kept_as_they_are(tmp_path, text):
    """The layout of lists is not looked for in what a string says."""
    one = record(dataset=text) | {"notes": [text, text], "deep": {text: [[text], {}]}}
    assert records.read(records.write(one, tmp_path)) == one


def test_any_json_settings_are_read_back_under_their_own_name(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    given, some = hypothesis.given, hypothesis.strategies
    number = some.floats(allow_nan=False, allow_infinity=False) | some.integers(-(10**30), 10**30)
    plain = some.none() | some.booleans() | number | some.text(some.characters())
    value = some.recursive(plain, lambda v: some.lists(v) | some.dictionaries(some.text(), v) | some.tuples(v, v))

    @hypothesis.settings(max_examples=300, deadline=None)
    @given(some.dictionaries(some.text(), value), value)
    def holds(chosen, beside):
        path = records.write(record() | {"settings": chosen, "beside": beside}, tmp_path)
        back = records.read(path)
        assert path.stem == records.name(chosen) == records.name(back["settings"])
        assert back["settings"] == json.loads(json.dumps(chosen))
        assert back["beside"] == json.loads(json.dumps(beside))
        assert records.find(tmp_path, back["settings"]) == (back, "")
        assert records.write(back, tmp_path) == path
        path.unlink()

    holds()


FIRST = {  # the settings of the first edition, which are in every name
    "weight_decay", "epochs", "batch_size", "learning_rate", "momentum", "schedule", "augment", "precision", "dataset",
    "network", "norm", "stages", "depth", "width", "seed", "labels", "n_train", "n_test", "eval_points", "ots_points",
    "plane_points",
}  # fmt: skip


def test_a_setting_that_comes_later_is_left_out_of_the_name_at_its_default():
    """Who adds a field to Settings adds it to records.LATER with that default, or every record loses its name."""
    assert {field.name for field in fields(settings.Settings)} == FIRST | records.LATER.keys()
    defaults = settings.Settings().to_dict()
    assert {key: defaults[key] for key in records.LATER} == records.LATER


def test_records_keep_their_names_when_a_setting_is_added(tmp_path, monkeypatch):
    old = settings.Settings().to_dict()
    path = records.write(record() | {"settings": old}, tmp_path)
    monkeypatch.setitem(records.LATER, "decay", "weights")
    new = old | {"decay": "weights"}
    assert records.name(new) == records.name(old) == path.stem
    assert records.name(old | {"decay": "all"}) != path.stem
    assert records.read(path)["settings"] == new  # complete
    found, why = records.find(tmp_path, new)
    assert (found["settings"], why) == (new, "")
    assert records.find(tmp_path, old | {"decay": "all"}) == (None, "")
    other = {"notebook": "mine", "decay": "weights"}  # another notebook's settings are its own
    assert records.name(other) != records.name({"notebook": "mine"})


UNSOUND = {
    "null": "holds null, not a record",
    "5": "holds 5, not a record",
    "[]": "holds [], not a record",
    "{": "is not a whole record",
    '{"settings": {}, "final": null, "provenance": {"seconds": 1}}': "lacks status",
    '{"settings": [], "status": "ok", "final": null, "provenance": {"seconds": 1}}': "has settings []",
    '{"settings": {}, "status": null, "final": null, "provenance": {"seconds": 1}}': "has status null",
    '{"settings": {}, "status": "ok", "final": null, "provenance": null}': "has provenance null",
    '{"settings": {}, "status": "ok", "final": null, "provenance": {"seconds": null}}': "has seconds null in its prov",
    '{"schema": 99, "settings": {}, "status": "ok", "final": null, "provenance": {"seconds": 1}}': "has schema 99",
}


@pytest.mark.parametrize(("text", "words"), UNSOUND.items(), ids=UNSOUND.values())
def test_what_is_no_record_is_named_by_everyone_and_counted_by_none(tmp_path, text, words):
    good = records.write(record(), tmp_path)
    chosen = {"x": 1}
    path = tmp_path / f"{records.name(chosen)}.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        records.read(path)
    with pytest.raises(ValueError, match=path.name):
        records.rows(tmp_path)
    found, why = records.find(tmp_path, chosen)
    assert found is None
    assert f"{path} {words}" in why
    with pytest.warns(store.Note, match=f"not counted: .*{path.name}"):
        left = list(records.load(tmp_path, strict=False))
    assert left == [records.read(good)]


def test_a_run_without_its_scores_is_no_record(tmp_path):
    chosen = settings.Settings().to_dict()
    for final in (5, {}, {"train": record()["final"]["train"]}, {"train": {}, "test": {}}):
        path = tmp_path / f"{records.name(chosen)}.json"
        path.write_text(json.dumps(record() | {"settings": chosen, "final": final}))
        assert "lacks accuracy, loss, stages of the t" in records.find(tmp_path, chosen)[1]


@pytest.mark.parametrize(
    ("change", "asked", "words"),
    [
        ({}, {}, None),
        ({}, {"data": "a"}, None),
        ({}, {"data": "b"}, "was made from other data: fingerprint a, not b"),
        ({"geodesic": "99.0.0"}, {}, "was made by geodesic 99.0, not geodesic "),
        ({"geodesic": None}, {}, "was made by geodesic None, not geodesic "),
        ({"code": "1234"}, {}, "was made by 1234, not geodesic "),
        ({"code": "1234"}, {"code": "1234"}, None),
    ],
)
def test_a_record_stands_for_a_run_of_its_data_and_code_only(tmp_path, change, asked, words):
    one = record()
    one["provenance"] |= change
    path = records.write(one, tmp_path)
    found, why = records.find(tmp_path, one["settings"], **asked)
    assert (found == one) == (words is None)
    assert (words or "") in why
    assert (str(path) in why) == (words is not None)


def test_a_record_under_another_name_is_not_reused(tmp_path):
    path = records.write(record(), tmp_path)
    shutil.copy(path, tmp_path / f"{records.name({'x': 1})}.json")
    assert "holds other settings" in records.find(tmp_path, {"x": 1})[1]


def test_the_checkpoint_goes_with_the_record_that_ends_the_run(tmp_path):
    unfinished = records.checkpoint(record()["settings"], tmp_path / "unfinished")
    store.write(unfinished, "weights")
    records.write(record(seed=1), tmp_path, tmp_path / "unfinished")
    assert unfinished.exists()
    records.write(record(), tmp_path, tmp_path / "unfinished")
    assert not unfinished.exists()


def _full(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_record_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "write", _full)
    monkeypatch.setattr(records.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(
        OSError, match=r"could not be written to .*out \(No space left on device\); it is in "
    ) as caught:
        records.keep(record(), tmp_path / "out")
    (kept,) = tmp_path.glob("geodesic-*.json")
    assert f"{kept}: move it to {tmp_path / 'out' / records.name(record()['settings'])}.json" in str(caught.value)
    assert records.read(kept) == record()
    monkeypatch.setattr(records.tempfile, "mkstemp", _full)
    with pytest.raises(OSError, match="its text stands above"):
        records.keep(record(), tmp_path / "out")
    assert json.loads(capsys.readouterr().err) == record()


def _git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_the_checkout_that_holds_the_package(tmp_path, monkeypatch):
    """A package in the environment of another repository is not of its commits; one that is tracked there is."""
    inside = tmp_path / "env" / "geodesic" / "records.py"
    inside.parent.mkdir(parents=True)
    inside.write_text("")
    (tmp_path / ".gitignore").write_text("env\n")
    assert records._commit(inside) is None
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "add", ".gitignore")
    _git(tmp_path, "commit", "-qm", "theirs")
    assert records._commit(inside) is None
    monkeypatch.setenv("GIT_DIR", str(records.ROOT / ".git"))  # as in a hook of another repository
    assert records._commit(inside) is None
    monkeypatch.delenv("GIT_DIR")
    _git(tmp_path, "add", "-f", str(inside))
    _git(tmp_path, "commit", "-qm", "vendored")
    found = records._commit(inside)
    assert len(found) == 12
    inside.write_text("changed")
    assert records._commit(inside) == found + "+"


def test_records_are_read_without_torch():
    """A finished sweep, and its workers, need not wait for it."""
    code = "import sys; from geodesic import records; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(records.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


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


def test_the_frame_has_a_row_for_each_run_stage_and_part(tmp_path):
    pandas = pytest.importorskip("pandas")
    two, gone = record(stages=2, points=[1, 2]), record(stages=2, seed=1) | {"status": "diverged", "final": None}
    stages = two["final"]["test"]["stages"] * 2
    stages = [
        stage | {"lss_mean": k, "segment_shares": [0.25, 0.75], "pace": {"even": k}} for k, stage in enumerate(stages)
    ]
    two["final"] = {
        "train": two["final"]["train"] | {"stages": stages},
        "test": two["final"]["test"] | {"stages": stages},
    }
    records.write(two, tmp_path)
    records.write(gone, tmp_path)
    records.write(record() | {"settings": {"notebook": "mine"}, "final": {"square": 4}}, tmp_path)
    frame = records.frame(tmp_path)
    assert isinstance(frame, pandas.DataFrame)
    runs = frame[frame["dataset"] == "digits"]
    assert len(runs) == 2 * 2 * 2
    assert not runs.duplicated(["run", "part", "stage"]).any()
    mine = runs[runs["run"] == records.name(two["settings"])].set_index(["part", "stage"])
    assert mine.loc[("test", 2), ["lss_mean", "ots_share", "ots_n", "segment_share_2", "pace_even"]].tolist() == [
        1, 0.5, 10, 0.75, 1,
    ]  # fmt: skip
    assert mine.loc[("train", 1), ["accuracy", "seconds", "points"]].tolist() == [0.8, 1.0, (1, 2)]
    other = runs[runs["run"] == records.name(gone["settings"])]
    assert other["lss_mean"].isna().all()
    assert set(other["status"]) == {"diverged"}
    assert frame.loc[frame["notebook"] == "mine", "square"].tolist() == [4.0]


def test_the_frame_says_the_same_as_the_rows():
    """On the committed records of a chapter, where every run has one stage."""
    pytest.importorskip("pandas")
    frame = records.frame(records.RESULTS / "mnist")
    for part in ("train", "test"):
        mine = frame[frame["part"] == part].set_index("run")
        rows = records.rows(records.RESULTS / "mnist", part)
        assert len(mine) == len(rows)
        for row in rows:
            line = mine.loc[records.name({key: row[key] for key in FIRST})]
            for key in ("lss_mean", "ots_share", "displacement_squared", "status"):
                assert line[key] == row[key] or (row[key] is None and line.isna()[key])


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


def test_committed_records_stay_small():
    """The whole tree travels to a bare machine."""
    files = list(records.RESULTS.rglob("*.json"))
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
