"""Training: λ does what it says, runs repeat and resume bit for bit, bad recipes are refused."""

import dataclasses
import math

import pytest
import torch
from geodesic import data, networks, training
from geodesic.training import Recipe
from torch.nn import functional as F


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").take(256, 64)


def trained(dataset, recipe, *, network="resnet", checkpoint=None, on_epoch=None):
    net = networks.build(network, "digits", width=16, depth=2, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(7)
    return net, training.train(net, dataset, recipe, generator=generator, checkpoint=checkpoint, on_epoch=on_epoch)


def test_one_step_is_sgd_on_loss_plus_half_lambda_squared_norm(digits):
    """The oracle writes out W − η(∇loss + λW) for weights and b − η∇loss for biases; momentum is still zero."""
    recipe = Recipe(weight_decay=0.3, epochs=1, batch_size=256, learning_rate=0.1, schedule="constant")
    net, _ = trained(digits, recipe)
    want = networks.build("resnet", "digits", width=16, depth=2, generator=torch.Generator().manual_seed(3))
    loss = F.cross_entropy(want(digits.x_train), digits.y_train)
    loss = loss + 0.3 / 2 * sum(w.square().sum() for w in want.weights())
    loss.backward()
    for p, q in zip(net.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=1e-5, atol=1e-6)  # float32, other order of the points


def test_training_lowers_the_loss(digits):
    net, _ = trained(digits, Recipe(epochs=20, batch_size=32))
    with torch.no_grad():
        assert F.cross_entropy(net(digits.x_train), digits.y_train) < 0.2


def test_runs_repeat_bit_for_bit(digits):
    recipe = Recipe(epochs=2, batch_size=32, weight_decay=1e-2)
    a, b = (trained(digits, recipe)[0] for _ in range(2))
    assert all((p == q).all() for p, q in zip(a.parameters(), b.parameters(), strict=True))


class Killed(Exception):
    pass


@pytest.mark.parametrize(("norm", "sizes"), [("none", {}), ("batch", {}), ("none", {"dataset": "folder:digits"})])
def test_an_interrupted_run_continues_bit_for_bit(digits, tmp_path, norm, sizes):
    """Killed after the second of four epochs, then started again: weights and history are those of an unbroken run.

    Also of convolutions, whose kernels and momenta have their channels innermost.
    """
    recipe = Recipe(epochs=4, batch_size=32, weight_decay=1e-2, augment="crop", learning_rate=0.01)
    sizes = {"dataset": "digits", "width": 16, "depth": 2, "in_shape": digits.in_shape, "classes": 10} | sizes

    def fresh():
        return networks.build("resnet", norm=norm, generator=torch.Generator().manual_seed(3), **sizes)

    def run(net, checkpoint=None, kill_at=None):
        def on_epoch(progress):
            if progress.epoch == kill_at:
                raise Killed
            return {"epoch": progress.epoch, "norm": float(net.weights()[0].detach().norm())}

        generator = torch.Generator().manual_seed(7)
        return training.train(net, digits, recipe, generator=generator, checkpoint=checkpoint, on_epoch=on_epoch)

    whole = fresh()
    want = run(whole)
    with pytest.raises(Killed):
        run(fresh(), tmp_path / "run.safetensors", kill_at=3)
    resumed = fresh()
    got = run(resumed, tmp_path / "run.safetensors")
    assert got.history == want.history
    for key, value in whole.state_dict().items():
        assert (resumed.state_dict()[key] == value).all(), key


def test_a_torn_checkpoint_is_ignored(digits, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    recipe = Recipe(epochs=1, batch_size=64)
    trained(digits, recipe, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    _, progress = trained(digits, recipe, checkpoint=checkpoint)
    assert progress.epoch == 1


def test_divergence_stops_the_run(digits):
    _, progress = trained(digits, Recipe(epochs=5, batch_size=32, learning_rate=1e6, schedule="constant"))
    assert progress.diverged
    assert progress.epoch < 5


def test_epoch_zero_is_the_untrained_network(digits):
    _, progress = trained(digits, Recipe(epochs=0), on_epoch=lambda progress: {"epoch": progress.epoch})
    assert progress.history == [{"epoch": 0}]


@pytest.mark.parametrize("name", training.SCHEDULES)
def test_schedules_peak_at_one_and_end_at_zero(name):
    values = [training.schedule(name, t / 1000) for t in range(1000)]
    assert max(values) == pytest.approx(1, abs=1e-6)
    assert min(values) > 0
    assert values[-1] < 1e-4 or name == "constant"


def test_crop_shifts_the_picture(generator):
    """Every crop of a single bright pixel is that pixel moved by at most an eighth of the side."""
    x = torch.zeros(200, 1, 16, 16)
    x[:, :, 8, 8] = 1
    y = training.augment(x, "crop", generator)
    assert (y.sum((1, 2, 3)) == 1).all()
    rows, columns = y[:, 0].nonzero()[:, 1], y[:, 0].nonzero()[:, 2]
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(6, 11))


def test_flip_mirrors_about_half(generator):
    """A left half of ones stays mostly left without a flip, mostly right with one."""
    x = torch.zeros(400, 3, 8, 8)
    x[..., :4] = 1
    right = training.augment(x, "crop-flip", generator)[:, 0, 4, 6] == 1
    assert 120 < right.sum() < 280  # binomial(400, ½) within 8 deviations


def test_bfloat16_trains_as_well(digits):
    net, _ = trained(digits, Recipe(epochs=20, batch_size=32, precision="bfloat16"))
    assert all(p.dtype == torch.float32 for p in net.parameters())
    with torch.no_grad():
        assert F.cross_entropy(net(digits.x_train), digits.y_train) < 0.25


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight_decay", -0.1, "weight_decay=-0.1 must be finite and at least 0"),
        ("weight_decay", math.nan, "weight_decay=nan must be finite"),
        ("epochs", -1, "epochs=-1 must be at least 0"),
        ("batch_size", 0, "batch_size=0 must be at least 1"),
        ("learning_rate", 0.0, "learning_rate=0.0 must be finite and above 0"),
        ("momentum", 1.0, r"momentum=1.0 must be in \[0, 1\)"),
        ("schedule", "linear", "schedule='linear' must be one of onecycle"),
        ("augment", "mixup", "augment='mixup' must be one of none"),
        ("precision", "int8", "precision='int8' must be one of float32"),
    ],
)
def test_refuses_bad_recipes(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Recipe(), **{field: value})


def test_refuses_a_batch_larger_than_the_data(digits):
    with pytest.raises(ValueError, match="batch_size=512 is larger than the training set of 256 points"):
        trained(digits, Recipe(epochs=1, batch_size=512))
