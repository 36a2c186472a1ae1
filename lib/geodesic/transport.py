"""Exact optimal assignment of two clouds, with a certificate, and the scores read off it.

W₂² of the empirical measures of n points is an assignment problem, min over permutations σ of (1/n) Σ |x_i − y_σ(i)|²
(paper, Eqs. 45–46), and the optimal transport score is the share of points with σ(i) = i (Eq. 47). Used by
book/setup.md and by every chapter that reports a score. All costs here are squared distances, means over points.

Source: arXiv:2102.09235; linear programming duality (e.g. Peyré & Cuturi, Computational Optimal Transport, ch. 3).

| symbol | identifier  | shape  | meaning                                                    |
|--------|-------------|--------|------------------------------------------------------------|
| x, y   | x, y        | (n, d) | the clouds; trailing axes are flattened                    |
| σ      | permutation | (n,)   | x_i is sent to y_σ(i)                                      |
| u, v   | u, v        | (n,)   | potentials: u_i + v_j ≤ |x_i − y_j|² for all i, j          |
|        | slack       | scalar | |x_i − y_j|² − u_i − v_j ≥ 0, zero on every optimal pair   |
"""

import bisect
import os
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from geodesic import _annealing, _assignment, _split_cost, devices

__all__ = [
    "Assignment",
    "Score",
    "assign",
    "displacement_interpolation",
    "optimal_transport_score",
    "w2_squared",
]

_DENSE_BELOW = 256  # up to here all n² arcs go to a dense solver: faster than choosing among them
_LARGEST = 1e150  # coordinate whose square float64 holds with room to spare
GAP = 1e-9  # largest relative distance between cost and lower bound that is returned


@dataclass(frozen=True)
class Assignment:
    """An optimal assignment and its proof.

    By duality every permutation costs at least `lower_bound` = mean(u) + mean(v), because u_i + v_j ≤ |x_i − y_j|² for
    all pairs; the one given costs `cost`. The two agree to 1e-9 of the cost, or to the rounding of the coordinates.
    """

    permutation: Int64[Tensor, " n"]  # x_i → y_permutation[i]; of all optimal ones, one that fixes the most points
    u: Float64[Tensor, " n"]
    v: Float64[Tensor, " n"]
    cost: float  # W₂², mean over points
    lower_bound: float  # certified, mean over points, never negative
    tied_arcs: int  # pairs (i, j), j ≠ σ(i), that other optimal assignments use (at most so many if tolerance > 0)
    tie_group: Int64[Tensor, " n"]  # points of one group may exchange partners at no cost
    tolerance: float  # slack beyond float64 rounding up to which a pair counts as tied; 0 unless ties are too many

    @property
    def gap(self) -> float:
        """(cost − lower bound) / cost, in [0, 1]; 0 where the cost is 0."""
        return max(self.cost - self.lower_bound, 0.0) / self.cost if self.cost > 0 else 0.0

    @property
    def certified(self) -> bool:
        """Whether cost and lower bound agree to 1e-9 of the cost or to the rounding of the coordinates."""
        rounding = _assignment.rounding(self.cost, self.u, self.v).mean().item()
        return self.cost - self.lower_bound <= GAP * self.cost + rounding


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


def _available_memory(device: torch.device) -> float:
    """Three quarters of the bytes that are free on the device."""
    if device.type == "cuda":
        return 0.75 * torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return 0.75 * 1024 * float(fields["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _clouds(x: Tensor, y: Tensor, device: torch.device) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Check, flatten and move the clouds."""
    if x.shape != y.shape or x.numel() == 0:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(
            f"x and y must be clouds of one non-empty shape (n, ...), got {shapes}; pass as many images as points"
        )
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    x, y = (z.detach().reshape(len(z), -1).to(device, dtype) for z in (x, y))
    for name, z in (("x", x), ("y", y)):
        lowest, highest = z.aminmax()
        if not max(highest.item(), -lowest.item()) < _LARGEST:
            bad = int((~(z.abs() < _LARGEST)).any(1).sum())
            raise ValueError(
                f"{name} has NaN, infinite or overflowing coordinates in {bad} of {len(z)} points; drop them"
            )
    return x, y


def _check_memory(n: int, d: int, dtype: torch.dtype, device: torch.device, memory: int | float) -> None:
    """Refuse if there is no room for an n × n matrix, with it a prepared cloud or a sparse kernel, and the tiles."""
    item = dtype.itemsize

    def needed(m: int) -> int:
        tiles = item * (8 * _split_cost.TILE[device.type] + _split_cost.BLOCK)
        return item * m * m + max(item * m * d, _annealing.sparse_bytes(m)) + tiles

    if n > _DENSE_BELOW and needed(n) > memory:
        fits = bisect.bisect_right(range(1, n), memory, key=needed)
        raise ValueError(
            f"{n} points of dimension {d} need {needed(n) / 2**30:.1f} GiB in float{8 * item}, allowed are "
            f"{memory / 2**30:.1f} GiB: pass memory= if there is more, or at most {fits} points"
        )


def _solve(
    x: Tensor,
    y: Tensor,
    u: Tensor | None = None,
    v: Tensor | None = None,
    device: str | torch.device | None = None,
    memory: int | float | None = None,
    dense_below: int = _DENSE_BELOW,
) -> tuple[Assignment, _split_cost.SplitCost]:
    """Check the input, solve in float32 and, where that cannot tell near-ties apart, in float64."""
    home, place = x.device, devices.find(x.device if device is None else device)
    x, y = _clouds(x, y, place)
    n, d = x.shape
    for name, z in (("u", u), ("v", v)):
        if z is not None and (z.shape != (n,) or not z.isfinite().all()):
            raise ValueError(
                f"{name} must hold {n} finite potentials, got shape {tuple(z.shape)}; leave it out to start cold"
            )
    u, v = (None if z is None else z.detach().to(place, torch.float64) for z in (u, v))
    memory = _available_memory(place) if memory is None else memory
    dense = n <= dense_below
    for dtype in (torch.float64,) if dense else (torch.float32, torch.float64):
        _check_memory(n, d, dtype, place, memory)
        try:
            found, cost = _assignment.solve(x, y, dtype, u, v, dense=dense)
        except _assignment.Crowded as crowded:
            v = crowded.v
            continue
        return _in_units_of_the_clouds(found, cost.scale, home), cost
    raise RuntimeError(f"more ties among the {n} points than can be kept; merge duplicate points, or score fewer")


def _in_units_of_the_clouds(found: _assignment.Certified, scale: float, home: torch.device) -> Assignment:
    """Undo the scaling; refuse what is not certified."""
    unit = scale**-2
    u, v = (torch.from_numpy(z).to(home) * unit for z in (found.u, found.v))
    result = Assignment(
        permutation=torch.from_numpy(found.sigma).to(home),
        u=u,
        v=v,
        cost=found.cost * unit,
        lower_bound=max((u + v).mean().item(), 0.0),
        tied_arcs=found.tied_arcs,
        tie_group=torch.from_numpy(found.tie_group).to(home),
        tolerance=found.tolerance * unit,
    )
    if not result.certified:
        raise RuntimeError(
            f"the assignment of {len(u)} points is proved optimal to a relative gap of {result.gap:.2e} only, "
            f"{GAP:.0e} is required (cost {result.cost:.12g}, lower bound {result.lower_bound:.12g}); "
            "pass the coordinates as float64"
        )
    return result


def assign(
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, "m ..."],
    *,
    u: Shaped[Tensor, "..."] | None = None,
    v: Shaped[Tensor, "..."] | None = None,
    device: str | torch.device | None = None,
    memory: int | float | None = None,
    _dense_below: int = _DENSE_BELOW,
) -> Assignment:
    """Solve min over permutations σ of (1/n) Σ_i |x_i − y_σ(i)|² exactly, with a dual certificate.

    Up to 256 points a dense solver sees every arc. Beyond, Sinkhorn potentials choose some 25 arcs a row, a sparse
    solver decides among them, all n² arcs are priced, and those whose slack float32 cannot tell from zero are
    recomputed in float64. O(n² d) operations for the product, about n² for the rest.

    Args:
        x: n points, float32 or float64 (half precisions are widened, which is exact); trailing axes are flattened.
        y: as many points of the same shape.
        u: potentials of a neighbouring problem (another epoch, layer or λ), in the unit of the cost; v goes first.
        v: the same on the side of y, as in an earlier `Assignment`. Good ones save the annealing, bad ones cost time.
        device: where to multiply; that of x by default.
        memory: bytes that may be used beyond the clouds, by default three quarters of what is free. About 4 n² + 4 n d
            are needed, 5 n² where d is small; twice that where near-ties ask for float64.

    Returns:
        The assignment, on the device of x.

    Raises:
        ValueError: clouds of different shape, empty or not finite; potentials of the wrong length; a device that is not
            there; clouds too large for the memory.
        RuntimeError: cost and lower bound do not meet.
        ModuleNotFoundError: more than 5000 points without lapx.
    """
    return _solve(x, y, u, v, device, memory, _dense_below)[0]


def w2_squared(x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."]) -> float:
    """W₂² of the two empirical measures: the mean over points of the squared distance under the optimal assignment."""
    return assign(x, y).cost


def optimal_transport_score(
    x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."], *, assignment: Assignment | None = None
) -> Score:
    """Score the map x_i → y_i against the optimal one: OTS = (1/n) #{i : σ(i) = i} (paper, Eq. 47), and companions.

    Ties can make σ, and with it the share, non-unique. A pair is *tight* if its slack under the certified potentials is
    zero to float64 rounding (2⁻⁴⁴ of |x_i − y_j|² + |u_i| + |v_j|), and an assignment is optimal iff all its pairs are
    tight. Then

    - `share_upper` counts the points that some optimal assignment fixes: (i, i) is tight and on a cycle of tight pairs;
    - `share_lower` counts those that every optimal assignment fixes;
    - `share` is that of an optimal assignment with the most fixed points: exactly 1 if the identity is optimal.

    Without ties the three agree. With more ties than are looked at one by one (over 64 a point) the tolerance is
    3e-10 of the cost, no point counts as fixed by every optimal assignment, and `share` is that of the one found.

    Args:
        x: n points, as for `assign`.
        y: their images.
        assignment: `assign(x, y)`, if known; the product is then computed once more for `monotone_share`.

    Raises:
        ValueError: as `assign`; or an assignment of another number of points.
    """
    n = len(x)
    if assignment is None:
        assignment, cost = _solve(x, y)
    elif len(assignment.permutation) != n:
        other = len(assignment.permutation)
        raise ValueError(
            f"the assignment is of {other} points and the clouds have {n}; pass assign(x, y) or leave it out"
        )
    else:
        cost = _split(x, y)
    own = torch.from_numpy(_own_costs(x, y)).to(assignment.u)
    identity = own.mean().item()
    fixed, lower, upper = _fixed_points(assignment, own)
    return Score(
        share=fixed,
        share_lower=lower,
        share_upper=upper,
        cost_ratio=min(assignment.cost / identity, 1.0) if identity > 0 else 1.0,
        monotone_share=_monotone_share(cost),
        w2_squared=assignment.cost,
        identity_cost=identity,
        n=n,
        certified=assignment.certified,
        gap=assignment.gap,
    )


def _split(x: Tensor, y: Tensor) -> _split_cost.SplitCost:
    x, y = _clouds(x, y, devices.find(x.device))
    dtype = torch.float64 if len(x) <= _DENSE_BELOW else torch.float32
    _check_memory(*x.shape, dtype, x.device, _available_memory(x.device))
    return _split_cost.split_cost(x, y, dtype)


def _own_costs(x: Tensor, y: Tensor) -> Float64[np.ndarray, " n"]:
    """|x_i − y_i|² in float64."""
    x, y = _clouds(x, y, x.device)
    return _split_cost.exact_costs(x, y, np.arange(len(x)) * (len(x) + 1), 1.0)


def _fixed_points(assignment: Assignment, own: Float64[Tensor, " n"]) -> tuple[float, float, float]:
    """Shares of the points fixed by σ, by every and by some optimal assignment."""
    sigma, group, u, v = assignment.permutation, assignment.tie_group, assignment.u, assignment.v
    fixed = sigma == torch.arange(len(sigma), device=sigma.device)
    alone = torch.bincount(group, minlength=len(group))[group] == 1
    tight = own - u - v <= assignment.tolerance + _assignment.rounding(own, u, v)
    some = fixed | (tight & (group == group[sigma.argsort()]))
    return tuple(z.double().mean().item() for z in (fixed, fixed & alone, some))


def _monotone_share(cost: _split_cost.SplitCost) -> float:
    """Share of the pairs i < j with ⟨x_i − x_j, y_i − y_j⟩ ≥ 0, necessary for the identity to be optimal. In [0, 1].

    In terms of m_ij = −2⟨x_i, y_j⟩ the product is (m_ij + m_ji − m_ii − m_jj) / 2; values within its rounding count as
    zero. A single point has no pairs: the share is 1. O(n²) given m.
    """
    n = cost.n
    if n == 1:
        return 1.0
    rounding = 8 * cost.unit_roundoff * (cost.x_squares + cost.y_squares)
    own = (cost.cross.diagonal() - rounding).to(cost.cross.dtype)
    count = 0
    for rows in cost.tiles():
        product = cost.cross[rows] + cost.cross[:, rows].T
        count += int((product.sub_(own).sub_(own[rows, None]) >= 0).sum())
    return (count - n) / (n * (n - 1))


def displacement_interpolation(
    x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."], t: int | float, *, assignment: Assignment | None = None
) -> Float[Tensor, "n ..."]:
    """Points at time t of the geodesic from x to y: (1 − t) x_i + t y_σ(i) (paper, Eq. 5). W₂(μ_s, μ_t) = |s − t| W₂.

    Args:
        x: n points, shape kept.
        y: as many.
        t: time in [0, 1].
        assignment: `assign(x, y)`, if known already.

    Raises:
        ValueError: t outside [0, 1]; otherwise as `assign`.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t = {t} lies outside [0, 1]; a geodesic is not defined beyond its ends")
    assignment = assign(x, y) if assignment is None else assignment
    return (1 - t) * x + t * y[assignment.permutation.to(y.device)]
