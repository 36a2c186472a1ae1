"""Training in a stack: every member takes the steps of its single run, whatever its neighbours do."""

from dataclasses import replace

import pytest
import torch
from geodesic import data, networks, stacked, training
from geodesic.training import Recipe

RECIPES = [
    Recipe(weight_decay=0.0, learning_rate=0.02, batch_size=64, epochs=2),
    Recipe(weight_decay=0.1, learning_rate=0.02, batch_size=64, epochs=2),
    Recipe(weight_decay=0.01, learning_rate=0.05, batch_size=64, epochs=2),
]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").take(256, 64)


def fresh(count, **options):
    sizes = {"dataset": "digits", "width": 16, "depth": 2} | options
    return [networks.build("plain", generator=torch.Generator().manual_seed(k), **sizes) for k in range(count)]


def generators(count):
    return [torch.Generator().manual_seed(100 + k) for k in range(count)]


def notes(nets):
    """What on_epoch may return; it reads the network, as scoring does."""
    return [lambda progress, net=net: {"norm": net.weights()[0].detach().norm().item()} for net in nets]


def assert_same_as_single_runs(digits, recipes, datasets=None, *, device="cpu", tolerance=None, **options):
    """Train apart and stacked: the same weights, running means and histories; returns what the stack gave."""
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}  # float32: products of another order, over eight steps
    count = len(recipes)
    datasets = datasets or [digits] * count
    apart, together = ([net.to(device) for net in fresh(count, **options)] for _ in range(2))
    want = [
        training.train(net, dataset, recipe, generator=generator, on_epoch=on_epoch)
        for net, dataset, recipe, generator, on_epoch in zip(
            apart, datasets, recipes, generators(count), notes(apart), strict=True
        )
    ]
    got = stacked.train(together, datasets, recipes, generators=generators(count), on_epoch=notes(together))
    for a, b, one, two in zip(apart, together, want, got, strict=True):
        assert (one.epoch, one.diverged, len(one.history)) == (two.epoch, two.diverged, len(two.history))
        if not one.diverged:
            for name, value in a.state_dict().items():
                torch.testing.assert_close(b.state_dict()[name], value, **tolerance)
            torch.testing.assert_close(
                torch.tensor([entry["norm"] for entry in two.history]),
                torch.tensor([entry["norm"] for entry in one.history]),
                **tolerance,
            )
    return together, got


def test_members_equal_their_single_runs(digits):
    """Different λ, step sizes, seeds and orders of the points; another network would differ in the first digit."""
    together, _ = assert_same_as_single_runs(digits, RECIPES)
    first, second, _ = (net.weights()[1] for net in together)
    assert (first - second).norm() > 0.1 * first.norm()


def test_members_with_batch_normalisation_too(digits):
    """The running means and deviations are part of the stack."""
    assert_same_as_single_runs(digits, RECIPES, norm="batch")


def test_convolutional_members_too(digits):
    """The digits as an image folder: a convolution of the stack is one grouped convolution."""
    assert_same_as_single_runs(digits, RECIPES, dataset="folder:digits", in_shape=(1, 8, 8), classes=10)


def test_members_are_augmented_as_their_single_runs(digits):
    assert_same_as_single_runs(digits, [replace(recipe, augment="crop") for recipe in RECIPES])


def test_members_may_have_labels_of_their_own(digits):
    shuffled = [digits.shuffle_labels(torch.Generator().manual_seed(k)) for k in range(3)]
    assert_same_as_single_runs(digits, RECIPES, shuffled)


def test_bfloat16_members_equal_their_single_runs(digits):
    """Products in bfloat16 round at 2⁻⁹; four steps in which nothing else may differ."""
    recipes = [replace(recipe, precision="bfloat16", epochs=1) for recipe in RECIPES]
    together, _ = assert_same_as_single_runs(digits, recipes, tolerance={"rtol": 0.02, "atol": 0.02})
    assert all(p.dtype == torch.float32 for net in together for p in net.parameters())


def test_a_member_that_diverges_harms_no_other(digits):
    recipes = [RECIPES[0], replace(RECIPES[1], learning_rate=1e9), RECIPES[2]]
    together, got = assert_same_as_single_runs(digits, recipes)
    assert [each.diverged for each in got] == [False, True, False]
    assert [all(p.isfinite().all() for p in net.parameters()) for net in together] == [True, False, True]


def test_a_stack_in_which_all_diverge_stops(digits):
    recipes = [replace(recipe, learning_rate=1e9, epochs=9) for recipe in RECIPES]
    _, got = assert_same_as_single_runs(digits, recipes)
    assert all(each.epoch < 9 for each in got)


def test_refuses_members_of_different_recipes(digits):
    recipes = [RECIPES[0], replace(RECIPES[1], momentum=0.5)]
    with pytest.raises(ValueError, match="momentum takes 2 values; members of a stack differ in weight_decay"):
        stacked.train(fresh(2), [digits] * 2, recipes, generators=generators(2))


def test_refuses_a_batch_larger_than_the_data(digits):
    recipes = [replace(recipe, batch_size=512) for recipe in RECIPES]
    with pytest.raises(ValueError, match="batch_size=512 is larger than the training set of 256 points"):
        stacked.train(fresh(3), [digits] * 3, recipes, generators=generators(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_members_equal_their_single_runs_on_a_device():
    assert_same_as_single_runs(data.load("digits", device="cuda").take(256, 64), RECIPES, device="cuda")
