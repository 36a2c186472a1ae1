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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from geodesic.data import Dataset
from geodesic.networks import Network, ResidualBlock, Stage

NOISES = (0.02, 0.05, 0.1, 0.2)
ATTACKS = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
PGD_SIZE, PGD_STEPS = 4 / 255, 20
ELIMINATED = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # shares of a layer's units
_POINTS = 500  # test points that are disturbed, at most
_RANKING = 4000  # training points that rank the units, at most
_BATCH = 250
_CUT_BATCH = {"cpu": 64, "cuda": 512}  # points at a time; each goes on through the network once for every share

Matched = Callable[[int, int, Tensor], Tensor]  # (stage, l, x_{l−1}) → x_{l−1} with its units named as in x_l


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
    rates = torch.stack([_rates(before, after) for before, after in zip(track, moved, strict=True)])
    return rates.nanmean(1)


def _rates(before: Float[Tensor, "n *state"], after: Float[Tensor, "n *state"]) -> Float[Tensor, "n"]:
    """‖x̃ − x‖ / ‖x‖ of every point; not a number where x is the origin."""
    norm = before.flatten(1).norm(dim=1)
    return (after - before).flatten(1).norm(dim=1) / norm.where(norm > 0, torch.nan)


class Importance:
    """How much each unit of every layer matters to each class, from the states of training points, batch by batch.

    Two measures. `signed`, the paper's: a unit is a coordinate of the state, of a convolution's too, and matters by its
    mean over the class's points as it stands, so that a unit that is strongly negative does not matter. `absolute`, of
    the older control: a unit is a coordinate of a fully connected layer or a channel of a convolutional one, and
    matters by the mean of its absolute value; so do the units of what a residual block adds (`branch`). The control is
    taken at the first, the middle and the last block of a stage.

    Source: paper appendix 7.1.
    """

    def __init__(self, network: Network):
        self.classes = network.arch.classes
        self.chosen = [_chosen(stage) for stage in network.stages]
        self.residual = [isinstance(stage.blocks[0], ResidualBlock) for stage in network.stages]
        self._sums: dict[tuple[str, int, int], Tensor] = {}
        self._ranks: dict[tuple[str, int, int], Tensor] = {}

    @classmethod
    @torch.no_grad()
    def of(cls, network: Network, x: Float[Tensor, "n *shape"], y: Int64[Tensor, "n"]) -> "Importance":
        """From one pass over training points."""
        found = cls(network)
        for xb, yb in zip(x.split(_BATCH), y.split(_BATCH), strict=True):
            found.update(yb, network.states(xb))
        return found

    def update(self, labels: Int64[Tensor, "n"], stages: Sequence[Sequence[Tensor]]) -> None:
        """Add a batch of points: their classes and, stage by stage, their states x_0 … x_L."""
        for k, states in enumerate(stages):
            onehot = F.one_hot(labels, self.classes).to(states[0]).T
            for l, (before, state) in enumerate(pairwise(states), 1):
                self._add("signed", k, l, onehot, state)
                if l in self.chosen[k]:
                    self._add("absolute", k, l, onehot, _size(state))
                    if self.residual[k]:
                        self._add("branch", k, l, onehot, _size(state - before))

    def _add(self, what: str, k: int, l: int, onehot: Tensor, size: Tensor) -> None:
        sums = (onehot @ size.flatten(1)).view(-1, *size.shape[1:])  # sums over a class rank as its means do
        key = (what, k, l)
        self._sums[key] = self._sums[key] + sums if key in self._sums else sums
        self._ranks.pop(key, None)

    def rank(self, what: str, stage: int, layer: int) -> Int32[Tensor, "classes *units"]:
        """Place of every unit in the order of its importance to a class, from 0."""
        key = (what, stage, layer)
        if key not in self._ranks:
            sums = self._sums[key]
            order = sums.flatten(1).argsort(dim=1, descending=True, stable=True)
            self._ranks[key] = order.argsort(dim=1).view(sums.shape).int()
        return self._ranks[key]


def _chosen(stage: Stage) -> tuple[int, ...]:
    """The first, the middle and the last block of a stage, counted from 1."""
    depth = len(stage.blocks)
    return tuple(sorted({1, (depth + 1) // 2, depth}))


def _size(state: Float[Tensor, "n units *space"]) -> Float[Tensor, "n units *ones"]:
    """Mean absolute value of every unit over space, which broadcasts over the state."""
    return state.abs().mean((2, 3), keepdim=True) if state.ndim == 4 else state.abs()


def eliminate(
    state: Float[Tensor, "n *state"],
    substitute: Float[Tensor, "n *state"] | None,
    rank: Int32[Tensor, "classes *units"],
    labels: Int64[Tensor, "n"],
    shares: Sequence[float],
) -> Float[Tensor, "shares n *state"]:
    """Put another state's values, or zeros, in the units that matter most to each point's class.

    Args:
        state: x_l of the points.
        substitute: the values to put there, x_{l−1} in the paper; None puts zeros.
        rank: place of every unit in the order of its importance to a class; its shape broadcasts over the state.
        labels: classes of the points.
        shares: of the units that are replaced, each rounded to whole units.

    Source: paper appendix 7.1, Fig. 7.
    """
    place, units = rank[labels], rank[0].numel()
    other = state.new_zeros(()) if substitute is None else substitute
    return torch.stack([torch.where(place < round(share * units), other, state) for share in shares])


def measure(
    network: Network,
    dataset: Dataset,
    points: int = _POINTS,
    *,
    importance: Importance | None = None,
    matched: Matched | None = None,
) -> dict[str, Any]:
    """Accuracy of the first test points, at most 500, under every disturbance, and with units missing.

    The noise and PGD's starts are the same for every network of a data set: networks can be compared in pairs.

    Args:
        network: trained.
        dataset: its training points set the range and rank the units.
        points: of the test set that are used.
        importance: of the units, if it is known; else the first 4000 training points rank them.
        matched: see `elimination`.

    Returns:
        n: test points; clean: their accuracy; noise, fgsm: sizes, accuracy, variation (sizes × stages × layers);
        pgd: size, steps, accuracy; elimination: see `elimination`.
    """
    network.eval()
    points = min(points, _POINTS)
    x, y = dataset.x_test[:points], dataset.y_test[:points]
    importance = importance or Importance.of(network, dataset.x_train[:_RANKING], dataset.y_train[:_RANKING])
    found = _disturbed(network, x, y, Bounds.of(dataset.x_train))
    return found | {"elimination": elimination(network, x, y, importance, matched)}


def _disturbed(network: Network, x: Tensor, y: Tensor, bounds: Bounds) -> dict[str, Any]:
    """Accuracy under noise, FGSM and PGD, and how far the states move; nothing waits for the device in the loop."""
    generator = torch.Generator().manual_seed(0)
    names = ["clean", *(("noise", s) for s in NOISES), *(("fgsm", s) for s in ATTACKS), "pgd"]
    correct = torch.zeros(len(names), dtype=torch.int64, device=x.device)
    rates: list[list[list[Tensor]]] = []  # batches × disturbances × stages
    for xb, yb in zip(x.split(_BATCH), y.split(_BATCH), strict=True):
        slope = _gradient(network, xb, yb).sign()
        moved = [
            xb,
            *(add_noise(xb, size, bounds, generator) for size in NOISES),
            *(bounds.keep(xb + size * bounds.width * slope) for size in ATTACKS),
            pgd(network, xb, yb, PGD_SIZE, bounds, generator=generator),
        ]
        with torch.no_grad():
            clean = network.states(xb)
            hits, here = [], []
            for other in moved:
                stages = network.states(other)
                hits.append((network.head(stages[-1][-1]).argmax(1) == yb).sum())
                here.append(
                    [
                        torch.stack([_rates(a, b) for a, b in zip(before, after, strict=True)])
                        for before, after in zip(clean, stages, strict=True)
                    ]
                )
        correct += torch.stack(hits)
        rates.append(here)
    accuracy = dict(zip(names, (correct.double() / len(y)).tolist(), strict=True))
    variation = {
        name: [torch.cat(stage, 1).nanmean(1).tolist() for stage in zip(*(batch[at] for batch in rates), strict=True)]
        for at, name in enumerate(names)
    }
    found: dict[str, Any] = {"n": len(y), "clean": accuracy["clean"]}
    for kind, sizes in (("noise", NOISES), ("fgsm", ATTACKS)):
        found[kind] = {
            "sizes": list(sizes),
            "accuracy": [accuracy[kind, size] for size in sizes],
            "variation": [variation[kind, size] for size in sizes],
        }
    found["pgd"] = {"size": PGD_SIZE, "steps": PGD_STEPS, "accuracy": accuracy["pgd"]}
    return found


@torch.no_grad()
def elimination(
    network: Network,
    x: Float[Tensor, "n *shape"],
    y: Int64[Tensor, "n"],
    importance: Importance,
    matched: Matched | None = None,
) -> dict[str, Any]:
    """Accuracy without the units of one layer that matter most to each point's class.

    The paper's protocol is `copied`: in x_l these units get the values that they have in x_{l−1}. That presumes that a
    unit means the same in both, which an identity map makes true and a plain network has no reason to obey; so
    `aligned` gives them the values of the units of x_{l−1} that were matched with them. Controls: `zeroed`, the same
    units at zero; `state` and `branch`, units by absolute value at zero (see `Importance`).

    Args:
        network: trained, in evaluation mode.
        x: test points.
        y: their classes.
        importance: ranks the units.
        matched: for a plain network, takes (stage, l, x_{l−1}) to x_{l−1} with its units named and scaled as in x_l.

    Returns:
        shares of the units; depth: L of every stage; copied, aligned: accuracy (layers × shares), all layers l ≥ 1 of
        the first stage, then of the next; layers: (stage, block) of the first, the middle and the last block of every
        stage, and for these zeroed, state and branch. None where it does not apply.
    """
    hits: dict[str, dict[tuple[int, int], Tensor]] = {}
    batch = _CUT_BATCH[x.device.type]
    for xb, yb in zip(x.split(batch), y.split(batch), strict=True):
        stages = network.states(xb)
        clean = (network.head(stages[-1][-1]).argmax(1) == yb).sum().view(1)
        for k, states in enumerate(stages):
            for l, (before, state) in enumerate(pairwise(states), 1):
                for what, cut in _cuts(importance, k, l, before, state, yb, matched):
                    logits = network.resume(k, l, _like(cut.flatten(0, 1), state))
                    right = torch.cat([clean, (logits.argmax(1).view(-1, len(yb)) == yb).sum(1)])
                    rows = hits.setdefault(what, {})
                    rows[k, l] = rows[k, l] + right if (k, l) in rows else right
    found = {what: (torch.stack(list(rows.values())).double() / len(y)).tolist() for what, rows in hits.items()}
    return {
        "shares": list(ELIMINATED),
        "depth": [len(stage.blocks) for stage in network.stages],
        "layers": [(k, l) for k, chosen in enumerate(importance.chosen) for l in chosen],
        **{what: found.get(what) for what in ("copied", "aligned", "zeroed", "state", "branch")},
    }


def _cuts(
    importance: Importance, k: int, l: int, before: Tensor, state: Tensor, y: Tensor, matched: Matched | None
) -> Iterator[tuple[str, Float[Tensor, "shares n *state"]]]:
    """The states of one layer without their most important units, in every way that applies to it and every share."""
    rank, shares = importance.rank("signed", k, l), ELIMINATED[1:]
    yield "copied", eliminate(state, before, rank, y, shares)
    if matched is not None:
        yield "aligned", eliminate(state, matched(k, l, before), rank, y, shares)
    if l in importance.chosen[k]:
        yield "zeroed", eliminate(state, None, rank, y, shares)
        yield "state", eliminate(state, None, importance.rank("absolute", k, l), y, shares)
        if importance.residual[k]:
            rank = importance.rank("branch", k, l)
            yield "branch", before + eliminate(state - before, None, rank, y, shares)


def _like(state: Tensor, other: Tensor) -> Tensor:
    """In the memory format of another state: kernels depend on it."""
    innermost = other.ndim == 4 and other.is_contiguous(memory_format=torch.channels_last)
    return state.contiguous(memory_format=torch.channels_last) if innermost else state


def _gradient(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the loss with respect to the inputs."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(network(x), y, reduction="sum")  # a point's gradient does not depend on its batch
        return torch.autograd.grad(loss, x)[0]
