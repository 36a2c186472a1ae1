"""Exact optimal assignment of two clouds, with a certificate, and the scores read off it.

W₂² of the empirical measures of n points is an assignment problem, min over permutations σ of (1/n) Σ |x_i − y_σ(i)|²
(paper, Eqs. 45–46), and the optimal transport score is the share of points with σ(i) = i (Eq. 47). Used by
book/assignment.md and by every chapter that reports a score. All costs here are squared distances, means over points.

Source: arXiv:2102.09235; linear programming duality (e.g. Peyré & Cuturi, Computational Optimal Transport, ch. 3).

| symbol | identifier  | shape  | meaning                                                        |
|--------|-------------|--------|----------------------------------------------------------------|
| x, y   | x, y        | (n, d) | the clouds; trailing axes are flattened                        |
| σ      | permutation | (n,)   | x_i is sent to y_σ(i)                                          |
| u, v   | u, v        | (n,)   | potentials, u_i + v_j ≤ \\|x_i − y_j\\|² for all i, j          |
| s_ij   | slack       | scalar | \\|x_i − y_j\\|² − u_i − v_j ≥ 0; zero on every optimal pair   |
"""

import math
import os
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from geodesic import _assignment

__all__ = [
    "Assignment",
    "Score",
    "assign",
    "displacement_interpolation",
    "optimal_transport_score",
    "w2_squared",
]

_DENSE_BELOW = 256  # up to here all n² arcs go to a dense solver: faster than choosing among them
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
    tied_arcs: int  # pairs (i, j), j ≠ σ(i), that another optimal assignment uses: 0 iff σ is unique
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


def _device(name: str | torch.device | None, x: Tensor) -> torch.device:
    if name is None:
        return x.device
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(name)!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices; "
                         "pass device='cpu' or leave it out")
    return device


def _clouds(x: Tensor, y: Tensor, device: torch.device) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Check, flatten and move the clouds."""
    if x.shape != y.shape or x.ndim < 1 or x.numel() == 0:
        raise ValueError(f"x and y must be clouds of the same, non-empty shape (n, ...), got {tuple(x.shape)} and {tuple(y.shape)}")
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    flat = []
    for name, z in (("x", x), ("y", y)):
        z = z.detach().reshape(len(z), -1).to(device, dtype)
        bad = int((~z.sum(1).isfinite()).sum()) if not z.sum().isfinite() else 0
        if bad:
            raise ValueError(f"{name} has NaN or infinite coordinates, or overflows, in {bad} of {len(z)} points; drop them first")
        flat.append(z)
    return flat[0], flat[1]


def _needed(n: int, d: int, item: int) -> float:
    """Bytes for the n × n matrix, one centred cloud and the tiles."""
    return item * n * (n + d) + 2**28


def _check_memory(n: int, d: int, item: int, memory: float) -> None:
    if n > _DENSE_BELOW and _needed(n, d, item) > memory:
        room = max(memory - 2**28, 0) / item
        fits = int((math.sqrt(d * d + 4 * room) - d) / 2)
        raise ValueError(
            f"{n} points in dimension {d} need {_needed(n, d, item) / 2**30:.1f} GiB in float{8 * item}, "
            f"{memory / 2**30:.1f} GiB are allowed: pass memory=, or at most {fits} points"
        )


def _solve(x, y, u, v, device, memory, dense_below):
    """Flattened clouds on the device, the certified solution, and the split cost it was found with."""
    place = _device(device, x)
    x, y = _clouds(x, y, place)
    n, d = x.shape
    for name, z in (("u", u), ("v", v)):
        if z is not None and (z.shape != (n,) or not z.isfinite().all()):
            raise ValueError(f"{name} must hold {n} finite potentials, got shape {tuple(z.shape)}; leave it out to start cold")
    u, v = (None if z is None else z.detach().to(place, torch.float64) for z in (u, v))
    memory = _available_memory(place) if memory is None else float(memory)
    precisions = (torch.float32, torch.float64) if n > dense_below else (torch.float64,)
    for dtype in precisions:
        _check_memory(n, d, dtype.itemsize, memory)
        try:
            return x, y, *_assignment.solve(x, y, dtype, u, v, dense_below=dense_below, memory=memory)
        except _assignment.Crowded:
            continue
    raise RuntimeError(f"the {n} points have too many near-ties to be told apart in float64")


def _assignment_of(found: _assignment.Certified, scale: float, place: torch.device) -> Assignment:
    """Back to the units of the clouds; refuse what is not certified."""
    unit = scale**-2
    u, v = (torch.from_numpy(z).to(place) * unit for z in (found.u, found.v))
    result = Assignment(
        permutation=torch.from_numpy(found.sigma).to(place),
        u=u,
        v=v,
        cost=found.primal * unit,
        lower_bound=max(((u + v).mean()).item(), 0.0),
        tied_arcs=found.tied_arcs,
        tie_group=torch.from_numpy(found.tie_group).to(place),
        tolerance=found.tolerance * unit,
    )
    if not result.certified:
        raise RuntimeError(
            f"the assignment of {len(u)} points is proved optimal to a relative gap of {result.gap:.2e} only "
            f"(cost {result.cost:.9g}, lower bound {result.lower_bound:.9g}); {GAP:.0e} is required. "
            "Pass the coordinates as float64 and remove near-duplicate points"
        )
    return result


def assign(
    x: Float[Tensor, "n ..."],
    y: Float[Tensor, "m ..."],
    *,
    u: Shaped[Tensor, "..."] | None = None,
    v: Shaped[Tensor, "..."] | None = None,
    device: str | torch.device | None = None,
    memory: float | None = None,
    _dense_below: int = _DENSE_BELOW,
) -> Assignment:
    """Solve min over permutations σ of (1/n) Σ_i |x_i − y_σ(i)|² exactly, with a dual certificate.

    Up to 256 points a dense solver sees every arc. Beyond, Sinkhorn potentials choose some 25 arcs a row, a sparse
    solver decides among them, all n² arcs are priced, and those whose slack float32 cannot tell from zero are
    recomputed in float64. O(n² d) operations for the products, about O(n²) for the rest.

    Args:
        x: n points, float32 or float64 (half precisions are widened, which is exact); trailing axes are flattened.
        y: as many points of the same shape.
        u: potentials of a neighbouring problem (another epoch, layer or λ) in the unit of the cost, used if v is absent.
        v: potentials on the y side, from an earlier `Assignment`. Good ones save the annealing; bad ones cost time only.
        device: where to multiply; that of x by default.
        memory: bytes that may be used beyond the clouds; three quarters of what is free by default. About 4 n² + 4 n d
            are needed, 8 n² make it faster.

    Returns:
        The assignment on the device of x. Of all optimal permutations it holds one with the most fixed points.

    Raises:
        ValueError: clouds of different shape, empty or not finite; potentials of the wrong length; a device that is not
            there; clouds too large for the memory.
        RuntimeError: cost and lower bound do not meet.
    """
    place = x.device
    *_, found, cost = _solve(x, y, u, v, device, memory, _dense_below)
    return _assignment_of(found, cost.scale, place)


def w2_squared(x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."]) -> float:
    """W₂² of the two empirical measures: the mean over points of the squared distance under the optimal assignment."""
    return assign(x, y).cost


def monotone_share(cost: _assignment.SplitCost) -> float:
    """Share of the pairs i < j with ⟨x_i − x_j, y_i − y_j⟩ ≥ 0, necessary for the identity to be optimal. In [0, 1].

    In terms of m = −2⟨x_i, y_j⟩ the product is (m_ij + m_ji − m_ii − m_jj) / 2; values within its rounding count as
    zero. A single point has no pairs: the share is 1. O(n²) given the products.
    """
    n = cost.n
    if n == 1:
        return 1.0
    rounding = 8 * cost.unit_roundoff * (cost.x_squares + cost.y_squares)
    own = (cost.cross.diagonal().double() - rounding).to(cost.cross.dtype)
    count = 0
    for rows in _assignment.tiles(n, _assignment.tile_rows(n)):
        product = cost.cross[rows] + cost.cross[:, rows].T
        count += int((product.sub_(own).sub_(own[rows, None]) >= 0).sum())
    return (count - n) / (n * (n - 1))


def optimal_transport_score(
    x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."], *, assignment: Assignment | None = None
) -> Score:
    """Score the map x_i → y_i against the optimal one: OTS = (1/n) #{i : σ(i) = i} (paper, Eq. 47), and companions.

    Where ties make σ non-unique, so is the share. A pair is *tight* if its slack under the certified potentials is at
    most `Assignment.tolerance` (1e-10 of the mean cost plus rounding), and an assignment is optimal iff all of its pairs
    are tight. Then

    - `share_upper` counts the points that some optimal assignment fixes: (i, i) is tight and lies on a cycle of tight
      pairs with the assignment;
    - `share_lower` counts those that every optimal assignment fixes;
    - `share` is that of an optimal assignment with the most fixed points, so it is exactly 1 if the identity is optimal.

    Without ties the three agree. With very many of them (more than 64 a point) the ends are bounds, not attained.

    Args:
        x: n points, as for `assign`.
        y: their images.
        assignment: `assign(x, y)`, if known already; the products are then computed once more for `monotone_share`.

    Raises:
        ValueError: as `assign`; or an assignment of another number of points.
    """
    n = len(x)
    if assignment is None:
        x_flat, y_flat, found, cost = _solve(x, y, None, None, None, None, _DENSE_BELOW)
        assignment = _assignment_of(found, cost.scale, x.device)
    else:
        if len(assignment.permutation) != n:
            raise ValueError(f"the assignment is of {len(assignment.permutation)} points, the clouds have {n}; assign these clouds")
        x_flat, y_flat = _clouds(x, y, x.device)
        dtype = torch.float64 if n <= _DENSE_BELOW else torch.float32
        _check_memory(n, x_flat.shape[1], dtype.itemsize, _available_memory(x.device))
        cost = _assignment.split_cost(x_flat, y_flat, dtype)
    own = torch.cat([(a.double() - b).square_().sum(1) for a, b in zip(x_flat.split(256), y_flat.split(256), strict=True)])
    identity = own.mean().item()
    sigma, group = assignment.permutation, assignment.tie_group
    fixed = sigma == torch.arange(n, device=sigma.device)
    own, u, v = own.to(sigma.device), assignment.u, assignment.v
    tight = own - u - v <= assignment.tolerance + _assignment.rounding(own, u, v)
    alone = torch.bincount(group, minlength=n)[group] == 1
    possible = fixed | (tight & (group == group[sigma.argsort()]))
    return Score(
        share=fixed.double().mean().item(),
        share_lower=(fixed & alone).double().mean().item(),
        share_upper=possible.double().mean().item(),
        cost_ratio=min(assignment.cost / identity, 1.0) if identity > 0 else 1.0,
        monotone_share=monotone_share(cost),
        w2_squared=assignment.cost,
        identity_cost=identity,
        n=n,
        certified=assignment.certified,
        gap=assignment.gap,
    )


def displacement_interpolation(
    x: Float[Tensor, "n ..."], y: Float[Tensor, "m ..."], t: float, *, assignment: Assignment | None = None
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
