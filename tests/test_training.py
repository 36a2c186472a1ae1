"""Training: λ does what it says, runs repeat and resume bit for bit, bad recipes are refused."""

import dataclasses
import math
from itertools import chain, repeat

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


def test_a_frozen_parameter_stays_and_the_others_learn(digits):
    network = networks.build("resnet", "digits", width=16, depth=2, generator=torch.Generator().manual_seed(3))
    bias = network.stages[0].blocks[0].layer1.bias.requires_grad_(False)
    with torch.no_grad():
        bias.fill_(0.25)
    before = network.head[-1].weight.clone()
    training.train(network, digits, Recipe(epochs=1, batch_size=64), generator=torch.Generator().manual_seed(0))
    assert (bias == 0.25).all()
    assert not torch.equal(network.head[-1].weight, before)


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
    y = training.augment(x, torch.randint(0, 2 * training.padding((1, 16, 16)) + 1, (2, 200), generator=generator))
    assert (y.sum((1, 2, 3)) == 1).all()
    rows, columns = y[:, 0].nonzero()[:, 1], y[:, 0].nonzero()[:, 2]
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(6, 11))


def test_flip_mirrors_what_it_is_told_to():
    """Without a shift a flipped image is its mirror image and another is itself."""
    x = torch.randn(4, 3, 8, 8)
    flip = torch.tensor([True, False, True, False])
    y = training.augment(x, torch.ones(2, 4, dtype=torch.int64), flip)
    assert torch.equal(y[flip], x[flip].flip(3))
    assert torch.equal(y[~flip], x[~flip])


def test_an_epoch_draws_every_point_once_and_flips_about_half(digits, generator):
    recipe = Recipe(epochs=1, batch_size=32, augment="crop-flip")
    order, shift, flip = training._Drawn.of(8, recipe, digits, generator)
    assert sorted(order.flatten().tolist()) == list(range(256))
    assert (shift.min(), shift.max()) == (0, 2)  # digits are 8 pixels high: by one to either side
    assert 64 < flip.sum() < 192  # binomial(256, ½) within 8 deviations


def test_history_tells_what_training_saw(digits):
    """The accuracy while training rises, the step turns the weights, and epoch 0 has neither."""
    _, progress = trained(digits, Recipe(epochs=8, batch_size=32), on_epoch=lambda progress: {"epoch": progress.epoch})
    assert "running" not in progress.history[0]
    first, last = progress.history[1], progress.history[-1]
    assert last["running"]["loss"] < first["running"]["loss"]
    assert last["running"]["accuracy"] > max(0.8, first["running"]["accuracy"])
    assert first["turn"] > last["turn"] > 0  # the last step of a half cosine is small


def test_turn_is_the_angle_of_the_step(digits):
    """One step on one batch, against the angle between the weights before and after."""
    before = networks.build("resnet", "digits", width=16, depth=2, generator=torch.Generator().manual_seed(3))
    recipe = Recipe(epochs=1, batch_size=256, learning_rate=0.1)
    net, progress = trained(digits, recipe, on_epoch=lambda _: {})
    angles = [
        torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).acos()
        for a, b in zip(before.weights(), net.weights(), strict=True)
    ]
    assert progress.history[-1]["turn"] == pytest.approx(torch.stack(angles).mean().item(), rel=1e-3)


def test_biases_are_decayed_where_all_is_asked(digits):
    """With the labels drawn evenly and λ large, biases that are decayed end nearer to zero."""
    recipe = Recipe(epochs=4, batch_size=32, weight_decay=1.0)
    norms = {}
    for decay in training.DECAYS:
        net, _ = trained(digits, dataclasses.replace(recipe, decay=decay))
        norms[decay] = sum(p.detach().square().sum() for p in net.parameters() if p.ndim == 1)
    assert norms["all"] < 0.5 * norms["weights"]


def jobs(dataset, recipes):
    return [
        training.Job(
            networks.build("plain", "digits", width=16, depth=2, generator=torch.Generator().manual_seed(k)).to(
                dataset.y_train.device
            ),
            dataset,
            recipe,
            torch.Generator().manual_seed(100 + k),
            lambda progress: {"epoch": progress.epoch},
        )
        for k, recipe in enumerate(recipes)
    ]


RECIPES = [
    Recipe(weight_decay=0.0, learning_rate=0.02, batch_size=64, epochs=2),
    Recipe(weight_decay=0.1, learning_rate=1e9, batch_size=64, epochs=9),
    Recipe(weight_decay=0.01, learning_rate=0.05, batch_size=32, epochs=3, momentum=0.5),
]


def assert_same_together(dataset, tolerance):
    """Each job's network and history are those of its single run, whatever the others do; the second diverges."""
    alone = jobs(dataset, RECIPES)
    want = [next(iter(training.train_many([job]))) for job in alone]
    found = {job.recipe: (job, progress) for job, progress in training.train_many(jobs(dataset, RECIPES), together=2)}
    assert len(found) == 3
    for job, progress in want:
        other, got = found[job.recipe]
        assert (progress.epoch, progress.diverged) == (got.epoch, got.diverged)
        if not progress.diverged:
            for name, value in job.network.state_dict().items():
                torch.testing.assert_close(other.network.state_dict()[name], value, **tolerance)
    assert found[RECIPES[1]][1].diverged


def test_jobs_together_equal_their_single_runs(digits):
    assert_same_together(digits, {"rtol": 0, "atol": 0})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_jobs_together_equal_their_single_runs_on_a_cuda_device():
    assert_same_together(data.load("digits", device="cuda").take(256, 64), {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", networks.NORMS)
def test_a_captured_step_is_the_step_of_the_host(norm):
    """Convolutions, augmentation and momentum: a few steps on the device are those on the processor, to float32."""
    found = []
    for device in ("cpu", "cuda"):
        dataset = data.load("digits", device=device).take(256, 64)
        sizes = {"dataset": "folder:digits", "width": 8, "depth": 2, "in_shape": dataset.in_shape, "classes": 10}
        net = networks.build("resnet", norm=norm, generator=torch.Generator().manual_seed(3), **sizes).to(device)
        recipe = Recipe(epochs=2, batch_size=64, weight_decay=1e-2, augment="crop-flip", learning_rate=0.01)
        training.train(net, dataset, recipe, generator=torch.Generator().manual_seed(7))
        found.append({name: value.cpu() for name, value in net.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-3, atol=2e-4)


def test_training_stops_when_asked_and_goes_on_from_there(digits, tmp_path):
    """After the second epoch; what is left continues bit for bit, and a run that is over is not trained again."""
    recipe = Recipe(epochs=4, batch_size=32)
    whole, _ = trained(digits, recipe)
    checkpoint, asked = tmp_path / "run.safetensors", chain([False, False], repeat(True))

    def run(**options):
        net = networks.build("resnet", "digits", width=16, depth=2, generator=torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(7)
        return net, training.train(net, digits, recipe, generator=generator, checkpoint=checkpoint, **options)

    _, progress = run(stop=lambda: next(asked))
    assert (progress.epoch, progress.finished(recipe)) == (2, False)
    net, progress = run()
    assert progress.finished(recipe)
    for name, value in whole.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


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
        ("decay", "bias", "decay='bias' must be one of weights, all"),
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
