"""A stage of a plain network in the gauges of its tracks: scores, and its blocks from gauge to gauge.

Used by `measure`.

| symbol | identifier | meaning |
|---|---|---|
| P_l, D_l | _order[l], _scales[l] | order and scale of the units of x_l in the permuted gauge (see `tracks.align`) |
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from jaxtyping import Float
from torch import Tensor

from geodesic import tracks, transport

ALIGNED_OTS = 2000  # largest subset in the aligned gauge

Map = Callable[[Tensor], Tensor]


class Aligned:
    """A stage of a plain network in the gauges of its tracks, fitted on training points (see `tracks.align`).

    A plain network's units bear no common name from layer to layer, and its states no common scale: every score of its
    tracks is one of a gauge.
    """

    def __init__(self, fit: Float[Tensor, "steps n *state"]):
        self._gauges = tracks.find_gauges(fit)
        self._ends = tracks.find_gauge(fit[[0, -1]])
        permuted = self._gauges["permuted"]
        self._order, self._scales = permuted.permutations, permuted.scales
        self._inverse = self._order.argsort(dim=1)

    def scores(
        self, paths: Float[Tensor, "steps n *state"], ends: Float[Tensor, "2 n *state"], sizes: list[int]
    ) -> dict[str, Any]:
        """Line-shape scores of other points in each gauge; OTS with x_L's units matched to x_0's, at one size."""
        found: dict[str, Any] = {
            name: _line_shape(gauge.apply_to_states(paths)) for name, gauge in self._gauges.items()
        }
        n = max([n for n in sizes if n <= ALIGNED_OTS], default=0)
        return found | {"ots": optimal(*self._ends.apply_to_states(ends[:, :n])) if n else None}

    def state(self, l: int, x: Float[Tensor, "n *state"]) -> Float[Tensor, "n *state"]:
        """x_l with its units permuted, at mean norm 1."""
        return x.index_select(1, self._order[l]) * unitwise(self._scales[l], x)

    def back(self, l: int, z: Float[Tensor, "n *state"]) -> Float[Tensor, "n *state"]:
        """The x_l that `state` takes to z."""
        return (z / unitwise(self._scales[l], z)).index_select(1, self._inverse[l])

    def matched(self, l: int, before: Float[Tensor, "n *state"]) -> Float[Tensor, "n *state"]:
        """x_{l−1} with its units named and scaled as in x_l."""
        return self.back(l, self.state(l - 1, before))

    def seen(self, blocks: Iterable[Map]) -> list[Map]:
        """The blocks as maps from gauge to gauge."""

        def named(l: int, block: Map) -> Map:
            return lambda z: self.state(l + 1, block(self.back(l, z)))

        return [named(l, block) for l, block in enumerate(blocks)]


def optimal(x: Float[Tensor, "n *state"], y: Float[Tensor, "n *state"]) -> dict[str, Any]:
    """OTS with its bounds."""
    score = asdict(transport.optimal_transport_score(x, y))
    return {key: score[key] for key in ("n", "share", "share_lower", "share_upper", "cost_ratio", "certified")}


def unitwise(factors: Float[Tensor, "units"], x: Tensor) -> Tensor:
    """Factors of the units, shaped to broadcast over states."""
    return factors.view(-1, *[1] * (x.ndim - 2))


def _line_shape(track: tracks.Track) -> dict[str, Any]:
    scores = tracks.Accumulator()
    scores.update(track)
    found = scores.summary()
    return {key: found[key] for key in ("lsr_mean", "lsr_median", "lss_mean", "lss_median", "segment_shares")}
