"""All n² squared distances from one matrix product, and what is read off them row by row.

The ground floor of the solver behind `geodesic.transport`; `_arcs`, `_annealing` and `_assignment` stand on it. The
cost splits, c_ij = |x_i|² + |y_j|² + m_ij with m_ij = −2⟨x_i, y_j⟩, and the squares belong to row and column: the
assignment problem is that of m alone, and its potentials are those of c less the squares.

    split_cost        m by row tiles, with a rigorous bound of its error
    row_transform     the best u for a given v;  column_transform: the best v for a given u

| symbol | identifier    | shape  | meaning                                                          |
|--------|---------------|--------|------------------------------------------------------------------|
| m      | cross         | (n, n) | −2⟨x_i, y_j⟩ of the centred and scaled clouds, working precision |
| u, v   | u, v          | (n,)   | potentials of m, working precision; slack is m_ij − u_i − v_j    |
| h      | unit_roundoff | scalar | 2⁻²⁴ or 2⁻⁵³                                                     |

Source: Higham, Accuracy and Stability of Numerical Algorithms, ch. 3 (error of inner products).
"""

import math
import threading
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
_MEDIAN_OF = 64  # points of each cloud
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    offset: float  # |x̄ − ȳ|² of the scaled clouds, common to all permutations; an upper bound
    order: Int64[Tensor, " n"]  # rows and columns are the points in this order

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
        """The temperature at which slacks drown in their rounding; of most points, since outliers have larger ones."""
        usual = (self.x_squares + self.y_squares).median().item()
        return max(16 * self.unit_roundoff * usual, 2.0**30 * torch.finfo(self.cross.dtype).tiny)

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
        other constants cover the roundings of the centred coordinates, of the squares and of the subtractions, and what
        products of small numbers lose below the normal range.
        """
        h, dtype = self.unit_roundoff, self.cross.dtype
        factor, floor = math.sqrt(2 * (self.dimension + 8) * h), 16 * (self.dimension + 8) * torch.finfo(dtype).tiny
        p, q = factor * self.x_squares.sqrt(), factor * self.y_squares.sqrt()
        r, t = 8 * h * (self.x_squares + u.abs()) + floor, 8 * h * (self.y_squares + v.abs()) + floor
        return p.to(dtype), q.to(dtype), r.to(dtype), t.to(dtype)


_flag, _holders, _found = threading.Lock(), 0, "highest"


@contextmanager
def _true_float32() -> Iterator[None]:
    """Products in full precision whatever the caller's setting, which is one for all threads: the last out restores."""
    global _holders, _found
    with _flag:
        if not _holders:
            _found = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        _holders += 1
    try:
        yield
    finally:
        with _flag:
            _holders -= 1
            if not _holders:
                torch.set_float32_matmul_precision(_found)


def scale(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> float:
    """The power of two that brings all differences of coordinates below 1; multiplying by it is exact."""
    lowest, highest = torch.stack([torch.stack(z.aminmax()) for z in (x, y)]).double().cpu().unbind(1)
    reach = (highest.max() - lowest.min()).item()
    return 2.0 ** min(-math.frexp(reach)[1], 500)


def _centre(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """One shift for both clouds: distances stay, cancellation goes.

    Medians of some points spread over the clouds: of a mean, an outlier would leave the others nothing but rounding.
    """
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(len(x)))[:_MEDIAN_OF].to(x.device)
    return x[some].median(0).values / 2 + y[some].median(0).values / 2


def _prepare(
    z: Float[Tensor, "m d"],
    order: Int64[Tensor, " k"],
    centre: Float[Tensor, " d"],
    scale: float,
    out: Float[Tensor, "k d"],
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, " d"]]:
    """Write scale (z − centre) to `out` in that order, by tiles that stay in cache.

    Returns: the squared lengths, and the sum of the points.
    """
    wide, size = torch.promote_types(z.dtype, out.dtype), max(1, TILE[z.device.type] // 4 // z.shape[1])
    squares = torch.empty(len(order), dtype=torch.float64, device=z.device)
    total = torch.zeros(z.shape[1], dtype=torch.float64, device=z.device)
    for tile in tiles(len(order), size):
        out[tile] = z[order[tile]].to(wide).sub_(centre).mul_(scale)
        squares[tile] = torch.linalg.vector_norm(out[tile], dim=1, dtype=torch.float64).square_()
        total += out[tile].sum(0)
    return squares, total


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

    On AMD's processors oneDNN multiplies twice as fast as MKL, on Intel's a little slower. It is asked for by name: the
    flag that lets it multiply belongs to the caller, and to all threads. What it returns is checked.
    """
    if left.dtype == torch.float32 and left.device.type == "cpu" and _ONEDNN and "Intel" not in devices.processor():
        for rows in tiles(len(left), max(1, BLOCK // len(right))):
            out[rows] = torch.ops.mkldnn._linear_pointwise(left[rows], right, None, "none", [], "")
        if _is_float32_product(left, right, out):
            return
    with _true_float32():
        torch.mm(left, right.T, out=out)


def split_cost(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], dtype: torch.dtype, order: Int64[Tensor, " n"] | None = None
) -> SplitCost:
    """Centre, scale and multiply the clouds. Invariant: `SplitCost.error_factors` bounds the error of every entry.

    Args:
        x: the points.
        y: their images.
        dtype: working precision.
        order: in which rows and columns are taken. A random one makes every stride of them a sample.

    O(n² d) operations; n² numbers and one prepared cloud in memory.
    """
    n, d = x.shape
    order = torch.arange(n, device=x.device) if order is None else order
    centre, unit = _centre(x, y), scale(x, y)
    rows = max(1, min(n, BLOCK // d))
    cross = torch.empty(n, n, dtype=dtype, device=x.device)
    left = torch.empty(rows, d, dtype=dtype, device=x.device)
    right = torch.empty(n, d, dtype=dtype, device=x.device)
    x_squares = torch.empty(n, dtype=torch.float64, device=x.device)
    y_squares, y_sum = _prepare(y, order, centre, unit, right)
    x_sum = torch.zeros_like(y_sum)
    for tile in tiles(n, rows):
        part = left[: tile.stop - tile.start]
        x_squares[tile], sums = _prepare(x, order[tile], centre, unit, part)
        x_sum += sums
        _multiply(part.mul_(-2), right, cross[tile])
    return SplitCost(cross, x_squares, y_squares, d, unit, _offset(x_sum, y_sum, x_squares, y_squares, dtype), order)


def _offset(
    x_sum: Float64[Tensor, " d"],
    y_sum: Float64[Tensor, " d"],
    x_squares: Float64[Tensor, " n"],
    y_squares: Float64[Tensor, " n"],
    dtype: torch.dtype,
) -> float:
    """An upper bound of |x̄ − ȳ|². A tile's sum errs by less than h times its rows times the sum of the sizes."""
    n, h = len(x_squares), torch.finfo(dtype).eps / 2
    rows = min(n, max(1, TILE[x_sum.device.type] // 4 // len(x_sum)))
    size = x_squares.mean().sqrt() + y_squares.mean().sqrt()
    return float(torch.linalg.vector_norm(x_sum - y_sum) / n + 2 * (rows + 4) * h * size) ** 2


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
