"""One streamed pass over the states of a network, meters that look at them, and controls that stand in for them.

A meter is told of every batch and says at the end what it has seen. Nothing waits for the device in the loop. Handed on
by `measure`.

| symbol | identifier | meaning |
|---|---|---|
| x_0 … x_L | states | of the points of a batch, in one stage |
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from geodesic import probes, tracks, transport
from geodesic.watch import Reader, points

Move = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Batch:
    """What a network made of a batch of points."""

    labels: Int64[Tensor, "n"] | None
    stages: list[list[Tensor]]  # per stage the states x_0 … x_L; none where the network was asked for answers alone
    output: Any

    @property
    def classes(self) -> Int64[Tensor, "n"]:
        """The labels.

        Raises:
            ValueError: if there are none.
        """
        if self.labels is None:
            raise ValueError("a meter needs the classes of the points; pass batches of points and classes")
        return self.labels


@runtime_checkable
class Meter(Protocol):
    """Looks at every batch of a pass."""

    def update(self, batch: Batch, /) -> None:
        """Take a batch in."""
        ...

    def summary(self) -> dict[str, Any]:
        """What was seen, by name; under "stages" a dict for every stage."""
        ...


@torch.no_grad()
def measure(
    network: Reader, batches: Iterable[tuple[Any, Tensor | None]], *meters: Meter, scored: int | None = None
) -> dict[str, Any]:
    """Send points through a network once, and ask the meters what they saw.

    The memory is that of one batch, and what the meters keep.

    Args:
        network: one of our own, in evaluation mode, or a model seen by `watch`.
        batches: points and their classes, or None.
        meters: what is looked at.
        scored: points whose states are read; those of later batches are only answered, which is cheaper. None reads
            all.

    Returns:
        the summaries of all meters in one: "stages" has a dict for every stage.

    Raises:
        ValueError: if there is no batch.
    """
    start = 0
    for x, y in batches:
        if scored is None or start < scored:
            stages, output = network.read(x)
        else:
            stages, output = [], network(x)
        for meter in meters:
            meter.update(Batch(y, stages, output))
        start += points(x)
    if not start:
        raise ValueError("there is no batch of points to measure; pass at least one")
    return _merged(meters)


def _merged(meters: Iterable[Meter]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    stages: list[dict[str, Any]] = []
    for meter in meters:
        for key, value in meter.summary().items():
            if key == "stages":
                stages = [old | new for old, new in zip(stages or [{}] * len(value), value, strict=True)]
            else:
                found[key] = value
    return found | ({"stages": stages} if stages else {})


class Answers:
    """Mean cross-entropy (nats) and accuracy of all points."""

    def __init__(self) -> None:
        self._n, self._sums = 0, torch.zeros(2, dtype=torch.float64)

    def update(self, batch: Batch) -> None:
        """The output holds logits."""
        loss = F.cross_entropy(batch.output, batch.classes, reduction="sum").double()
        sums = torch.stack([loss, (batch.output.argmax(1) == batch.classes).sum().double()])
        self._sums = self._sums.to(sums.device) + sums
        self._n += len(batch.classes)

    def summary(self) -> dict[str, Any]:
        """Loss and accuracy."""
        loss, correct = self._sums.tolist()
        return {"loss": loss / self._n, "accuracy": correct / self._n}


class Exits:
    """Accuracy when the head reads each state of the last stage."""

    def __init__(self, head: nn.Module):
        self._head, self._n, self._correct = head, 0, torch.zeros((), dtype=torch.int64)

    def update(self, batch: Batch) -> None:
        """The output is what the head makes of the last state."""
        if batch.stages:
            logits = torch.stack([*map(self._head, batch.stages[-1][:-1]), batch.output])
            correct = (logits.argmax(-1) == batch.classes).sum(1)
            self._correct = self._correct.to(correct.device) + correct
            self._n += len(batch.classes)

    def summary(self) -> dict[str, Any]:
        """One accuracy for every state."""
        return {"early_exit": (self._correct.double() / self._n).tolist()}


class Straightness:
    """Line-shape scores, shares of the segments and the action: a `tracks.Accumulator` for every stage."""

    def __init__(self) -> None:
        self._stages: list[tracks.Accumulator] = []

    def update(self, batch: Batch) -> None:
        """Every point counts."""
        self._stages = self._stages or [tracks.Accumulator() for _ in batch.stages]
        for scores, states in zip(self._stages, batch.stages, strict=bool(batch.stages)):
            scores.update(states)

    def summary(self) -> dict[str, Any]:
        """Summaries of the accumulators."""
        return {"stages": [scores.summary() for scores in self._stages]}


class Kept:
    """Keeps the states of the first points, all of them or those at the ends, and their classes."""

    def __init__(self, points: int, *, ends: bool):
        self.points, self._ends, self._count = points, ends, 0
        self._stages: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        """Copy what there is room for."""
        if not batch.stages:
            return
        chosen = [[states[0], states[-1]] if self._ends else states for states in batch.stages]
        self._stages = self._stages or [
            states[0].new_empty(len(states), self.points, *states[0].shape[1:]) for states in chosen
        ]
        room = min(len(chosen[0][0]), self.points - self._count)
        for kept, states in zip(self._stages, chosen, strict=True) if room else ():
            for place, state in zip(kept, states, strict=True):
                place[self._count : self._count + room] = state[:room]
        if batch.labels is not None:
            self._labels.append(batch.labels[:room])
        self._count += room

    def summary(self) -> dict[str, Any]:
        """Nothing: what is kept is read from `stages`."""
        return {}

    @property
    def stages(self) -> list[Float[Tensor, "steps n *state"]]:
        """What is kept, stage by stage."""
        return [kept[:, : self._count] for kept in self._stages]

    @property
    def labels(self) -> Int64[Tensor, "n"]:
        """Classes of the points that are kept.

        Raises:
            ValueError: if the batches had none.
        """
        if not self._labels:
            raise ValueError("the classes of the points are not known; pass batches of points and classes")
        return torch.cat(self._labels)


class Ends(Kept):
    """What the two ends of the tracks say: OTS at nested n, and the collapse of x_L where there are classes."""

    def __init__(self, sizes: Sequence[int], classes: int | None = None, points: int | None = None):
        super().__init__(max(sizes, default=0) if points is None else points, ends=True)
        self.sizes, self._classes = sizes, classes

    def summary(self) -> dict[str, Any]:
        """A score for each size that there are points for; of all points where there is none."""
        sizes = [n for n in self.sizes if n <= self._count] or [self._count] * bool(self.sizes)
        found: list[dict[str, Any]] = [
            {"ots": [asdict(transport.optimal_transport_score(*ends[:, :n])) for n in sizes]} for ends in self.stages
        ]
        if self._classes is not None:
            for stage, ends in zip(found, self.stages, strict=True):
                stage["collapse"] = probes.collapse(ends[1], self.labels, self._classes)
        return {"stages": found}


class Paths(Kept):
    """What whole tracks say: the pairs of Theorem 1, by class where there are classes, and the pace."""

    def __init__(self, points: int, classes: int | None = None, *, tabulate: bool = False):
        super().__init__(points, ends=False)
        self._classes, self._tabulate = classes, tabulate

    def summary(self) -> dict[str, Any]:
        """The pairs are those of all points kept; their table by class is left out unless it is asked for."""
        found = []
        for paths in self.stages:
            labels = self.labels if self._classes else torch.zeros(self._count, dtype=torch.int64, device=paths.device)
            pairs = probes.theorem1_violations(paths.flatten(2), labels, self._classes or 1)
            found.append(
                {"theorem1": pairs | ({} if self._tabulate else {"by_class": None}), "pace": probes.pace(paths)}
            )
        return {"stages": found}


class Control:
    """Shows meters, in place of the network's states, others that know nothing of what it learnt."""

    def __init__(self, name: str, move: Move, *meters: Meter):
        self.name, self._move, self._meters = name, move, meters

    def update(self, batch: Batch) -> None:
        """The stages are replaced one by one."""
        moved = replace(batch, stages=[self._move(states) for states in batch.stages])
        for meter in self._meters:
            meter.update(moved)

    def summary(self) -> dict[str, Any]:
        """Under the control's name what its meters saw."""
        return {self.name: _merged(self._meters)}


def radial(states: list[Float[Tensor, "n *state"]]) -> list[Float[Tensor, "n *state"]]:
    """x_l = (1 + 1/L)^l x_0: a straight track of an optimal map, whatever the data. A perfect and useless geodesic."""
    depth = len(states) - 1
    return [(1 + 1 / depth) ** l * states[0] for l in range(depth + 1)]


def scattered(generator: torch.Generator | None = None) -> Move:
    """Steps as long as the network's, point by point, each in a direction drawn at random (CPU generator)."""

    def move(states: list[Tensor]) -> list[Tensor]:
        moved = [states[0]]
        for before, after in pairwise(states):
            length = (after - before).flatten(1).float().norm(dim=1)
            step = torch.randn(before.shape, generator=generator).to(before.device)
            step *= (length / step.flatten(1).norm(dim=1)).view(-1, *[1] * (step.ndim - 1))
            moved.append(moved[-1] + step.to(before))
        return moved

    return move
