"""How a trained network answers to disturbed inputs and missing units: noise, FGSM, PGD, variation rate, elimination.

Sizes of disturbances are shares of each channel's range of values over the training set, so that 8/255 means what it
says for images whose pixels fill 0 … 255; disturbed inputs stay within that range. Every function leaves the network
as it was, in evaluation mode. Used by the chapters on the CIFAR experiments and the verdict. Source: arXiv:2102.09235,
appendices 7.1 and 7.2, Figs 7 and 8, eq. (49); which sizes it used is not known.

| symbol | identifier | meaning |
|---|---|---|
| x_l, x̃_l | track[l], moved[l] | states of a point and of its disturbed copy after l blocks |
| ε | size | of a disturbance, as a share of the range |
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from geodesic.data import Dataset
from geodesic.networks import Network, ResidualBlock

NOISES = (0.02, 0.05, 0.1, 0.2)
ATTACKS = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
PGD_SIZE, PGD_STEPS = 4 / 255, 20
ELIMINATED = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # shares of a layer's units
_POINTS = 1000  # test points that are disturbed, at most
_BATCH = 250


@dataclass(frozen=True)
class Bounds:
    """Least and largest value of every channel, shaped to broadcast over a batch."""

    low: Float[Tensor, "1 c *rest"]
    high: Float[Tensor, "1 c *rest"]

    @classmethod
    def of(cls, x: Float[Tensor, "n c *rest"]) -> "Bounds":
        """The range over a data set; axis 1 holds the channels."""
        axes = [axis for axis in range(x.ndim) if axis != 1]
        return cls(x.amin(axes, keepdim=True), x.amax(axes, keepdim=True))

    @property
    def width(self) -> Float[Tensor, "1 c *rest"]:
        """The largest value less the least."""
        return self.high - self.low

    def keep(self, x: Float[Tensor, "n c *rest"]) -> Float[Tensor, "n c *rest"]:
        """The nearest values within the range."""
        return torch.maximum(torch.minimum(x, self.high), self.low)


def add_noise(
    x: Float[Tensor, "n c *rest"], size: float, bounds: Bounds, generator: torch.Generator
) -> Float[Tensor, "n c *rest"]:
    """Gaussian noise of standard deviation `size` times the range, cut to the range."""
    return bounds.keep(x + size * bounds.width * torch.randn(x.shape, generator=generator).to(x))


def fgsm(
    network: nn.Module, x: Float[Tensor, "n c *rest"], y: Int64[Tensor, "n"], size: float, bounds: Bounds
) -> Float[Tensor, "n c *rest"]:
    """Fast gradient sign method: one step of `size` times the range along the sign of the loss's gradient.

    Source: Goodfellow, Shlens & Szegedy 2015; paper Fig. 8.
    """
    return bounds.keep(x + size * bounds.width * _gradient(network, x, y).sign())


def pgd(
    network: nn.Module,
    x: Float[Tensor, "n c *rest"],
    y: Int64[Tensor, "n"],
    size: float,
    bounds: Bounds,
    *,
    steps: int = PGD_STEPS,
    generator: torch.Generator,
) -> Float[Tensor, "n c *rest"]:
    """Projected gradient descent in the ℓ∞ ball of radius `size` times the range, from a random start.

    Steps of 2.5 size/steps, so that any point of the ball can be reached. Source: Madry et al. 2018.
    """
    radius = size * bounds.width
    start = 2 * torch.rand(x.shape, generator=generator).to(x) - 1
    moved = bounds.keep(x + radius * start)
    for _ in range(steps):
        moved = moved + 2.5 / steps * radius * _gradient(network, moved, y).sign()
        moved = bounds.keep(torch.maximum(torch.minimum(moved, x + radius), x - radius))
    return moved


def variation_rate(
    track: Float[Tensor, "steps n *state"], moved: Float[Tensor, "steps n *state"]
) -> Float[Tensor, "steps"]:
    """Mean over points of ‖x̃_l − x_l‖ / ‖x_l‖, for every layer; a state at the origin has no rate and is left out.

    Source: paper eq. (49).
    """
    before, after = (states.reshape(*states.shape[:2], -1) for states in (track, moved))
    norm = before.norm(dim=-1)
    rate = (after - before).norm(dim=-1) / norm
    return torch.stack([r[n > 0].mean() for r, n in zip(rate, norm, strict=True)])


def eliminate(
    network: Network,
    state: Float[Tensor, "n units *space"],
    ranked_by: Float[Tensor, "m units *space"],
    labels: Int64[Tensor, "n"],
    ranked_labels: Int64[Tensor, "m"],
    share: float,
) -> Float[Tensor, "n units *space"]:
    """Set to zero, in every point, the units that matter most to the point's class.

    A unit is a coordinate of a fully connected layer or a channel of a convolutional one. It matters to a class by the
    mean of its absolute value over that class's points in `ranked_by`; the paper's own measure is not known.

    Args:
        network: says how many classes there are.
        state: of the points to change.
        ranked_by: values of the same units on other points, which rank them.
        labels: classes of the points in `state`.
        ranked_labels: classes of the points in `ranked_by`.
        share: of the units that are removed, rounded to whole units.

    Source: paper appendix 7.1, Fig. 7.
    """
    size = ranked_by.abs().flatten(2).mean(2) if ranked_by.ndim > 2 else ranked_by.abs()
    onehot = F.one_hot(ranked_labels, network.arch.classes).to(size)
    importance = onehot.T @ size  # (classes, units): sums rank as means do
    count = round(share * size.shape[1])
    keep = torch.ones_like(importance).scatter_(1, importance.topk(count, dim=1).indices, 0.0)
    return state * keep[labels].reshape(*state.shape[:2], *[1] * (state.ndim - 2))


def measure(network: Network, dataset: Dataset, points: int = _POINTS) -> dict[str, Any]:
    """Accuracy of the first test points, at most 1000, under every disturbance, and with units missing.

    The noise and PGD's starts are the same for every network of a data set: networks can be compared in pairs.

    Args:
        network: trained.
        dataset: its training points set the range and, twice as many as test points, rank the units.
        points: of the test set that are used.

    Returns:
        n: test points; clean: their accuracy; noise, fgsm: sizes, accuracy, variation (sizes × stages × layers);
        pgd: size, steps, accuracy; elimination: shares, layers (stage, block), state and branch (layers × shares) —
        accuracy without the units of the layer's output, and for residual networks without those of the block's
        branch alone.
    """
    network.eval()
    generator = torch.Generator().manual_seed(0)
    bounds = Bounds.of(dataset.x_train)
    points = min(points, _POINTS)
    x, y = dataset.x_test[:points], dataset.y_test[:points]
    batches = list(zip(x.split(_BATCH), y.split(_BATCH), strict=True))

    def moved(how: Any, size: float) -> Tensor:
        return torch.cat([how(xb, yb, size) for xb, yb in batches])

    def noise(xb: Tensor, _: Tensor, size: float) -> Tensor:
        return add_noise(xb, size, bounds, generator)

    def attack(xb: Tensor, yb: Tensor, size: float) -> Tensor:
        return fgsm(network, xb, yb, size, bounds)

    def descent(xb: Tensor, yb: Tensor, size: float) -> Tensor:
        return pgd(network, xb, yb, size, bounds, generator=generator)

    found: dict[str, Any] = {"n": len(y), "clean": _answer(network, x, x, y)[0]}
    for name, how, sizes in (("noise", noise, NOISES), ("fgsm", attack, ATTACKS)):
        answers = [_answer(network, x, moved(how, size), y) for size in sizes]
        found[name] = {
            "sizes": list(sizes),
            "accuracy": [accuracy for accuracy, _ in answers],
            "variation": [variation for _, variation in answers],
        }
    accuracy, _ = _answer(network, x, moved(descent, PGD_SIZE), y)
    found["pgd"] = {"size": PGD_SIZE, "steps": PGD_STEPS, "accuracy": accuracy}
    ranked = dataset.x_train[: 2 * points], dataset.y_train[: 2 * points]
    return found | {"elimination": _elimination(network, x, y, *ranked)}


@torch.no_grad()
def _answer(network: Network, x: Tensor, moved: Tensor, y: Tensor) -> tuple[float, list[list[float]]]:
    """Accuracy on the disturbed points, and the variation rate of every layer of every stage."""
    correct, rates = 0, None
    for xb, mb, yb in zip(x.split(_BATCH), moved.split(_BATCH), y.split(_BATCH), strict=True):
        tracks, others = network.tracks(xb), network.tracks(mb)
        correct += (network.head(others[-1][-1]).argmax(1) == yb).sum().item()
        here = [len(yb) / len(y) * variation_rate(a, b) for a, b in zip(tracks, others, strict=True)]
        rates = here if rates is None else [r + h for r, h in zip(rates, here, strict=True)]
    return correct / len(y), [rate.tolist() for rate in rates]


@torch.no_grad()
def _elimination(
    network: Network, x: Tensor, y: Tensor, x_ranked: Tensor, y_ranked: Tensor
) -> dict[str, list[Any] | None]:
    """Accuracy without the most important units of the first, the middle and the last block of every stage."""
    layers: list[tuple[int, int]] = []
    accuracy: dict[str, list[list[float]]] = {"state": [], "branch": []}
    for k, stage in enumerate(network.stages):
        x, x_ranked = stage.entry(x), stage.entry(x_ranked)
        chosen = {1, (len(stage.blocks) + 1) // 2, len(stage.blocks)}
        residual = isinstance(stage.blocks[0], ResidualBlock)
        for l, block in enumerate(stage.blocks, 1):
            before, before_ranked = x, x_ranked
            x, x_ranked = block(x), block(x_ranked)
            if l not in chosen:
                continue
            layers.append((k, l))
            cut = {"state": [eliminate(network, x, x_ranked, y, y_ranked, share) for share in ELIMINATED]}
            if residual:
                f, f_ranked = x - before, x_ranked - before_ranked
                cut["branch"] = [before + eliminate(network, f, f_ranked, y, y_ranked, s) for s in ELIMINATED]
            for what, states in cut.items():
                accuracy[what].append([_finish(network, k, l, state, y) for state in states])
    return {"shares": list(ELIMINATED), "layers": layers, **{what: rows or None for what, rows in accuracy.items()}}


def _finish(network: Network, stage: int, block: int, state: Tensor, y: Tensor) -> float:
    """Accuracy when the network goes on from a state after `block` blocks of a stage."""
    for later in network.stages[stage].blocks[block:]:
        state = later(state)
    for following in network.stages[stage + 1 :]:
        state = following.entry(state)
        for later in following.blocks:
            state = later(state)
    return (network.head(state).argmax(1) == y).double().mean().item()


def _gradient(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the loss with respect to the inputs."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(network(x), y, reduction="sum")  # a point's gradient does not depend on its batch
        return torch.autograd.grad(loss, x)[0]
