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


def rank_of(states, labels, what="signed", classes=2):
    """The rank of units from one layer's states alone, as the paper's Fig. 7 takes it or as the control does."""
    network = networks.build("plain", "toy", depth=1, classes=classes)
    importance = robustness.Importance(network)
    importance.update(labels, [[torch.zeros_like(states), states]])
    return importance.rank(what, 0, 1)


def test_elimination_copies_the_units_of_the_points_own_class():
    """Class 0 lives in unit 0, class 1 in unit 3: a quarter of four units is one, a different one for each."""
    rank = rank_of(torch.tensor([[5.0, 1, 1, 0], [4, 0, 1, 0], [0, 1, 1, 9]]), torch.tensor([0, 0, 1]))
    state, before, labels = torch.ones(2, 4), torch.full((2, 4), 7.0), torch.tensor([0, 1])
    copied = robustness.eliminate(state, before, rank, labels, (0.0, 0.25, 1.0))
    assert copied.tolist() == [[[1, 1, 1, 1]] * 2, [[7, 1, 1, 1], [1, 1, 1, 7]], [[7, 7, 7, 7]] * 2]
    zeroed = robustness.eliminate(state, None, rank, labels, (0.25,))
    assert zeroed.tolist() == [[[0, 1, 1, 1], [1, 1, 1, 0]]]


def test_importance_is_signed_in_the_papers_protocol_and_absolute_in_the_control():
    """A unit at −9 is the last by its mean and the first by its size. Class means, not sums over all points."""
    states, labels = torch.tensor([[-9.0, 1, 2], [0, 8, 0], [0, 8, 0]]), torch.tensor([0, 1, 1])
    assert rank_of(states, labels)[0].tolist() == [2, 1, 0]
    assert rank_of(states, labels, "absolute")[0].tolist() == [0, 2, 1]


def test_importance_does_not_depend_on_batches(generator):
    network = networks.build("resnet", "digits", width=8, generator=generator).eval()
    x, y = torch.randn(300, 1, 8, 8, generator=generator), torch.randint(0, 10, (300,), generator=generator)
    whole, parts = robustness.Importance(network), robustness.Importance.of(network, x, y)
    with torch.no_grad():
        whole.update(y, network.states(x))
    for what in ("signed", "absolute", "branch"):
        assert (
            whole.rank(what, 0, 3) == parts.rank(what, 0, 3)
        ).double().mean() > 0.99  # but for rounding of near ties


def test_units_of_a_convolution_are_coordinates_in_the_protocol_and_channels_in_the_control():
    """One bright pixel leads the coordinates; a full plane outweighs it as a channel."""
    network = networks.build("plain", "cifar10", depth=1, width=2)
    states = torch.zeros(1, 2, 16, 16)
    states[0, 0], states[0, 1, 3, 5] = -1.0, 5.0
    importance = robustness.Importance(network)
    importance.update(torch.tensor([0]), [[0 * states, states]])
    one = torch.ones(1, 2, 16, 16)
    coordinates = robustness.eliminate(one, None, importance.rank("signed", 0, 1), torch.tensor([0]), (1 / 512,))[0]
    assert (coordinates == 0).nonzero().tolist() == [[0, 1, 3, 5]]
    channels = robustness.eliminate(one, None, importance.rank("absolute", 0, 1), torch.tensor([0]), (0.5,))[0]
    assert channels[0, 0].abs().sum() == 0
    assert (channels[0, 1] == 1).all()


@pytest.mark.parametrize(("network", "norm"), [("resnet", "none"), ("plain", "batch")])
def test_elimination_agrees_with_a_loop(network, norm, generator):
    """Every layer and share by hand, point by point, on stages that differ in shape."""
    net = networks.build(network, "cifar10", 4, norm=norm, width=2, depth=2, generator=generator).eval()
    x, y = torch.randn(70, 3, 32, 32, generator=generator), torch.randint(0, 10, (70,), generator=generator)
    importance = robustness.Importance.of(net, x[:40], y[:40])
    got = robustness.elimination(net, x[40:], y[40:], importance)
    want = []
    with torch.no_grad():
        ranked, tested = net.tracks(x[:40]), net.tracks(x[40:])
        for k in range(4):
            for l in (1, 2):
                row = []
                for share in robustness.ELIMINATED:
                    state = tested[k][l].flatten(1).clone()
                    for i, label in enumerate(y[40:].tolist()):
                        mean = ranked[k][l].flatten(1)[y[:40] == label].sum(0)
                        top = mean.sort(descending=True, stable=True).indices[: round(share * len(mean))]
                        state[i, top] = tested[k][l - 1].flatten(1)[i, top]
                    logits = net.resume(k, l, state.view_as(tested[k][l]))
                    row.append((logits.argmax(1) == y[40:]).double().mean().item())
                want.append(row)
    for ours, theirs in zip(got["copied"], want, strict=True):
        assert ours == pytest.approx(theirs, abs=1.01 / 30)  # one point may change with the order of a sum
    assert torch.tensor(got["copied"]).sub(torch.tensor(want)).abs().mean() < 0.003
    assert got["depth"] == [2] * 4
    assert (got["aligned"], got["branch"] is None) == (None, network == "plain")


def test_copied_from_an_equal_state_changes_nothing(generator):
    """Blocks that add nothing: x_l = x_{l−1}, so that any units may be copied; zeroed, they are missed."""
    net = networks.build("resnet", "digits", width=16, generator=generator).eval()
    with torch.no_grad():
        for block in net.stages[0].blocks:
            block.layer2.weight.zero_()
    dataset = small_dataset()
    y = net(dataset.x_test).argmax(1)
    importance = robustness.Importance.of(net, dataset.x_train, net(dataset.x_train).argmax(1))
    got = robustness.elimination(net, dataset.x_test, y, importance)
    assert got["copied"] == [[1.0] * 5] * 5
    assert min(row[-1] for row in got["zeroed"]) < 0.9


def test_measure_begins_with_the_clean_accuracy(generator):
    """Nothing removed and nothing added: the network's own accuracy, in every place where it is stated."""
    dataset = small_dataset()
    network = networks.build("resnet", "digits", width=16, generator=generator)
    got = robustness.measure(network, dataset)
    clean = (network.eval()(dataset.x_test).argmax(1) == dataset.y_test).double().mean().item()
    assert got["clean"] == clean
    for what, layers in (("state", 3), ("branch", 3), ("zeroed", 3), ("copied", 5)):
        assert [row[0] for row in got["elimination"][what]] == [clean] * layers
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


def test_disturbances_do_not_depend_on_batches_but_for_their_noise(generator, monkeypatch):
    """FGSM draws nothing: accuracies in batches of 7 are those of one batch, the rates to rounding."""
    dataset = small_dataset()
    network = networks.build("resnet", "digits", width=16, generator=generator)
    whole = robustness.measure(network, dataset)
    monkeypatch.setattr(robustness, "_BATCH", 7)
    parts = robustness.measure(network, dataset)
    assert parts["fgsm"]["accuracy"] == whole["fgsm"]["accuracy"]
    torch.testing.assert_close(torch.tensor(parts["fgsm"]["variation"]), torch.tensor(whole["fgsm"]["variation"]))
    assert parts["noise"]["variation"] != whole["noise"]["variation"]


def test_the_answers_are_those_of_the_functions(generator):
    """One batch of 60 points: noise in the order of its sizes, FGSM at one gradient for all sizes, then PGD."""
    dataset = small_dataset()
    network = networks.build("resnet", "digits", width=16, generator=generator).eval()
    got = robustness.measure(network, dataset)
    x, y, bounds = dataset.x_test, dataset.y_test, Bounds.of(dataset.x_train)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        (track,) = network.tracks(x)
    for kind, moved in (
        ("noise", [robustness.add_noise(x, size, bounds, draws) for size in robustness.NOISES]),
        ("fgsm", [robustness.fgsm(network, x, y, size, bounds) for size in robustness.ATTACKS]),
    ):
        with torch.no_grad():
            accuracy = [(network(z).argmax(1) == y).double().mean().item() for z in moved]
            rates = torch.stack([robustness.variation_rate(track, network.tracks(z)[0]) for z in moved])
        assert got[kind]["accuracy"] == accuracy
        torch.testing.assert_close(torch.tensor(got[kind]["variation"])[:, 0], rates)
    attacked = robustness.pgd(network, x, y, robustness.PGD_SIZE, bounds, generator=draws)
    assert got["pgd"]["accuracy"] == (network(attacked).argmax(1) == y).double().mean().item()
