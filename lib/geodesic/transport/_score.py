"""The optimal transport score of a map, and what is read off the same matrix. Used wherever a chapter reports a score.

The score is the share of points that an optimal assignment leaves with their own image, σ(i) = i (paper, Eq. 47).

Source: arXiv:2102.09235; cyclical monotonicity (e.g. Villani, Topics in Optimal Transportation, ch. 2).

| symbol | identifier  | shape  | meaning                                                    |
|--------|-------------|--------|------------------------------------------------------------|
| x, y   | x, y        | (n, d) | points and their images; trailing axes are flattened       |
| σ      | permutation | (n,)   | x_i is sent to y_σ(i) by the optimal assignment            |
| m      | cross       | (n, n) | −2⟨x_i, y_j⟩                                               |
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from geodesic.transport import _cost
from geodesic.transport._assign import (
    DENSE_BELOW,
    Assignment,
    Points,
    available_memory,
    check_fits,
    check_memory,
    mean_cost,
    solve,
    take_clouds,
)

_MOST_DIFFERENCES = 2**28  # coordinates looked at again for the monotone share, a second or two


@dataclass(frozen=True)
class Score:
    """How close a map x_i → y_i is to the optimal one on n points. See `optimal_transport_score`."""

    share: float  # in [share_lower, share_upper]; the paper's OTS
    share_lower: float
    share_upper: float
    cost_ratio: float  # W₂² / identity cost, in [0, 1]
    monotone_share: float  # of the pairs i < j with ⟨x_i − x_j, y_i − y_j⟩ ≥ 0
    w2_squared: float  # mean over points
    identity_cost: float  # (1/n) Σ |x_i − y_i|²
    n: int
    certified: bool
    gap: float


def optimal_transport_score(x: Points, y: Points, *, assignment: Assignment | None = None) -> Score:
    """Score the map x_i → y_i against the optimal one: OTS = (1/n) #{i : σ(i) = i} (paper, Eq. 47), and companions.

    Ties can make σ, and with it the share, non-unique. No optimal assignment uses a pair whose slack exceeds the excess
    of σ; what is left is looked at with 106 bits, and in groups of up to seven points in whole numbers. Then

    - `share_upper` counts the points that some optimal assignment may fix;
    - `share_lower` counts those that every optimal assignment fixes;
    - `share` is that of an optimal assignment with the most fixed points: exactly 1 if the identity is optimal.

    Without ties the three agree. [share_lower, share_upper] contains the share of every optimal assignment, always; on
    up to seven points all three are exact. With more ties than are looked at one by one (over 64 a point) an excess of
    3e-10 of the spread is accepted, no point counts as fixed by every optimal assignment, and `share` is that of one
    so found.

    Args:
        x: n points, as for `assign`.
        y: their images.
        assignment: `assign(x, y)`, if known; the product is then computed once more for `monotone_share`.

    Raises:
        ValueError: as `assign`; or an assignment of other clouds.
    """
    if assignment is None:
        assignment, x, y, cost = solve(x, y)
    else:
        x, y = take_clouds(x, y)
        cost = None
        check_fits(assignment, x, y)
    n = len(x)
    identity = mean_cost(x, y, torch.arange(n, device=x.device))
    fixed = assignment.permutation.cpu() == torch.arange(n)
    group, fixable = assignment.tie_group.cpu(), assignment.fixable.cpu()
    alone = torch.bincount(group, minlength=n)[group] == 1
    lower, share, upper = (z.double().mean().item() for z in (fixed & alone, fixed, fixed | fixable))
    return Score(
        share=share,
        share_lower=lower,
        share_upper=upper,
        cost_ratio=min(assignment.cost / identity, 1.0) if identity > 0 else 1.0,
        monotone_share=_monotone_share(x, y, cost),
        w2_squared=assignment.cost,
        identity_cost=identity,
        n=n,
        certified=assignment.certified,
        gap=assignment.gap,
    )


def _monotone_share(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], cost: _cost.SplitCost | None) -> float:
    """Share of the pairs i < j with ⟨x_i − x_j, y_i − y_j⟩ ≥ 0, necessary for the identity to be optimal. In [0, 1].

    In terms of m_ij = −2⟨x_i, y_j⟩ the product is (m_ij + m_ji − m_ii − m_jj) / 2. Pairs where that drowns in its
    rounding are looked at again, in float64, from the differences. If they are too many for that, the matrix is made in
    float64, and what is still undecided there counts as zero. A single point has no pairs: the share is 1. O(n² d).
    """
    n, d = x.shape
    if n == 1:
        return 1.0
    sure = hidden = 0
    for dtype in (torch.float64,) if n <= DENSE_BELOW else (torch.float32, torch.float64):
        if cost is None or cost.cross.dtype != dtype:
            cost = None  # before there is a second
            check_memory(n, d, dtype, x.device, available_memory(x.device))
            cost = _cost.split_cost(x, y, dtype)
        sure, hidden, pairs = _count_monotone(cost, _MOST_DIFFERENCES // d)
        if pairs is not None:
            return (sure + _count_exactly(x, y, cost.order, pairs)) / (n * (n - 1) / 2)
    return (sure + hidden) / (n * (n - 1) / 2)


def _count_monotone(cost: _cost.SplitCost, most: int) -> tuple[int, int, Int64[Tensor, " k"] | None]:
    """Pairs i < j with a positive product, and with one that rounding hides: two counts, and the latter unless many."""
    n, sure, hidden, pairs = cost.n, 0, 0, []
    own, error = cost.cross.diagonal(), 8 * cost.unit_roundoff * (cost.x_squares + cost.y_squares)
    error = error.to(own.dtype)
    for rows in cost.tiles():
        product = cost.cross[rows] + cost.cross[:, rows].T
        product.sub_(own[rows, None] + own)
        doubt = error[rows, None] + error
        above, near = int((product > doubt).sum()), product.abs_() <= doubt
        sure, hidden = sure + above, hidden + int(near.sum())
        if hidden <= 2 * most + n:
            keys = near.flatten().nonzero()[:, 0] + rows.start * n
            pairs.append(keys[keys // n < keys % n])
    few = hidden <= 2 * most + n
    return sure // 2, (hidden - n) // 2, torch.cat(pairs) if few else None


def _count_exactly(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], order: Int64[Tensor, " n"], pairs: Int64[Tensor, " k"]
) -> int:
    """How many of these pairs have ⟨x_i − x_j, y_i − y_j⟩ ≥ 0, differences in float64 first."""
    n, d, scale, count = *x.shape, _cost.scale(x, y), 0
    for some in pairs.split(max(1, _cost.TILE[x.device.type] // 8 // d)):
        i, j = order[some // n], order[some % n]
        dx, dy = (z[i].double().mul_(scale) - z[j].double().mul_(scale) for z in (x, y))
        count += int((torch.linalg.vecdot(dx, dy) >= 0).sum())
    return count
