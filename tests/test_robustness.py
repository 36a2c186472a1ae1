"""Noise, attacks, the variation rate and elimination, against closed forms of linear and radial networks."""

import math

import pytest
import torch
from geodesic import data, networks, robustness
from geodesic.robustness import Bounds
from torch import nn


class Linear(nn.Module):
    """Logits (w·x, −w·x): the gradient of the loss of class 0 points along −w, whatever x."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, x):
        score = x.flatten(1) @ self.w
        return torch.stack([score, -score], 1)


WIDE = Bounds(torch.full((1, 4), -100.0), torch.full((1, 4), 100.0))


def small_dataset():
    """Digits, few of them."""
    return data.load("digits").take(200, 60)


def test_bounds_are_per_channel():
    """Channel 0 spans [0, 2], channel 1 spans [-1, 5]; values outside are cut to the nearest end."""
    x = torch.tensor([[[[0.0, 1]], [[-1, 5]]], [[[2, 2]], [[0, 0]]]])
    bounds = Bounds.of(x)
    assert bounds.width.flatten().tolist() == [2.0, 6.0]
    kept = bounds.keep(torch.full((1, 2, 1, 2), 9.0))
    assert kept.flatten().tolist() == [2.0, 2.0, 5.0, 5.0]


def test_noise_has_the_size_it_says(generator):
    """sd = 0.1 of a range of 200, far from its ends: 20, to 4 standard errors of 40,000 draws."""
    x = torch.zeros(10_000, 4)
    moved = robustness.add_noise(x, 0.1, Bounds(WIDE.low * 10, WIDE.high * 10), generator)
    assert moved.std().item() == pytest.approx(200, rel=4 / math.sqrt(2 * 40_000))


def test_noise_stays_in_range(generator):
    x = torch.rand(50, 4, generator=generator)
    bounds = Bounds.of(x)
    moved = robustness.add_noise(x, 3.0, bounds, generator)
    assert (moved >= bounds.low).all()
    assert (moved <= bounds.high).all()


def test_fgsm_moves_against_the_label():
    """A linear score: every coordinate moves by size × range against the sign of its weight (class 0)."""
    w = torch.tensor([1.0, -2.0, 3.0, -0.5])
    x, y = torch.zeros(3, 4), torch.tensor([0, 1, 0])
    got = robustness.fgsm(Linear(w), x, y, 0.01, WIDE)
    step = 2.0 * w.sign()  # 0.01 of a range of 200
    torch.testing.assert_close(got, torch.stack([-step, step, -step]))


@pytest.mark.parametrize("steps", [1, 20])
def test_pgd_reaches_the_corner_of_a_linear_problem(steps, generator):
    """The worst point of the ball is its corner −ε sign(w); steps of 2.5 ε/steps reach it from any start."""
    w = torch.tensor([1.0, -2.0, 3.0, -0.5])
    x, y = torch.randn(5, 4, generator=generator), torch.zeros(5, dtype=torch.int64)
    got = robustness.pgd(Linear(w), x, y, 0.01, WIDE, steps=steps, generator=generator)
    torch.testing.assert_close(got, x - 2.0 * w.sign())


def test_pgd_is_no_weaker_than_fgsm_and_stays_in_the_ball(generator):
    """An untrained residual network: loss under PGD-20 above that under FGSM; no coordinate leaves the ball."""
    dataset = small_dataset()
    network = networks.build("resnet", "digits", width=16, generator=generator).eval()
    x, y, bounds = dataset.x_test, dataset.y_test, Bounds.of(dataset.x_train)
    one, many = (
        robustness.fgsm(network, x, y, 0.05, bounds),
        robustness.pgd(network, x, y, 0.05, bounds, generator=generator),
    )
    radius = 0.05 * bounds.width + 1e-6
    assert ((many - x).abs() <= radius).all()
    losses = [nn.functional.cross_entropy(network(z), y).item() for z in (x, one, many)]
    assert losses[0] < losses[1] < losses[2]


def test_variation_rate_of_a_scaled_track(generator):
    """Every state scaled by 1.3: rate 0.3 at every layer; a state at the origin is left out."""
    track = torch.randn(4, 10, 3, generator=generator)
    track[2, 0] = 0.0
    moved = 1.3 * track
    moved[2, 0] = 5.0
    torch.testing.assert_close(robustness.variation_rate(track, moved), torch.full((4,), 0.3))


def test_elimination_removes_the_units_of_the_points_own_class():
    """Class 0 lives in unit 0, class 1 in unit 3: a quarter of four units is one unit, a different one for each."""
    ranked = torch.tensor([[5.0, 1, 1, 0], [-4, 0, 1, 0], [0, 1, 1, 9]])
    state = torch.ones(2, 4)
    got = robustness.eliminate(
        networks.build("plain", "digits"), state, ranked, torch.tensor([0, 1]), torch.tensor([0, 0, 1]), 0.25
    )
    assert got.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]


def test_elimination_of_channels_keeps_the_shape():
    """A channel's weight is its mean absolute value over space, so one bright pixel does not outweigh a full plane."""
    ranked = torch.zeros(1, 2, 3, 3)
    ranked[0, 0], ranked[0, 1, 0, 0] = -1.0, 5.0
    got = robustness.eliminate(
        networks.build("plain", "digits"),
        torch.ones(1, 2, 3, 3),
        ranked,
        torch.tensor([0]),
        torch.tensor([0]),
        0.5,
    )
    assert got[0, 0].abs().sum() == 0
    assert (got[0, 1] == 1).all()


def test_measure_begins_with_the_clean_accuracy(generator):
    """Nothing removed and nothing added: the network's own accuracy, in every place where it is stated."""
    dataset = small_dataset()
    network = networks.build("resnet", "digits", width=16, generator=generator)
    got = robustness.measure(network, dataset)
    clean = (network.eval()(dataset.x_test).argmax(1) == dataset.y_test).double().mean().item()
    assert got["clean"] == clean
    for rows in (got["elimination"]["state"], got["elimination"]["branch"]):
        assert [row[0] for row in rows] == [clean] * 3
    assert got["elimination"]["layers"] == [(0, 1), (0, 3), (0, 5)]
    assert [len(stages[0]) for stages in got["noise"]["variation"]] == [6] * len(robustness.NOISES)


def test_measure_repeats_and_leaves_the_network_alone(generator):
    dataset = small_dataset()
    network = networks.build("plain", "digits", width=16, norm="batch", generator=generator)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = robustness.measure(network, dataset)
    assert robustness.measure(network, dataset) == first
    assert first["elimination"]["branch"] is None
    for name, value in network.state_dict().items():
        assert (value == before[name]).all()
    assert all(p.grad is None for p in network.parameters())


def test_elimination_before_the_head_matches_a_direct_computation(generator):
    """K = 4: the network goes on from the middle of a stage, through entries and later stages, to the same logits."""
    network = networks.build("resnet", "cifar10", 4, width=2, depth=2, generator=generator).eval()
    x = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        states = network.tracks(x)
        y = network(x).argmax(1)
        assert robustness._finish(network, 1, 1, states[1][1], y) == 1.0
        assert robustness._finish(network, 1, 1, 0 * states[1][1], y) < 1.0
