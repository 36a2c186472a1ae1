"""All n² squared distances from one matrix product, and what is read off them row by row.

The ground floor of the solver behind `geodesic.transport`; `_arcs`, `_annealing` and `_assignment` stand on it. The
cost splits, c_ij = |x_i|² + |y_j|² + m_ij with m_ij = −2⟨x_i, y_j⟩, and the squares belong to row and column: the
assignment problem is that of m alone, and its potentials are those of c less the squares.

    split_cost        m by row tiles, with a rigorous bound of its error
    exact_costs       single distances in float64
    row_transform     the best u for a given v;  column_transform: the best v for a given u

| symbol | identifier    | shape  | meaning                                                          |
|--------|---------------|--------|------------------------------------------------------------------|
| m      | cross         | (n, n) | −2⟨x_i, y_j⟩ of the centred and scaled clouds, working precision |
| u, v   | u, v          | (n,)   | potentials of m, working precision; slack is m_ij − u_i − v_j    |
| h      | unit_roundoff | scalar | 2⁻²⁴ or 2⁻⁵³                                                     |

Source: Higham, Accuracy and Stability of Numerical Algorithms, ch. 3 (error of inner products).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from geodesic import devices

TILE = {"cpu": 2**20, "cuda": 2**26}  # elements of a row tile: a processor keeps 4 MiB of float32 in its cache
BLOCK = 2**25  # elements of the rows multiplied at a time


def tiles(n: int, rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows` that cover range(n)."""
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


@dataclass(frozen=True)
class SplitCost:
    """c_ij ≈ x_squares_i + y_squares_j + cross_ij of the clouds after centring and multiplication by `scale`."""

    cross: Float[Tensor, "n n"]
    x_squares: Float64[Tensor, " n"]
    y_squares: Float64[Tensor, " n"]
    dimension: int
    scale: float  # a power of two: scaling is exact

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.cross)

    @property
    def unit_roundoff(self) -> float:
        """Half the distance from 1 to the next number of the working precision."""
        return torch.finfo(self.cross.dtype).eps / 2

    def tiles(self, stride: int = 1) -> Iterator[slice]:
        """The rows, or every so many-th, in tiles of bounded size.

        What a loop over them keeps goes into storage made before it: a small array kept from each tile would lie in the
        room that the tile leaves, and the heap grow to the size of the matrix.
        """
        whole = tiles(self.n, max(1, TILE[self.cross.device.type] // self.n) * stride)
        return (slice(rows.start, rows.stop, stride) for rows in whole)

    def slack(self, u: Float[Tensor, " n"], v: Float[Tensor, " n"], rows: slice) -> Float[Tensor, "rows n"]:
        """m_ij − u_i − v_j on some rows."""
        return torch.sub(self.cross[rows], v).sub_(u[rows, None])

    @property
    def coldest(self) -> float:
        """The temperature at which slacks drown in their rounding."""
        return 16 * self.unit_roundoff * (self.x_squares + self.y_squares).mean().item()

    @property
    def sampled(self) -> slice:
        """Some 500 rows, of which counts and means are taken."""
        return slice(None, None, max(1, self.n // 500))

    def arc_slack(
        self, u: Float[Tensor, " n"], v: Float[Tensor, " n"], arcs: Int64[np.ndarray, " k"]
    ) -> Float64[np.ndarray, " k"]:
        """m_ij − u_i − v_j on single arcs i·n + j, rounded as `slack` rounds."""
        row, column = (torch.from_numpy(z).to(u.device) for z in np.divmod(arcs, self.n))
        return (self.cross[row, column] - v[column] - u[row]).double().cpu().numpy()

    def error_factors(
        self, u: Float[Tensor, " n"], v: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Vectors p, q, r, t with |slack_ij as computed − its true value| ≤ p_i q_j + r_i + t_j.

        An inner product of length d errs by at most d h |x_i||y_j| to first order, in whatever order it is summed. The
        other constants cover the roundings of the centred coordinates, of the squares and of the subtractions.
        """
        h, dtype = self.unit_roundoff, self.cross.dtype
        factor = math.sqrt(2 * (self.dimension + 8) * h)
        p, q = factor * self.x_squares.sqrt(), factor * self.y_squares.sqrt()
        r, t = 6 * h * (self.x_squares + u.abs()), 6 * h * (self.y_squares + v.abs())
        return p.to(dtype), q.to(dtype), r.to(dtype), t.to(dtype)


@contextmanager
def _matmul_precision(level: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _centre_and_scale(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " d"], float]:
    """One shift for both clouds (distances stay, cancellation goes) and the power of two that brings them below 1."""
    lowest, highest = torch.stack([torch.stack(z.aminmax()) for z in (x, y)]).double().cpu().unbind(1)
    reach = (highest.max() - lowest.min()).item()
    return (x.mean(0) + y.mean(0)) / 2, 2.0 ** min(-math.frexp(reach)[1], 500)


def _prepare(
    z: Float[Tensor, "m d"], centre: Float[Tensor, " d"], scale: float, out: Float[Tensor, "m d"]
) -> Float64[Tensor, " m"]:
    """Write scale (z − centre) to `out` and return the squared lengths, by tiles that stay in cache."""
    wide = torch.promote_types(z.dtype, out.dtype)
    squares = torch.empty(len(z), dtype=torch.float64, device=z.device)
    for tile in tiles(len(z), max(1, TILE[z.device.type] // 4 // z.shape[1])):
        out[tile] = z[tile].to(wide).sub(centre).mul_(scale)
        squares[tile] = torch.linalg.vector_norm(out[tile], dim=1, dtype=torch.float64).square_()
    return squares


def _is_float32_product(
    left: Float[Tensor, "rows d"], right: Float[Tensor, "n d"], product: Float[Tensor, "rows n"]
) -> bool:
    """Compare a 64 × 64 sample with float64; bfloat16 and TF32 products miss this tolerance several times over."""
    i = torch.linspace(0, len(left) - 1, min(64, len(left))).long()
    j = torch.linspace(0, len(right) - 1, min(64, len(right))).long()
    a, b = left[i].double(), right[j].double()
    allowed = 2.0**-20 * a.norm(dim=1)[:, None] * b.norm(dim=1)
    return bool(((a @ b.T - product[i][:, j]).abs() <= allowed).all())


def _multiply(left: Float[Tensor, "rows d"], right: Float[Tensor, "n d"], out: Float[Tensor, "rows n"]) -> None:
    """Write left rightᵀ to `out`, in true float32 or float64.

    On a CPU the flag "medium" lets oneDNN multiply: twice as fast as MKL on AMD's processors, a little slower on
    Intel's, and in float32 on all that have no bfloat16 product. Where they have one, the result shows it and is
    computed again.
    """
    if left.dtype == torch.float32 and left.device.type == "cpu" and "Intel" not in devices.processor():
        with _matmul_precision("medium"):
            torch.mm(left, right.T, out=out)
        if _is_float32_product(left, right, out):
            return
    with _matmul_precision("highest"):
        torch.mm(left, right.T, out=out)


def split_cost(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], dtype: torch.dtype) -> SplitCost:
    """Centre, scale and multiply the clouds. Invariant: `SplitCost.error_factors` bounds the error of every entry.

    O(n² d) operations; n² numbers and one prepared cloud in memory.
    """
    n, d = x.shape
    centre, scale = _centre_and_scale(x, y)
    rows = max(1, min(n, BLOCK // d))
    cross = torch.empty(n, n, dtype=dtype, device=x.device)
    left = torch.empty(rows, d, dtype=dtype, device=x.device)
    right = torch.empty(n, d, dtype=dtype, device=x.device)
    x_squares = torch.empty(n, dtype=torch.float64, device=x.device)
    y_squares = _prepare(y, centre, scale, right)
    for tile in tiles(n, rows):
        part = left[: tile.stop - tile.start]
        x_squares[tile] = _prepare(x[tile], centre, scale, part)
        _multiply(part.mul_(-2), right, cross[tile])
    return SplitCost(cross, x_squares, y_squares, d, scale)


def exact_costs(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], arcs: Int64[np.ndarray, " k"], scale: float
) -> Float64[np.ndarray, " k"]:
    """scale² |x_i − y_j|² in float64, differences first: no cancellation, whatever the offset of the clouds. O(k d)."""
    row, column = (torch.from_numpy(z).to(x.device) for z in np.divmod(arcs, len(x)))
    out = torch.empty(len(arcs), dtype=torch.float64, device=x.device)
    for tile in tiles(len(arcs), max(1, TILE[x.device.type] // 8 // x.shape[1])):
        difference = x[row[tile]].double().sub_(y[column[tile]]).mul_(scale)
        out[tile] = torch.linalg.vecdot(difference, difference)
    return out.cpu().numpy()


def row_transform(cost: SplitCost, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """u_i = min_j (m_ij − v_j): the largest u for which (u, v) is feasible."""
    u = torch.empty_like(v)
    for rows in cost.tiles():
        torch.amin(torch.sub(cost.cross[rows], v), 1, out=u[rows])
    return u


def column_transform(cost: SplitCost, u: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """v_j = min_i (m_ij − u_i): the largest v for which (u, v) is feasible."""
    v = torch.full_like(u, math.inf)
    for rows in cost.tiles():
        v = v.minimum(torch.sub(cost.cross[rows], u[rows, None]).amin(0))
    return v
