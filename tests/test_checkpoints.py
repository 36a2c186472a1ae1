"""Checkpoints: continued only by the run that they are of, and never at the cost of one."""

import dataclasses
import json
import warnings

import pytest
import torch
from geodesic import checkpoints, data, networks, store, training
from safetensors.torch import load_file, save_file
from torch import nn

IDENTITY = checkpoints.identity("abc", {"weight_decay": 0.1}, "cpu")


def network(width=4, shared=False):
    torch.manual_seed(width)
    first, last = nn.Linear(width, width), nn.BatchNorm1d(width)
    return nn.Sequential(first, first if shared else nn.Linear(width, width), last)


def progress(epoch=2):
    return training.Progress(epoch, [{"epoch": 0, "loss": float("nan")}, {"epoch": 1}], {"0.1": torch.arange(3.0)})


def saved(path, net, identity=IDENTITY, optimiser=None):
    generator = torch.Generator().manual_seed(5)
    checkpoints.save(path, net, optimiser or {}, generator, progress(), identity)
    return generator


def untouched(path, net, identity=IDENTITY):
    """What the note says; the network and the generator are as they were."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.Generator().manual_seed(9)
    state = generator.get_state()
    with pytest.warns(store.Note) as noted:
        assert checkpoints.restore(path, net, generator, identity) is None
    assert all((value == before[name]).all() for name, value in net.state_dict().items())
    assert (generator.get_state() == state).all()
    (note,) = noted
    assert str(path) in str(note.message)
    assert "passed over" in str(note.message)
    return str(note.message)


@pytest.mark.parametrize("shared", [False, True])
def test_everything_comes_back(tmp_path, shared):
    path, net = tmp_path / "new" / "a.safetensors", network(shared=shared)
    generator = saved(path, net, optimiser={"momentum/0.weight": torch.ones(4, 4)})
    other, mine = network(shared=shared), torch.Generator()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    places = [p.data_ptr() for p in other.parameters()]
    got = checkpoints.restore(path, other, mine, IDENTITY)
    assert got.epoch == 2
    assert json.dumps(got.history) == json.dumps(progress().history)
    assert (got.snapshots["0.1"] == torch.arange(3.0)).all()
    assert (got.optimiser["momentum/0.weight"] == 1).all()
    assert (mine.get_state() == generator.get_state()).all()
    assert all((value == net.state_dict()[name]).all() for name, value in other.state_dict().items())
    assert [p.data_ptr() for p in other.parameters()] == places  # in place: a stack's views stay views


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (checkpoints.identity("0a1", {"weight_decay": 0.1}, "cpu"), "it is of other data (data abc, here 0a1)"),
        (checkpoints.identity("abc", {"weight_decay": 0.2}, "cpu"), "it is of other settings"),
        (
            checkpoints.identity("abc", {"weight_decay": 0.1}, "cuda:1"),
            "another kind of device (device cpu, here cu",
        ),
        (IDENTITY | {"geodesic": "0.1.0 of another source"}, "it is of other code (geodesic "),
        (IDENTITY | {"torch": "3.0"}, "it is of other code (torch "),
    ],
)
def test_one_of_other_data_settings_or_code_is_passed_over(tmp_path, other, words):
    path = tmp_path / "a.safetensors"
    saved(path, network())
    assert words in untouched(path, network(), other)


def test_a_changed_library_is_other_code(monkeypatch):
    monkeypatch.setattr(checkpoints, "_CODE", "0123")
    assert checkpoints.identity("abc", {"weight_decay": 0.1}, "cpu") != IDENTITY


def _without(key):
    def change(path):
        tensors = load_file(path)
        tensors.pop(key)
        with checkpoints.safe_open(path, "pt") as file:
            about = file.metadata()
        save_file(tensors, path, about)

    return change


def _folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "deserializing"),
        (lambda path: path.write_bytes(b""), "deserializing"),
        (lambda path: save_file(load_file(path), path), "does not say which data and which code"),
        (_folder, "it is a folder"),
        (_without("network/0.bias"), "of another network, which differs in 0.bias"),
        (_without("generator"), "it lacks 'generator'"),
    ],
)
def test_a_damaged_one_is_named_and_changes_nothing(tmp_path, damage, words):
    path = tmp_path / "a.safetensors"
    saved(path, network())
    damage(path)
    assert words in untouched(path, network())


def test_tensors_of_other_shapes_are_found_before_any_is_copied(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, network(5))
    assert "its 0.bias is torch.float32 (5,), not torch.float32 (4,)" in untouched(path, network())
    saved(path, network(), optimiser={"momentum/0.weight": torch.ones(3, 3)})
    assert "its momentum/0.weight is torch.float32 (3, 3), not torch.float32 (4, 4)" in untouched(path, network())


def test_a_generator_that_is_none_changes_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, network())
    tensors = load_file(path)
    tensors["generator"] = torch.zeros(7, dtype=torch.uint8)
    with checkpoints.safe_open(path, "pt") as file:
        about = file.metadata()
    save_file(tensors, path, about)
    assert f"checkpoint {path} is passed over, the run begins again" in untouched(path, network())


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    dataset = data.load("digits").take(128, 64)
    monkeypatch.setattr(store, "write", full)
    monkeypatch.setattr(training, "_SAVE_EVERY", -1)  # after every epoch
    net = networks.build("resnet", "digits", width=8, depth=1, generator=torch.Generator().manual_seed(0))
    recipe = training.Recipe(epochs=2, batch_size=64)
    with pytest.warns(store.Note, match="no checkpoint after epoch 1: .*a.safetensors: No space left on device"):
        done = training.train(
            net, dataset, recipe, generator=torch.Generator().manual_seed(0), checkpoint=tmp_path / "a.safetensors"
        )
    assert done.epoch == 2


def test_without_a_path_nothing_is_done(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoints.save(None, network(), {}, torch.Generator(), progress(), IDENTITY)
        assert checkpoints.restore(None, network(), torch.Generator(), IDENTITY) is None
        assert checkpoints.restore(tmp_path / "none.safetensors", network(), torch.Generator(), IDENTITY) is None


def test_a_run_whose_points_changed_begins_again(tmp_path, monkeypatch):
    """Trained for an epoch of two on some points, then continued on others under the same name: as if begun there."""
    monkeypatch.setattr(training, "_SAVE_EVERY", -1)  # after every epoch
    dataset = data.load("digits").take(128, 64)
    other = dataclasses.replace(dataset, x_train=-dataset.x_train, fingerprint="another")
    recipe = training.Recipe(epochs=2, batch_size=64)

    def train(points, checkpoint=None, stop=False):
        def on_epoch(done):
            if stop and done.epoch == 2:
                raise InterruptedError
            return {"epoch": done.epoch}

        net = networks.build("resnet", "digits", width=8, depth=1, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        training.train(net, points, recipe, generator=generator, on_epoch=on_epoch, checkpoint=checkpoint)
        return net.state_dict()

    path = tmp_path / "a.safetensors"
    with pytest.raises(InterruptedError):
        train(dataset, path, stop=True)
    with pytest.warns(store.Note, match="it is of other data"):
        got = train(other, path)
    want = train(other)
    assert all((value == want[name]).all() for name, value in got.items())
