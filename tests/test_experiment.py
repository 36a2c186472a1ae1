"""One run, from settings to record, through the library and through the shell."""

import json
import math
import subprocess
import sys

import pytest
import torch
from geodesic import data, experiment, networks, probes, records, tracks
from geodesic.__main__ import main
from geodesic.experiment import Settings

SMALL = {"epochs": 3, "batch_size": 64, "n_train": 400, "width": 32, "ots_points": (50, 100), "eval_points": 100}


@pytest.fixture(scope="module")
def record():
    return experiment.run(Settings(**SMALL, learning_rate=0.02))


def test_record_holds_every_epoch_and_the_untrained_network(record):
    assert [entry["epoch"] for entry in record["epochs"]] == [0, 1, 2, 3]
    assert record["epochs"][0]["train"]["loss"] > record["epochs"][-1]["train"]["loss"]


def test_record_scores_agree_with_the_functions(record):
    """The same network, trained again by hand from the same generator; a record keeps five digits of a float."""
    settings = Settings(**SMALL, learning_rate=0.02)
    dataset = data.load("digits").take(400)
    generator = torch.Generator().manual_seed(0)
    net = networks.build("resnet", "digits", width=32, generator=generator)
    experiment.training.train(net, dataset, settings, generator=generator)
    with torch.no_grad():
        (track,) = net.eval().tracks(dataset.x_test)
    final = record["final"]["test"]
    stage = final["stages"][0]
    correct = (net(dataset.x_test).argmax(1) == dataset.y_test).double().mean().item()
    assert final["accuracy"] == pytest.approx(correct, rel=5e-5)
    assert stage["lss_mean"] == pytest.approx(tracks.line_shape_score(track).mean().item(), rel=6e-5)
    assert stage["action"] == pytest.approx(tracks.action(track).item(), rel=6e-5)
    assert stage["ots"][-1]["identity_cost"] == pytest.approx(
        tracks.displacement_squared(track[:, :100]).item(), rel=1e-5
    )


def test_chain_of_action_displacement_and_transport_holds(record):
    """A ≥ E‖x_L − x_0‖² ≥ W₂² (paper, after eq. 9), on the same points."""
    for part in ("train", "test"):
        (stage,) = record["final"][part]["stages"]
        assert stage["action"] >= stage["displacement_squared"]
        for score in stage["ots"]:
            assert score["identity_cost"] >= score["w2_squared"] * (1 - 1e-12)


def test_record_is_json_and_small(record, tmp_path):
    path = records.write(record, tmp_path)
    assert path.stat().st_size < 100_000
    assert records.read(path) == json.loads(json.dumps(record))


def test_provenance_says_what_a_reader_needs(record):
    for key in ("torch", "device", "threads", "seconds", "data_fingerprint", "data", "commit", "geodesic"):
        assert key in record["provenance"]


def test_untrained_control_is_scored():
    record = experiment.run(Settings(**SMALL | {"epochs": 0}))
    assert record["status"] == "ok"
    assert record["final"]["test"]["stages"][0]["lss_mean"] > 1


def test_radial_control_has_perfect_scores():
    """x ↦ c·x is straight and optimal: LSS = OTS = 1, whatever was learnt."""
    record = experiment.run(Settings(**SMALL, network="radial"))
    (stage,) = record["final"]["test"]["stages"]
    assert stage["lss_mean"] == pytest.approx(1, abs=1e-5)
    assert stage["ots"][-1]["share"] == 1
    assert stage["theorem1"]["violated"] == 0


def test_diverged_runs_are_recorded_and_never_scored():
    record = experiment.run(Settings(**SMALL, learning_rate=1e6, schedule="constant"))
    assert record["status"] == "diverged"
    assert record["final"] is None
    assert record["plane"] is None


def test_a_loss_above_the_untrained_networks_counts_as_diverged():
    """A step too large for the plain network: the loss stays finite and ends far above where it began."""
    record = experiment.run(Settings(**SMALL, learning_rate=3.0, schedule="constant", norm="batch", network="plain"))
    losses = [entry["train"]["loss"] for entry in record["epochs"]]
    assert (record["status"] == "diverged") == (losses[-1] is None or losses[-1] > losses[0])
    assert record["status"] == "diverged"


def test_runs_at_chance_are_called_collapsed():
    """λ so large that the weights vanish: the loss is that of the best constant answer."""
    record = experiment.run(Settings(**SMALL | {"epochs": 10}, weight_decay=3.0, learning_rate=0.1))
    assert record["status"] == "collapsed"
    assert record["final"]["train"]["accuracy"] < 0.2


def test_shuffled_labels_do_not_generalise():
    """400 points, ten classes: test accuracy near chance, within 4 binomial deviations of 360 points of a tenth."""
    record = experiment.run(Settings(**SMALL, labels="shuffled"))
    assert record["final"]["test"]["accuracy"] < 0.1 + 4 * math.sqrt(0.09 / 360)


def test_runs_repeat_bit_for_bit(record):
    again = experiment.run(Settings(**SMALL, learning_rate=0.02))
    assert again["final"] == record["final"]
    assert again["plane"] == record["plane"]


def test_scores_do_not_depend_on_the_blocks_they_are_made_in(monkeypatch, generator):
    """One block, blocks of two points and a rest of one, states in a list: the same bits, point by point."""
    track = torch.randn(6, 9, 4, 5, generator=generator)
    found, whole, blocks = [], tracks._measure_block, []
    monkeypatch.setattr(tracks, "_measure_block", lambda states: blocks.append(len(states[0])) or whole(states))
    for block, given in ((1 << 30, track), (20 * 4 * 2, track), (1, list(track))):
        monkeypatch.setattr(tracks, "_BLOCK", block)
        accumulator = tracks.Accumulator()
        accumulator.update(given)
        found.append(accumulator.summary())
    assert blocks == [9] + [2] * 4 + [1] + [1] * 9
    assert found[0] == found[1] == found[2]
    with pytest.raises(ValueError, match="hold non-finite values"):
        accumulator.update([*track, track[0] / 0])


def test_many_runs_give_the_records_of_single_runs():
    """They may differ in anything; the data that they share are loaded once; the second diverges."""
    settings = [
        Settings(**SMALL, learning_rate=0.02),
        Settings(**SMALL | {"network": "plain", "seed": 2}, learning_rate=1e6),
        Settings(**SMALL | {"epochs": 0, "depth": 2}),
    ]
    got = list(experiment.run_many(settings))
    assert [record["status"] for record in got] == ["ok", "diverged", "ok"]
    assert [record["settings"] for record in got] == [one.to_dict() for one in settings]
    assert got[0]["final"] == experiment.run(settings[0])["final"]


def test_a_stopped_run_has_no_record(tmp_path):
    """It ends after the epoch under way; asked again without a stop, the record is that of an unbroken run."""
    settings = Settings(**SMALL)
    with pytest.raises(experiment.Stopped, match="its checkpoint continues it"):
        experiment.run(settings, checkpoints=tmp_path, stop=iter([False, True, True, True]).__next__)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert experiment.run(settings, checkpoints=tmp_path)["final"] == experiment.run(settings)["final"]


def test_a_finished_checkpoint_is_not_trained_again(tmp_path, monkeypatch):
    settings = Settings(**SMALL)
    first = experiment.run(settings, checkpoints=tmp_path)
    monkeypatch.setattr(experiment.training._Step, "__call__", lambda *_: pytest.fail("trained again"))
    assert experiment.run(settings, checkpoints=tmp_path)["final"] == first["final"]


def test_theorem1_counts_pairs_by_hand():
    """Two parallel movers keep their distance; a third crosses the first: its pair violates the bound."""
    track = torch.tensor([[[0.0, 0], [0, 1], [4, 0]], [[2, 0], [2, 1], [2, 0]], [[4, 0], [4, 1], [0, 0]]])
    got = probes.theorem1_violations(track, torch.tensor([0, 0, 1]), 2)
    assert got["pairs"] == 3
    assert got["violated"] == pytest.approx(2 / 3)  # pair (0, 2) meets; pair (1, 2) comes to 1 < 17/√34
    assert got["within"] == 0
    assert got["between"] == 1


def test_collapse_is_zero_for_classes_that_are_points(generator):
    labels = torch.randint(0, 3, (60,), generator=generator)
    means = torch.randn(3, 5, generator=generator)
    assert probes.collapse(means[labels], labels, 3) == pytest.approx(0, abs=1e-12)
    assert probes.collapse(torch.ones(60, 5), labels, 3) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be finite and at least 0"),
        ({"network": "vgg"}, "network='vgg' is unknown"),
        ({"norm": "layer"}, "norm='layer' is unknown"),
        ({"labels": "noisy"}, "labels='noisy' is unknown"),
        ({"ots_points": (1,)}, "must each be at least 2"),
        ({"lamda": 1}, "unknown setting lamda; there are: "),
    ],
)
def test_refuses_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_dict(values)


def test_equal_settings_have_one_name():
    """Whoever calls, the record of a run must be found again."""
    settings = Settings(weight_decay=0.0, ots_points=(100, 50)).to_dict()
    same = Settings.from_dict(json.loads(json.dumps(settings)) | {"weight_decay": 0.0, "ots_points": [50, 100]})
    assert records.name(settings) == records.name(same.to_dict())


def test_each_part_is_scored_as_far_as_its_points_go():
    """So that a training set can be scored whole, whatever the size of the test set."""
    final = experiment.run(Settings(**SMALL | {"epochs": 0, "n_test": 80}))["final"]
    sizes = {part: [score["n"] for score in final[part]["stages"][0]["ots"]] for part in final}
    assert sizes == {"train": [50, 100], "test": [50]}


@pytest.mark.parametrize("points", [(50, 1000), (390, 400)])
def test_refuses_transport_points_that_a_part_does_not_have(points):
    with pytest.raises(ValueError, match="the 360 points of the smaller part, nor the last more than the 400 of"):
        experiment.run(Settings(**SMALL | {"ots_points": points}))


def shell(*arguments):
    return [str(argument) for argument in arguments]


def test_command_line_writes_a_record_and_reuses_it(tmp_path, capsys):
    arguments = shell("run", "--epochs", 1, "--batch-size", 64, "--ots-points", 50, "--out", tmp_path, "--quiet")
    assert main(arguments) == 0
    assert "record written" in capsys.readouterr().out
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "record reused" in out
    assert "digits resnet λ=0 seed 0: ok" in out


def test_command_line_runs_a_row_of_a_table_and_what_is_missing_of_it(tmp_path, capsys):
    row = ("--epochs", 0, "--ots-points", 50, "--out", tmp_path, "--quiet", "--seed", 0, 1)
    assert main(shell("run", *row)) == 0
    assert main(shell("run", *row, "--weight-decay", 0, 0.1)) == 0
    out = capsys.readouterr().out
    assert (out.count("record written"), out.count("record reused")) == (4, 2)
    found = {(r["settings"]["weight_decay"], r["settings"]["seed"]) for r in records.load(tmp_path)}
    assert found == {(0.0, 0), (0.0, 1), (0.1, 0), (0.1, 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weight-decay", -1), "weight_decay=-1.0 must be finite and at least 0"),
        (("--device", "gpu"), "device 'gpu' is not one that torch knows"),
        (("--dataset", "mars"), "data set 'mars' is unknown"),
        (("--dataset", "mnist", "--root", "/nonexistent"), "no intact MNIST under /nonexistent"),
    ],
)
def test_command_line_says_one_line_and_leaves_nothing(tmp_path, capsys, arguments, message):
    assert main(shell("run", *arguments, "--out", tmp_path / "out", "--quiet")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_reads_in_a_fresh_interpreter():
    """Every setting appears in --help with its explanation."""
    run = subprocess.run(
        [sys.executable, "-m", "geodesic", "run", "--help"], capture_output=True, text=True, check=True
    )
    assert "--weight-decay" in run.stdout
    assert "λ: the loss carries" in run.stdout
