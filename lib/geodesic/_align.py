"""A fixed gauge for a plain network's tracks: the order and scale of its units, which its function leaves free.

Without identity maps the units of every state can be relabelled and rescaled (by positive numbers) and the weights
changed so that no logit moves (`networks.regauge` does it): x_l becomes D_l P_l x_l. A difference x_{l+1} − x_l then
subtracts coordinates that bear no common name. Here each state's units are matched to those of the state before.
Handed on by `tracks`.

| symbol | identifier | meaning |
|---|---|---|
| P_l | permutations[l] | unit i of the new state is unit permutations[l, i] of the old one |
| D_l | scales[l] | its positive factor, the common one of the state included |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

States = Sequence[Float[Tensor, "n units *space"]]
Rows = slice | Int64[Tensor, "m"] | Bool[Tensor, "n"] | Sequence[int] | None

GAUGES = ("norm1", "permuted", "scaled")
_LEAST = 1e-3  # a unit that nothing matches keeps this share of its partner's size: a scale has to be positive


@dataclass(frozen=True)
class Gauge:
    """A change of the units of every state that leaves a plain network's function as it is."""

    permutations: Int64[Tensor, "steps units"]
    scales: Float[Tensor, "steps units"]

    def apply(self, track: Float[Tensor, "steps n units *space"]) -> Float[Tensor, "steps n units *space"]:
        """D_l P_l x_l for other points of the same network.

        Raises:
            ValueError: for another number of states or units.
        """
        return torch.stack(self.apply_to_states(track))

    def apply_to_states(
        self, states: States | Float[Tensor, "steps n units *space"]
    ) -> list[Float[Tensor, "n units *space"]]:
        """The same for a list of states, which spares a copy of them all."""
        shape = (len(states), *states[0].shape[1:2])
        if shape != tuple(self.scales.shape):
            raise ValueError(f"a track of (states, units) = {shape} in a gauge of {tuple(self.scales.shape)}")
        return [_turn(*each) for each in zip(states, self.permutations, self.scales, strict=True)]


@dataclass(frozen=True)
class Aligned(Gauge):
    """A track in a fixed gauge, and the gauge."""

    track: Float[Tensor, "steps n units *space"]


@torch.no_grad()
def align(track: Float[Tensor, "steps n units *space"], fit: Rows = None, unit_scales: bool = False) -> Aligned:
    """Bring a plain network's track to a fixed gauge: states of mean norm 1, units matched to the state before.

    x_0 keeps the order of its units; those of x_1, x_2, … follow in turn, each by an exact assignment that minimises
    Σ‖D_l P_l x_l − D_{l−1} P_{l−1} x_{l−1}‖² over P_l. With `unit_scales` also over a positive factor of every unit,
    of which the best one is known in closed form, so that order and factors are found together. (Factors alone bring
    LSS down to about √L whatever the map: a bound, not a reading.) A match of two states that are not neighbours:
    `align(track[[0, -1]])`. Cost: a product of (units × n · space) matrices and an O(units³) assignment a state.

    Args:
        track: states x_0 … x_L; units on axis 2, features or channels.
        fit: rows of axis 1 on which the gauge is fitted, an index, slice or mask; None takes all. It is applied to all.
        unit_scales: scale units too.

    Raises:
        ValueError: for fewer than two states, no points to fit, or non-finite values.
    Source: the permutation and rescaling symmetries of arXiv:2209.04836 and arXiv:1506.02617, here within one network.
    """
    rows = track if fit is None else track[:, fit]
    gauge = find_gauge(rows, unit_scales=unit_scales)
    return Aligned(gauge.permutations, gauge.scales, gauge.apply(track))


@torch.no_grad()
def find_gauge(
    states: States | Float[Tensor, "steps n units *space"], *, permute: bool = True, unit_scales: bool = False
) -> Gauge:
    """The gauge of `align` alone, of a track or a list of its states; permute=False brings states to norm 1 only."""
    if len(states) < 2 or states[0].ndim < 2 or not len(states[0]):
        shape = (len(states), *(states[0].shape if len(states) else ()))
        raise ValueError(f"a gauge needs at least 2 states of at least 1 point, (steps, n, units, ...); got {shape}")
    permutations, scales = [], []
    before: Tensor | None = None
    for state in states:
        norm = torch.linalg.vector_norm(state.flatten(1), dim=-1, dtype=torch.float64).mean()
        if not norm.isfinite():
            raise ValueError("a state holds non-finite values; a diverged network has no gauge")
        units = state.shape[1]
        order, scale = torch.arange(units, device=state.device), state.new_ones(units)
        scale = scale / norm.clamp_min(torch.finfo(state.dtype).tiny) if norm > 0 else scale
        if before is not None and permute:
            order, factors = _match(before, _turn(state, order, scale), unit_scales)
            scale = scale * factors
            if unit_scales:
                left = torch.linalg.vector_norm(_turn(state, order, scale).flatten(1), dim=-1, dtype=torch.float64)
                scale = scale / left.mean().to(scale) if left.mean() > 0 else scale
        before = _turn(state, order, scale)
        permutations.append(order)
        scales.append(scale)
    return Gauge(torch.stack(permutations), torch.stack(scales))


def find_gauges(states: States | Float[Tensor, "steps n units *space"]) -> dict[str, Gauge]:
    """The gauges in which a plain network is scored: at norm 1, units permuted besides, and scaled besides."""
    return {
        "norm1": find_gauge(states, permute=False),
        "permuted": find_gauge(states),
        "scaled": find_gauge(states, unit_scales=True),
    }


def unit_channels(x0: Float[Tensor, "n units *space"]) -> Float[Tensor, "units"]:
    """Factor that brings each unit (feature, or channel) to mean square 1 over points and places; 1 where it is 0.

    A residual network leaves one positive diagonal metric free, the same for all states of a stage: its optimal
    transport score belongs to the network and a metric. This is the second metric beside the one it was trained in.
    """
    size = _rows(x0).double().square().mean(1).sqrt()
    return torch.where(size > 0, 1 / size, 1.0).to(x0)


def _turn(
    state: Float[Tensor, "n units *space"], order: Int64[Tensor, "units"], scale: Float[Tensor, "units"]
) -> Float[Tensor, "n units *space"]:
    """D P x."""
    return state[:, order.to(state.device)] * scale.to(state).reshape(-1, *[1] * (state.ndim - 2))


def _rows(state: Float[Tensor, "n units *space"]) -> Float[Tensor, "units m"]:
    """All values of a unit in one row."""
    return state.movedim(1, 0).flatten(1)


def _match(
    before: Float[Tensor, "n units *space"], after: Float[Tensor, "n units *space"], unit_scales: bool
) -> tuple[Int64[Tensor, "units"], Float[Tensor, "units"]]:
    """Which unit of `after` stands for each unit of `before`, and by which factor."""
    a, b = _rows(before), _rows(after)
    inner = (a @ b.mT).double()
    tiny = torch.finfo(torch.float64).tiny
    squares = b.double().square().sum(1).clamp_min(tiny)
    gain = inner.clamp_min(0).square() / squares if unit_scales else inner
    _, order = linear_sum_assignment(np.asarray(gain.cpu()), maximize=True)
    order = torch.from_numpy(order).to(after.device)
    if not unit_scales:
        return order, torch.ones_like(a[:, 0])
    squares = squares[order]
    best = inner.gather(1, order[:, None])[:, 0] / squares
    least = _LEAST * (a.double().square().sum(1) / squares).sqrt()
    factor = torch.maximum(best, least)
    return order, torch.where((squares > tiny) & (factor > 0), factor, 1.0).to(a)
