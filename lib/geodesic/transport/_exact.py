"""Squared distances of single pairs, and sums of numbers held in two parts, each with a proved bound of its error.

What `_certificate` reckons with. A number "in two parts" is an unevaluated sum high + low of two float64, some 106
bits: enough to subtract potentials of 1e16 from costs of 1e16 and to be left with the slack between them.

    float64_costs         sums of squared differences; relative error (d + 3) 2⁻⁵³
    double_double_costs   the same in two parts, after a common shift of y; relative error d 2⁻¹⁰⁴
    rational_costs        whole numbers, no error at all: for a handful of points
    slack                 c − u − v of costs and potentials in two parts
    add                   potentials in two parts and a float64

h = 2⁻⁵³ throughout. Bounds are derived in book/setup.md.

Sources: Dekker, Numerische Mathematik 18 (1971), and Knuth, The Art of Computer Programming 2, 4.2.2 (error-free sums
and products); Higham, Accuracy and Stability of Numerical Algorithms, ch. 3 (error of sums of products).
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from geodesic.transport._cost import TILE, tiles

Reals = TypeVar("Reals", Float64[np.ndarray, "..."], Float64[Tensor, "..."])

_H = 2.0**-53
_SUBNORMAL = 2.0**-1020  # more than any operation on numbers below the normal range may lose
_ROOM = 2.0**-400  # of the clouds' reach: whatever coordinates are larger, products of their differences stay normal
_SPLITTER = 2.0**27 + 1


@dataclass(frozen=True)
class Clouds:
    """The points as they came, the order in which the solver counts them, and the power of two that scales them."""

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "n d"]
    order: Int64[Tensor, " n"]
    scale: float

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.x)

    def pairs(
        self, row: Int64[Tensor, " k"], column: Int64[Tensor, " k"]
    ) -> tuple[Float64[Tensor, "k d"], Float64[Tensor, "k d"]]:
        """The scaled points of some pairs, exact in float64."""
        x, y = self.x[self.order[row]], self.y[self.order[column]]
        return x.double().mul_(self.scale), y.double().mul_(self.scale)

    def underflow(self) -> float:
        """What a squared distance may lose below the normal range; nothing unless coordinates differ by 1e120."""
        if self.x.dtype == torch.float32 and self.y.dtype == torch.float32:
            return 0.0
        for z in (self.x, self.y):
            for tile in tiles(len(z), max(1, TILE[z.device.type] // z.shape[1])):
                size = z[tile].double().abs().mul_(self.scale)
                if ((size < _ROOM) & (size > 0)).any():
                    return (z.shape[1] + 4) * _SUBNORMAL
        return 0.0


@dataclass(frozen=True)
class Costs:
    """Squared distances of some arcs: |true − (high + low)| ≤ error."""

    high: Float64[np.ndarray, " k"]
    low: Float64[np.ndarray, " k"]
    error: Float64[np.ndarray, " k"]

    def __getitem__(self, arcs: np.ndarray) -> "Costs":
        return Costs(self.high[arcs], self.low[arcs], self.error[arcs])


def float64_costs(clouds: Clouds, arcs: Int64[np.ndarray, " k"], floor: float) -> Costs:
    """scale² |x_i − y_j|² in float64, differences first: no cancellation, whatever the offset of the clouds. O(k d).

    Each term is (x − y)² (1 + δ)³, their sum has d − 1 roundings more at most, in whatever order: as no term is
    negative the relative error is below (d + 3) h.
    """
    d = clouds.x.shape[1]
    row, column = (torch.from_numpy(z).to(clouds.x.device) for z in np.divmod(arcs, clouds.n))
    out = torch.empty(len(arcs), dtype=torch.float64, device=clouds.x.device)
    for tile in tiles(len(arcs), max(1, TILE[clouds.x.device.type] // 8 // d)):
        difference = clouds.x[clouds.order[row[tile]]].double()  # exact before the scale as after
        difference.sub_(clouds.y[clouds.order[column[tile]]]).mul_(clouds.scale)
        out[tile] = torch.linalg.vecdot(difference, difference)
    high = out.cpu().numpy()
    return Costs(high, np.zeros_like(high), (d + 4) * _H * high + floor)


def two_sum(a: Reals, b: Reals) -> tuple[Reals, Reals]:
    """The sum a + b rounded, and what the rounding left out, exactly (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _square(a: Float64[Tensor, "..."]) -> tuple[Float64[Tensor, "..."], Float64[Tensor, "..."]]:
    """a² rounded, and what the rounding left out, exactly (Dekker)."""
    product, big = a * a, a * _SPLITTER
    upper = big - (big - a)
    lower = a - upper
    return product, ((upper * upper - product) + 2 * upper * lower) + lower * lower


def double_double_costs(
    clouds: Clouds, arcs: Int64[np.ndarray, " k"], shift: Float64[Tensor, " d"], floor: float
) -> Costs:
    """scale² |x_i − y_j − shift|² in two parts. O(k d), some forty operations a coordinate.

    The difference is exact in two parts before the shift, and errs by h² (|x − y| + |r|) after it, r being the result.
    """
    d, device = clouds.x.shape[1], clouds.x.device
    row, column = (torch.from_numpy(z).to(device) for z in np.divmod(arcs, clouds.n))
    out = torch.empty(2, len(arcs), dtype=torch.float64, device=device)
    shifted = bool(shift.any())
    for tile in tiles(len(arcs), max(1, TILE[device.type] // 8 // d)):
        x, y = clouds.pairs(row[tile], column[tile])
        high, low = two_sum(x, -y)
        if shifted:
            high, more = two_sum(high, -shift.expand_as(high))
            low = low + more
        high, low = two_sum(high, low)
        high, rest = _square(high), 2 * high * low
        low = (high[1] + rest) + low * low
        high = high[0]
        while high.shape[1] > 1:
            half = high.shape[1] // 2
            total, lost = two_sum(high[:, :half], high[:, half : 2 * half])
            lost = lost + (low[:, :half] + low[:, half : 2 * half])
            high, low = torch.cat([total, high[:, 2 * half :]], 1), torch.cat([lost, low[:, 2 * half :]], 1)
        out[0, tile], out[1, tile] = two_sum(high[:, 0], low[:, 0])
    high, low = out.cpu().numpy()
    error = (4 * d + 200) * 2.0**-106 * high + floor
    if shifted:
        way = math.sqrt(float(shift @ shift))
        error += 2.0**-103 * np.sqrt(high) * (np.sqrt(high) + way)
    return Costs(high, low, error)


def rational_costs(x: Float64[np.ndarray, "k d"], y: Float64[np.ndarray, "k d"]) -> np.ndarray:
    """|x_i − y_j|² as whole numbers in one common unit: Python's, or int64 where that holds k of them."""
    mantissa, exponent = np.frexp(np.stack([x, y]))
    whole = (mantissa * 2.0**53).astype(np.int64).astype(object)
    lowest = int(exponent[mantissa != 0].min(initial=0))
    shift = np.where(mantissa != 0, exponent - lowest, 0).astype(object)
    points = whole << shift
    divisor = math.gcd(*points.ravel().tolist()) or 1
    points //= divisor
    difference = points[0][:, None] - points[1][None]
    costs = (difference * difference).sum(2)
    return costs.astype(np.int64) if int(costs.max()) * len(x) < 2**62 else costs


def slack(
    costs: Costs, u: Float64[np.ndarray, "2 k"], v: Float64[np.ndarray, "2 k"]
) -> tuple[Float64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """The slack high + low − u − v rounded to float64, and a bound of that rounding; the costs' own error is not in it.

    The high parts add up without error but for three remainders, which are of the size of the low parts, at most h of
    the terms; the sum of those errs by a few h of that, and the last addition by h of the result.
    """
    first, lost = two_sum(costs.high, -u[0])
    second, more = two_sum(first, -v[0])
    result = second + ((costs.low - u[1] - v[1]) + (lost + more))
    return result, 2.0**-52 * np.abs(result) + 2.0**-100 * (costs.high + np.abs(u[0]) + np.abs(v[0]))


def add(u: Float64[np.ndarray, "2 n"], step: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, "2 n"]:
    """The sum u + step in two parts; relative error 2⁻¹⁰⁴ of |u| + |step|."""
    high, low = two_sum(u[0], step)
    return np.stack(two_sum(high, low + u[1]))
