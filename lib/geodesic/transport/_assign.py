"""Exact optimal assignment of two clouds, with a certificate.

W₂² of the empirical measures of n points is an assignment problem, min over permutations σ of (1/n) Σ |x_i − y_σ(i)|²
(paper, Eqs. 45–46). Used by book/setup.md and by every chapter that reports a score. All costs here are squared
distances, means over points.

Source: arXiv:2102.09235; linear programming duality (e.g. Peyré & Cuturi, Computational Optimal Transport, ch. 3).

| symbol | identifier  | shape  | meaning                                                    |
|--------|-------------|--------|------------------------------------------------------------|
| x, y   | x, y        | (n, d) | the clouds; trailing axes are flattened                    |
| σ      | permutation | (n,)   | x_i is sent to y_σ(i)                                      |
| u, v   | u, v        | (n,)   | potentials: u_i + v_j ≤ |x_i − y_j|² for all i, j          |
|        | slack       | scalar | |x_i − y_j|² − u_i − v_j ≥ 0, zero on every optimal pair   |
"""

import bisect
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from geodesic import devices
from geodesic.transport import _annealing, _arcs, _assignment, _certificate, _cost, _exact

Points = Shaped[Tensor, "..."] | Shaped[np.ndarray, "..."] | Sequence  # what is taken as a cloud

DENSE_BELOW = 256  # up to here all n² arcs go to a dense solver: faster than choosing among them
_DENSE_NUMBERS = 2**25  # coordinates that it may subtract
_DENSE_AT_LAST = 2048  # points up to which it helps where a matrix product tells too little
_LARGEST = 1e150  # coordinate whose square float64 holds with room to spare
_SMALLEST = 1e-145  # likewise, of the coordinates' range
_FLOAT32 = 1e-30, 1e37  # sizes between which float32 is reckoned with as it is
_WHOLE = 2**53  # up to here float64 holds every whole number
GAP = _certificate.GAP


@dataclass(frozen=True)
class Proof:
    """Potentials with all the digits of the proof: u_i + u_low_i + v_j + v_low_j ≤ |x_i − y_j − shift|² for all i, j.

    In exact arithmetic, without exception. A common shift changes the cost of every permutation by the same amount.
    """

    shift: Float64[Tensor, " d"]
    u: Float64[Tensor, " n"]
    u_low: Float64[Tensor, " n"]
    v: Float64[Tensor, " n"]
    v_low: Float64[Tensor, " n"]


@dataclass(frozen=True)
class Assignment:
    """An optimal assignment and its proof.

    By duality every permutation costs at least mean(u) + mean(v), because u_i + v_j ≤ |x_i − y_j|² for all pairs. That
    holds in exact arithmetic, and `excess` bounds, with every rounding counted, what the permutation found costs more
    than the least.
    """

    permutation: Int64[Tensor, " n"]  # x_i → y_permutation[i]; of all optimal ones, one that fixes the most points
    u: Float64[Tensor, " n"]
    v: Float64[Tensor, " n"]
    cost: float  # W₂², mean over points
    lower_bound: float  # cost − excess, mean over points, never negative
    excess: float  # proved: what the cost exceeds W₂² by at most
    spread: float  # cost less what all permutations have in common, |x̄ − ȳ|²; from below
    tied_arcs: int  # pairs (i, j), j ≠ σ(i), that other optimal assignments use (at most so many)
    tie_group: Int64[Tensor, " n"]  # points of one group may exchange partners at no cost
    settled: bool  # proved to be optimal in exact arithmetic: no other permutation costs less at all
    fixable: Bool[Tensor, " n"]  # points that some optimal assignment sends to their own image (at most these)
    tolerance: float  # slack up to which a pair may have been left unlooked at; 0 unless ties are too many
    proof: Proof

    @property
    def gap(self) -> float:
        """Excess / spread, in [0, 1]; 0 where the permutation is settled."""
        return (
            0.0 if self.settled or self.excess == 0 else min(self.excess / self.spread, 1.0) if self.spread > 0 else 1.0
        )

    @property
    def certified(self) -> bool:
        """Whether the permutation is settled, or its excess proved to be at most 1e-9 of the spread."""
        return self.gap <= GAP


def available_memory(device: torch.device) -> float:
    """Three quarters of the bytes that are free on the device."""
    if device.type == "cuda":
        return 0.75 * torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return 0.75 * 1024 * float(fields["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def take(name: str, z: Points) -> Tensor:
    """The cloud as a float32 or float64 tensor of two axes, where it is; exactly the numbers given."""
    try:
        z = z.detach() if isinstance(z, Tensor) else torch.as_tensor(np.asarray(z))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is a {type(z).__name__} that holds no numbers ({error}); pass a tensor") from error
    if z.ndim == 0:
        raise ValueError(f"{name} is the single number {z.item()}; pass a cloud of shape (n, ...)")
    if z.is_complex():
        raise TypeError(f"{name} is complex ({z.dtype}); pass real and imaginary part as two coordinates")
    if not z.is_floating_point():
        largest = max(abs(int(z.max())), abs(int(z.min()))) if z.numel() else 0
        if largest > _WHOLE:
            raise ValueError(f"{name} holds the whole number {largest}, and float64 holds those up to 2**53; subtract")
        z = z.double()
    return z if z.dtype == torch.float64 else z.float()


def take_clouds(
    x: Points, y: Points, device: torch.device | None = None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Check, flatten and move the clouds."""
    x, y = take("x", x), take("y", y)
    if x.shape != y.shape or x.numel() == 0:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(
            f"x and y must be clouds of one non-empty shape (n, ...), got {shapes}; pass as many images as points"
        )
    dtype, device = torch.promote_types(x.dtype, y.dtype), device or devices.find(x.device)
    x, y = (z.reshape(len(z), -1).to(device, dtype) for z in (x, y))
    ends = []
    for name, z in (("x", x), ("y", y)):
        lowest, highest = (end.item() for end in z.aminmax())
        if not max(highest, -lowest) < _LARGEST:
            bad = int((~(z.abs() < _LARGEST)).any(1).sum())
            raise ValueError(
                f"{name} has NaN, infinite or overflowing coordinates in {bad} of {len(z)} points; drop them"
            )
        ends += [lowest, highest]
    reach = max(ends) - min(ends)
    if 0 < reach < _SMALLEST:
        raise ValueError(
            f"the coordinates of x and y differ by {reach:.3g} at most, whose square underflows; scale them"
        )
    if dtype == torch.float32 and (max(map(abs, ends)) > _FLOAT32[1] or 0 < reach < _FLOAT32[0]):
        x, y = x.double(), y.double()  # close to overflow, or subnormal
    return x, y


def check_memory(n: int, d: int, dtype: torch.dtype, device: torch.device, memory: int | float) -> None:
    """Refuse if there is no room for an n × n matrix, with it a prepared cloud or a sparse kernel, and the tiles."""
    item = dtype.itemsize

    def needed(m: int) -> int:
        tiles = item * (8 * _cost.TILE[device.type] + _cost.BLOCK)
        return item * m * m + max(item * m * d, _annealing.sparse_bytes(m)) + tiles

    if n > DENSE_BELOW and needed(n) > memory:
        fits = bisect.bisect_right(range(1, n), memory, key=needed)
        raise ValueError(
            f"{n} points of dimension {d} need {needed(n) / 2**30:.1f} GiB in float{8 * item}, allowed are "
            f"{memory / 2**30:.1f} GiB: pass memory= if there is more, or at most {fits} points"
        )


def solve(
    x: Points,
    y: Points,
    u: Shaped[Tensor, "..."] | None = None,
    v: Shaped[Tensor, "..."] | None = None,
    device: str | torch.device | None = None,
    memory: int | float | None = None,
    dense_below: int = DENSE_BELOW,
) -> tuple[Assignment, Float[Tensor, "n d"], Float[Tensor, "n d"], _cost.SplitCost | None]:
    """Check the input, solve in float32 and, where that cannot tell near-ties apart, in float64.

    Returns: the assignment, the clouds as they were taken, and the matrix if there is one.
    """
    home = x.device if isinstance(x, Tensor) else torch.device("cpu")
    x, y = take_clouds(x, y, devices.find(home if device is None else device))
    n, d = x.shape
    u, v = (_potentials(name, z, n, x.device) for name, z in (("u", u), ("v", v)))
    memory = available_memory(x.device) if memory is None else memory
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(x.device)
    clouds = _exact.Clouds(x, y, order, _cost.scale(x, y))
    if n <= dense_below and n * n * d <= _DENSE_NUMBERS:
        return _in_units_of_the_clouds(_certificate.certify_all(clouds), clouds, home), x, y, None
    found, cost = _by_product(clouds, u, v, memory)
    if not found.certified and n <= _DENSE_AT_LAST:
        found = _certificate.certify_all(clouds)
    return _in_units_of_the_clouds(found, clouds, home), x, y, cost


def _by_product(
    clouds: _exact.Clouds, u: Float64[Tensor, " n"] | None, v: Float64[Tensor, " n"] | None, memory: int | float
) -> tuple[_certificate.Certified, _cost.SplitCost]:
    """Solve in float32 and, where that cannot tell near-ties apart, go on in float64 from where it came to."""
    n, d = clouds.x.shape
    check_memory(n, d, torch.float32, clouds.x.device, memory)
    try:
        return _assignment.solve(clouds, torch.float32, u, v)
    except _arcs.Crowded as crowded:
        reached = crowded.v
    check_memory(n, d, torch.float64, clouds.x.device, memory)
    return _assignment.solve(clouds, torch.float64, None, reached)


def _potentials(
    name: str, z: Shaped[Tensor, "..."] | None, n: int, device: torch.device
) -> Float64[Tensor, " n"] | None:
    """Potentials to start from, checked."""
    if z is None:
        return None
    if z.shape != (n,) or not z.isfinite().all():
        raise ValueError(
            f"{name} must hold {n} finite potentials, got shape {tuple(z.shape)}; leave it out to start cold"
        )
    return z.detach().to(device, torch.float64)


def _in_units_of_the_clouds(found: _certificate.Certified, clouds: _exact.Clouds, home: torch.device) -> Assignment:
    """Undo the scaling and the order."""
    unit, order, place = clouds.scale**-2, clouds.order.cpu(), clouds.order.argsort().cpu()

    def back(z: np.ndarray) -> Tensor:
        return torch.from_numpy(z)[place].to(home)

    cost, excess = found.cost * unit, found.excess * unit
    return Assignment(
        permutation=order[torch.from_numpy(found.sigma)[place]].to(home),
        u=back(found.u) * unit,
        v=back(found.v) * unit,
        cost=cost,
        lower_bound=max(cost - excess, 0.0),
        excess=excess,
        spread=found.spread * unit,
        tied_arcs=found.ties.arcs,
        tie_group=back(found.ties.group),
        settled=found.ties.settled,
        fixable=back(found.ties.fixable),
        tolerance=found.tolerance * unit,
        proof=Proof(
            torch.from_numpy(found.shift).to(home) / clouds.scale,
            *(back(part) * unit for z in (found.proof_u, found.proof_v) for part in z),
        ),
    )


def assign(
    x: Points,
    y: Points,
    *,
    u: Shaped[Tensor, "..."] | None = None,
    v: Shaped[Tensor, "..."] | None = None,
    device: str | torch.device | None = None,
    memory: int | float | None = None,
    _dense_below: int = DENSE_BELOW,
) -> Assignment:
    """Solve min over permutations σ of (1/n) Σ_i |x_i − y_σ(i)|² exactly, with a dual certificate.

    Up to 256 points a dense solver sees every arc. Beyond, Sinkhorn potentials choose some 25 arcs a row, a sparse
    solver decides among them, all n² arcs are priced, and those whose slack float32 cannot tell from zero are
    recomputed in float64. O(n² d) operations for the product, about n² for the rest.

    Args:
        x: n points, a tensor, an array or a list of numbers; trailing axes are flattened. They are taken exactly as
            given: half precisions become float32, whole numbers float64.
        y: as many points of the same shape.
        u: potentials of a neighbouring problem (another epoch, layer or λ), in the unit of the cost; v goes first.
        v: the same on the side of y, as in an earlier `Assignment`. Good ones save the annealing, bad ones cost time.
        device: where to multiply; that of x by default.
        memory: bytes that may be used beyond the clouds, by default three quarters of what is free. About 4 n² + 4 n d
            are needed, 5 n² where d is small; twice that where near-ties ask for float64.

    Returns:
        The assignment, on the device of x. Every finite cloud has one; `certified` says whether it is proved optimal.
            It does not depend on the order of the points, but for ties.

    Raises:
        TypeError: complex numbers, or none.
        ValueError: clouds of different shape, empty, not finite, or too large or too small for squares in float64;
            whole numbers beyond 2⁵³; potentials of the wrong length; a device that is not there; clouds too large for
            the memory.
        ModuleNotFoundError: more than 5000 points without lapx.
    """
    return solve(x, y, u, v, device, memory, _dense_below)[0]


def w2_squared(x: Points, y: Points) -> float:
    """W₂² of the two empirical measures: the mean over points of the squared distance under the optimal assignment.

    Warns (RuntimeWarning) where the assignment found is not proved optimal; `assign(x, y).lower_bound` then bounds W₂²
    from below, and what is returned is the cost of the assignment found, from above.
    """
    found = assign(x, y)
    _warn_unless_proved(found)
    return found.cost


def _warn_unless_proved(found: Assignment) -> None:
    """Say so where a result cannot: a number, or points."""
    if not found.certified:
        warnings.warn(
            f"the assignment is not proved optimal: W₂² lies between {found.lower_bound:.6g} and {found.cost:.6g}; "
            "assign(x, y) has both, as lower_bound and cost",
            RuntimeWarning,
            stacklevel=3,
        )


def mean_cost(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], sigma: Int64[Tensor, " n"]) -> float:
    """(1/n) Σ |x_i − y_σ(i)|² in float64."""
    n, scale = len(x), _cost.scale(x, y)
    clouds = _exact.Clouds(x, y, torch.arange(n, device=x.device), scale)
    arcs = np.arange(n) * n + sigma.cpu().numpy()
    return float(_exact.float64_costs(clouds, arcs, 0.0).high.mean()) * scale**-2


def check_fits(assignment: Assignment, x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> None:
    """Refuse an assignment of other clouds: another length, or another cost.

    Raises: ValueError.
    """
    n, sigma = len(x), assignment.permutation
    if len(sigma) != n:
        raise ValueError(
            f"the assignment is of {len(sigma)} points and the clouds have {n}; pass assign(x, y) or leave it out"
        )
    cost = mean_cost(x, y, sigma)
    if not math.isclose(cost, assignment.cost, rel_tol=1e-9):
        raise ValueError(
            f"the assignment costs {assignment.cost:.6g} by its own account and {cost:.6g} on these clouds; "
            "pass assign(x, y) of the same clouds or leave it out"
        )


def displacement_interpolation(
    x: Points, y: Points, t: int | float, *, assignment: Assignment | None = None
) -> Float[Tensor, "n ..."]:
    """Points at time t of the geodesic from x to y: (1 − t) x_i + t y_σ(i) (paper, Eq. 5). W₂(μ_s, μ_t) = |s − t| W₂.

    Args:
        x: n points, shape kept.
        y: as many.
        t: time in [0, 1].
        assignment: `assign(x, y)`, if known already.

    Warns (RuntimeWarning) where the assignment was made here and is not proved optimal.

    Raises:
        ValueError: t outside [0, 1]; an assignment of other clouds; otherwise as `assign`.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t = {t} lies outside [0, 1]; a geodesic is not defined beyond its ends")
    flat = take_clouds(x, y)
    if assignment is None:
        assignment = assign(x, y)
        _warn_unless_proved(assignment)
    else:
        check_fits(assignment, *flat)
    x, y = (z if isinstance(z, Tensor) and z.is_floating_point() else take("x", z) for z in (x, y))
    return (1 - t) * x + t * y[assignment.permutation.to(y.device)]
