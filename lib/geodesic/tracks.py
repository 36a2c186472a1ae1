"""Scores of data tracks: how straight, how evenly spaced and how long is the path of a point through a network?

A track is a tensor (steps, n, ...) of the states x_0 … x_L of n points (steps = L + 1); trailing axes are flattened.
`align` fixes the order and scale of a plain network's units first, which its function leaves free (`_align`).
Pure functions score one track in memory; `Accumulator` scores a whole data set batch by batch.
Used by the chapters on the set-up, weight decay, Theorem 1 and the experiments. Source: arXiv:2102.09235, eqs 9, 35,
36, 42–44.

| symbol | identifier | meaning |
|---|---|---|
| x_l | track[l] | state after l blocks |
| L | steps - 1 | number of segments |
| LSR | line_shape_ratio | Σ‖x_{l+1} − x_l‖ / ‖x_L − x_0‖ ≥ 1 |
| LSS | line_shape_score | L / ‖Σ u_l‖ ≥ 1, u_l the unit vector of segment l |
| A | action | L · mean Σ‖x_{l+1} − x_l‖² |
| a, b | a, b | distance of a pair of tracks at their starts and at their ends |
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geodesic._align import GAUGES, Aligned, Gauge, align, find_gauge, find_gauges, unit_channels

__all__ = [
    "GAUGES",
    "Accumulator",
    "Aligned",
    "Gauge",
    "Track",
    "action",
    "align",
    "displacement_squared",
    "find_gauge",
    "find_gauges",
    "growth",
    "line_shape_ratio",
    "line_shape_score",
    "scores_in_gauges",
    "segment_shares",
    "theorem1_bound",
    "track_distance",
    "unit_channels",
]

# A point whose whole path is below this many roundings of its largest state has not moved: what is left is noise.
_ROUNDINGS = 8
_BLOCK = 1 << 20  # bytes of a state that are scored at a time on a CPU: a few such stay in its cache

Track = Float[Tensor, "steps n *state"] | Sequence[Float[Tensor, "n *state"]]


class NotFiniteError(ValueError):
    """A track holds infinite values or none: its network has diverged."""


def line_shape_ratio(track: Float[Tensor, "steps n *state"]) -> Float[Tensor, "n"]:
    """Length of the track over the distance of its ends, LSR = Σ_l ‖x_{l+1} − x_l‖ / ‖x_L − x_0‖, in [1, ∞].

    Equal to 1 iff the track is straight and never turns back, whatever the spacing; infinite for a closed track.

    Raises:
        ValueError: for fewer than two states, non-finite values, or a point that never moves.
    Source: paper eq. (42).
    """
    return _measure(track).require_moving().ratio


def line_shape_score(track: Float[Tensor, "steps n *state"]) -> Float[Tensor, "n"]:
    """Straightness with every segment rescaled to length 1, LSS = L / ‖Σ_l u_l‖, in [1, ∞].

    u_l = (x_{l+1} − x_l) / ‖x_{l+1} − x_l‖; equal to 1 iff all segments point the same way. Orthogonal segments give
    √L. A segment of length zero has no direction: it is left out of the sum and of L. The score ignores spacing, so
    it is not a distance from a geodesic: that also asks for equal steps (`action`).

    Raises:
        ValueError: for fewer than two states, non-finite values, or a point that never moves.
    Source: paper eqs (43)–(44).
    """
    return _measure(track).require_moving().score


def segment_shares(track: Float[Tensor, "steps n *state"]) -> Float[Tensor, "layers n"]:
    """Share of each segment in the length of its track; sums to 1 over axis 0.

    Raises:
        ValueError: for fewer than two states, non-finite values, or a point that never moves.
    Source: paper, Tables 2–3.
    """
    return _measure(track).require_moving().shares


def action(track: Float[Tensor, "steps n *state"]) -> Float[Tensor, ""]:
    """Discrete kinetic action A = L · mean over points of Σ_l ‖x_{l+1} − x_l‖², in float64.

    A ≥ `displacement_squared` ≥ W₂²: equality on the left iff every track is straight with equal steps.

    Raises:
        ValueError: for fewer than two states or non-finite values.
    Source: paper eq. (9).
    """
    lengths = _measure(track).doubled().lengths
    return len(lengths) * lengths.square().sum(0).mean()


def displacement_squared(track: Float[Tensor, "steps n *state"]) -> Float[Tensor, ""]:
    """Mean over points of ‖x_L − x_0‖²: the cost of the network's own pairing of input and output, in float64.

    Raises:
        ValueError: for fewer than two states or non-finite values.
    Source: paper, text after eq. (9).
    """
    return _measure(track).doubled().chord.square().mean()


def growth(track: Track) -> Float[Tensor, ""]:
    """Growth of the stream over a stage, E‖x_L − x_0‖ / E‖x_0‖; infinite if x_0 is 0 at every point.

    Raises:
        ValueError: for fewer than two states or non-finite values.
    """
    geometry = _measure([track[0], track[-1]] if len(track) > 1 else track)
    return geometry.chord.mean() / geometry.norms[0].mean()


def track_distance(
    track_a: Float[Tensor, "steps n *state"], track_b: Float[Tensor, "steps n *state"]
) -> Float[Tensor, "n"]:
    """Distance of two tracks, the minimum over layers of ‖a_l − b_l‖, for n pairs of points.

    Raises:
        ValueError: for fewer than two states or non-finite values.
    Source: paper Definition 3, eq. (35).
    """
    for track in (track_a, track_b):
        _require_steps(track)
    a, b = (_require_finite(track.flatten(2)) for track in (track_a, track_b))
    scale = _power_below(torch.maximum(_largest(a).amax(0), _largest(b).amax(0)))
    return (a / scale[:, None] - b / scale[:, None]).norm(dim=-1).amin(0) * scale


def theorem1_bound(a: Float[Tensor, "*pairs"], b: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """Least distance a·b / √(a² + b²) that two straight tracks of an optimal map can come to; 0 where a or b is 0.

    It holds for every pair with ⟨x − y, T(x) − T(y)⟩ ≥ 0, which optimality of T implies, and says nothing of others.
    Between min(a, b)/√2 and min(a, b); reached iff the two differences are orthogonal.

    Args:
        a: distances ‖x − y‖ of the starts.
        b: distances ‖T(x) − T(y)‖ of the ends.

    Raises:
        ValueError: for a distance that is negative or not a number.
    Source: paper Theorem 1, eq. (36).
    """
    if bad := int((~((a >= 0) & (b >= 0))).sum()):
        raise ValueError(
            f"{bad} of {a.numel()} pairs have a negative or undefined distance; pass norms, not differences"
        )
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    return low / (low / high.where(high > 0, 1)).square().add(1).sqrt()  # no square leaves the range of the type


class Accumulator:
    """Scores of a data set from its batches, in the memory of one batch and a few numbers a point.

    `update` takes the tracks of a batch; `summary` returns means over all points seen. Points that never move (a
    collapsed network) have no direction: they are counted in `still_share` and left out of the scores, which are None
    if no point moves.
    """

    def __init__(self) -> None:
        self._batches: list[_Geometry] = []

    def update(self, track: Track) -> None:
        """Add the tracks of a batch of points, as one tensor or as a list of its states."""
        self._batches.append(_measure(track))

    def summary(self) -> dict[str, float | int | list[float] | None]:
        """Means over points of every score; `*_sd` is the spread over points, not over networks.

        Raises:
            ValueError: if no batch was added.
        """
        if not self._batches:
            raise ValueError("no track was added; call update(track) at least once")
        points = _join(self._batches).doubled()
        moving = points.only(points.moves)
        squares = points.lengths.square().mean(1)
        return {
            "n": points.chord.numel(),
            "still_share": 1 - moving.chord.numel() / points.chord.numel(),
            **_describe("lsr", moving.ratio),
            **_describe("lss", moving.score),
            "segment_shares": moving.shares.mean(1).tolist() if moving.chord.numel() else None,
            "action": len(squares) * squares.sum().item(),
            "displacement_squared": points.chord.square().mean().item(),
            "step_squared": squares.tolist(),
            "state_squared": points.norms.square().mean(1).tolist(),
        }


def scores_in_gauges(
    fit: Float[Tensor, "steps m *state"] | Sequence[Float[Tensor, "m *state"]], track: Track
) -> dict[str, dict[str, float | int | list[float] | None]]:
    """Scores of a plain network's track "raw" and in the gauges "norm1", "permuted" and "scaled" (see `align`).

    Args:
        fit: track of the points that fix the gauges (training points).
        track: track of the points that are scored (test points).

    Returns:
        for each an `Accumulator.summary`. For batches: `find_gauges(fit)`, and an `Accumulator` each.

    Raises:
        ValueError: see `align`.
    """
    found = {}
    for name, gauge in {"raw": None, **find_gauges(fit)}.items():
        scores = Accumulator()
        scores.update(gauge.apply_to_states(track) if gauge else track)
        found[name] = scores.summary()
    return found


class _Geometry(NamedTuple):
    """What the scores need of the tracks of n points, each in units of its own `scale`."""

    lengths: Float[Tensor, "layers n"]  # ‖x_{l+1} − x_l‖
    chord: Float[Tensor, "n"]  # ‖x_L − x_0‖
    resultant: Float[Tensor, "n"]  # ‖Σ u_l‖
    norms: Float[Tensor, "steps n"]  # ‖x_l‖
    floor: Float[Tensor, "n"]  # length below which a track is rounding noise
    scale: Float[Tensor, "n"]

    @property
    def moves(self) -> Bool[Tensor, "n"]:
        return self.lengths.sum(0) > self.floor

    @property
    def ratio(self) -> Float[Tensor, "n"]:
        return self.lengths.sum(0) / self.chord

    @property
    def score(self) -> Float[Tensor, "n"]:
        return (self.lengths > 0).sum(0) / self.resultant

    @property
    def shares(self) -> Float[Tensor, "layers n"]:
        return self.lengths / self.lengths.sum(0)

    def doubled(self) -> "_Geometry":
        """In float64 and the units of the states: there the squares of float32 lengths have room."""
        lengths, chord, resultant, norms, floor, scale = (part.double() for part in self)
        return _Geometry(lengths * scale, chord * scale, resultant, norms * scale, floor * scale, scale / scale)

    def only(self, keep: Bool[Tensor, "n"]) -> "_Geometry":
        return _Geometry(*(part[..., keep] for part in self))

    def require_moving(self) -> "_Geometry":
        if still := int((~self.moves).sum()):
            raise ValueError(f"{still} of {len(self.chord)} points never move: no direction to score; drop them first")
        return self


def _states(track: Track) -> list[Float[Tensor, "n d"]]:
    """The states as rows of coordinates, in the order of memory: channels of images may be innermost there.

    No score depends on that order.
    """
    innermost = track[0].ndim == 4 and not track[0].is_contiguous()
    return [(state.movedim(1, -1) if innermost else state).reshape(len(state), -1) for state in track]


def _measure(track: Track) -> _Geometry:
    """What the scores need, block by block on a CPU and at once on a device; it carries no gradient."""
    states = _states(_require_steps(track))
    points = max(1, len(states[0]))
    if states[0].device.type == "cpu":
        points = max(1, _BLOCK * points // max(1, states[0].nbytes))
    return _join([_measure_block(block) for block in zip(*(state.split(points) for state in states), strict=True)])


@torch.no_grad()
def _measure_block(states: Sequence[Float[Tensor, "n d"]]) -> _Geometry:
    """One pass over the states, and a second, scaled, over the tracks whose squares have left the range of the type.

    States of half precision are scored in float32; their own rounding says which of them move.
    """
    eps = torch.finfo(states[0].dtype).eps
    states = [state.float() if state.dtype.itemsize < 4 else state for state in states]
    points = _measure_once(states, eps)
    finite, finfo = points.norms.isfinite().all(0), torch.finfo(states[0].dtype)
    if not finite.all():  # far cheaper than a look at every number
        _require_finite(torch.stack(list(states)))
    least = math.sqrt(states[0].shape[1] * finfo.tiny / finfo.eps)  # squares of less are rounded, or nothing
    again = ~finite
    short = torch.cat([points.lengths, points.chord[None]]) < least
    if short.any():  # of these, what has not moved at all is measured well
        for (before, after), rows in zip([*pairwise(states), (states[0], states[-1])], short, strict=True):
            again[rows] |= _largest(after[rows] - before[rows]) > 0
    if again.any():
        for part, scaled in zip(points, _measure_scaled([state[again] for state in states], eps), strict=True):
            part[..., again] = scaled
    return points


def _measure_once(states: Sequence[Float[Tensor, "n d"]], eps: float) -> _Geometry:
    """Each state is read once from memory, and two buffers stay in the cache."""
    first, last = states[0], states[-1]
    lengths, norms = first.new_empty(len(states) - 1, len(first)), first.new_empty(len(states), len(first))
    segment, units, tiny = torch.empty_like(first), torch.zeros_like(first), torch.finfo(first.dtype).tiny
    torch.linalg.vector_norm(first, dim=-1, out=norms[0])
    for layer, (before, after) in enumerate(pairwise(states)):
        torch.sub(after, before, out=segment)
        torch.linalg.vector_norm(segment, dim=-1, out=lengths[layer])
        torch.linalg.vector_norm(after, dim=-1, out=norms[layer + 1])
        units.addcdiv_(segment, lengths[layer].clamp_min(tiny)[:, None])
    chord = torch.sub(last, first, out=segment).norm(dim=-1)
    floor = _ROUNDINGS * eps * norms.amax(0)
    return _Geometry(lengths, chord, units.norm(dim=-1), norms, floor, torch.ones_like(chord))


def _measure_scaled(states: Sequence[Float[Tensor, "n d"]], eps: float) -> _Geometry:
    """Each track in units of its largest entry, and each segment in units of its own before it is squared.

    The units are powers of two, so that scaling rounds nothing.
    """
    scale = _power_below(torch.stack([_largest(state) for state in states]).amax(0))
    states = [state / scale[:, None] for state in states]
    lengths, units = [], torch.zeros_like(states[0])
    for before, after in pairwise(states):
        length, direction = _polar(after - before)
        units += direction
        lengths.append(length)
    norms = torch.stack([state.norm(dim=-1) for state in states])
    chord, _ = _polar(states[-1] - states[0])
    return _Geometry(torch.stack(lengths), chord, units.norm(dim=-1), norms, _ROUNDINGS * eps * norms.amax(0), scale)


def _polar(vectors: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n d"]]:
    """Lengths and unit vectors; nothing has the direction zero."""
    scale = _power_below(_largest(vectors))
    vectors = vectors / scale[:, None]
    lengths = vectors.norm(dim=-1)
    return lengths * scale, vectors / lengths.clamp_min(1)[:, None]  # the largest entry is at least 1, or nothing is


def _largest(vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    return torch.linalg.vector_norm(vectors, ord=math.inf, dim=-1)


def _power_below(sizes: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The largest power of two that is no larger; 1 for 0."""
    return torch.ldexp(torch.ones_like(sizes), torch.frexp(sizes).exponent - 1).where(sizes > 0, 1)


def _join(parts: Sequence[_Geometry]) -> _Geometry:
    return _Geometry(*(torch.cat(part, -1) for part in zip(*parts, strict=True)))


def _require_steps(track: Track) -> Track:
    if len(track) < 2:
        shape = (len(track), *(track[0].shape if len(track) else ()))
        raise ValueError(f"a track needs at least 2 states on axis 0, got shape {shape}; record x_0 too")
    return track


def _require_finite(states: Float[Tensor, "steps n d"]) -> Float[Tensor, "steps n d"]:
    if bad := int((~states.isfinite()).any(-1).any(0).sum()):
        raise NotFiniteError(
            f"{bad} of {states.shape[1]} tracks hold non-finite values; a diverged network has no score"
        )
    return states


def _describe(name: str, values: Float[Tensor, "n"]) -> dict[str, float | None]:
    if not len(values):
        return {f"{name}_{what}": None for what in ("mean", "median", "sd")}
    return {
        f"{name}_mean": values.mean().item(),
        f"{name}_median": values.median().item(),
        f"{name}_sd": values.std(correction=0).item(),
    }
