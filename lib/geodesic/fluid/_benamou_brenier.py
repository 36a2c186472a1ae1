"""Benamou–Brenier on a grid: W₂² as the least kinetic energy of a fluid between two densities.

The discretisation is that of `_staggered`; densities have mean 1 inside the solver.

Source: Benamou & Brenier (2000); Papadakis, Peyré & Oudet, "Optimal transport with proximal splitting" (2014), for the
splitting; Condat (2013) for the relaxation.

| symbol | identifier | shape, meaning |
|---|---|---|
| ρ | density | (steps + 1, *grid), mass per unit of length or area |
| m = ρv | momentum | one tensor an axis, (steps, *grid) with one more along that axis: flux, zero on the walls |
| u = (ρ, m) | fluid | [density, *momenta without the walls] |
| y = (a, b) | dual | [a, b] per axis on the inner faces, a + b²/4 ≤ 0; b/2 is the velocity there |
| K | _to_faces | u ↦ [ρ, m] per axis on the inner faces; its norm is at most 1 |
"""

import math
from dataclasses import dataclass

import scipy.fft
import torch
from jaxtyping import Float
from torch import Tensor

from geodesic.fluid._staggered import Momentum, divergence, gradient, mean, with_walls

_MASS_TOLERANCE = 1e-6  # relative difference up to which two masses are called equal
_SIGMA = 0.1  # dual step; the ratio of a velocity of about 0.5 to a density of about 5 (mean 1)
_RELAXATION = 1.8  # in [1, 2); above 1 it saves iterations
_AT_REST = 1e-9  # a velocity that is called zero: two equal densities have no other scale


@dataclass(frozen=True)
class Solution:
    """A grid geodesic; density and momentum satisfy the continuity equation to round-off, both ends included."""

    w2_squared: float  # least kinetic energy per unit of mass, in units of the interval or square
    density: Tensor  # (steps + 1, *grid); dips below zero by no more than the residuals allow
    momentum: Momentum  # one tensor an axis, zero on the walls
    residuals: Float[Tensor, "iterations 2"]  # relative: primal, dual
    iterations: int


def benamou_brenier(
    rho0: Float[Tensor, "*grid"],
    rho1: Float[Tensor, "*other"],
    steps: int = 32,
    tol: float = 5e-4,
    max_iterations: int = 2000,
) -> Solution:
    """W₂² of two densities on the unit interval or square: min ∫₀¹∫ |m|²/ρ subject to ∂_t ρ + ∇·m = 0.

    A primal–dual iteration between two projections: onto the continuity equation (a Poisson equation in space-time)
    and, face by face, onto the paraboloid a + b²/4 ≤ 0, whose support function is m²/ρ.

    Args:
        rho0: nonnegative cell values, (nx,) or (nx, ny), at least 4 cells an axis. The scale is free: the answer is
            that of the probability measures.
        rho1: the same, with the shape and the mass of rho0.
        steps: time slabs, at least 2.
        tol: bound on both relative residuals; the default leaves w2_squared within about 0.5 % of its
            limit on the grid.
        max_iterations: iterations to spend before giving up.

    Raises:
        ValueError: for negative, non-finite or empty densities, unequal masses or shapes, grids too small.
        RuntimeError: if max_iterations do not reach tol.
    Source: paper eq. (8). Cost: O(N log N) an iteration with N = steps · cells; some hundred iterations.
    """
    _require_pair(rho0, rho1)
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol:g}")
    mass = rho0.mean()
    fluid = _straight_start(rho0 / mass, rho1 / rho1.mean(), steps)
    dual = [torch.zeros_like(x) for x in _to_faces(fluid)]
    residuals = [(math.inf, math.inf)]
    while not all(r <= tol for r in residuals[-1]):  # also while one is not a number
        if len(residuals) > max_iterations:
            raise RuntimeError(
                f"benamou_brenier reached relative residuals {residuals[-1][0]:.1e} (primal) and "
                f"{residuals[-1][1]:.1e} (dual), not tol={tol:g}, in max_iterations={max_iterations}; raise either"
            )
        fluid, dual, energy, residual = _iterate(fluid, dual)
        residuals.append(residual)
    density, *momenta = fluid
    momentum = tuple(mass * with_walls(m, axis) for axis, m in enumerate(momenta, 1))
    return Solution(energy, mass * density, momentum, torch.tensor(residuals[1:]), len(residuals) - 1)


def _iterate(fluid: list[Tensor], dual: list[Tensor]) -> tuple[list[Tensor], list[Tensor], float, tuple[float, float]]:
    """One step: the new state, the energy and the relative residuals (primal, dual).

    By Moreau's identity what the projection onto the paraboloids removes is, over σ, the proximal point of m²/ρ: a
    pair with ρ ≥ 0 on every face. The energy is read there; its distance from K u is the primal residual.
    """
    faces = _to_faces(fluid)
    pushed = _add(dual, _SIGMA, faces)
    new_dual = _project_paraboloids(pushed)
    proximal = [(x - y) / _SIGMA for x, y in zip(pushed, new_dual, strict=True)]
    energy = sum((rho * b.square()).sum() for rho, b in zip(proximal[::2], new_dual[1::2], strict=True)) / 4
    slope = _from_faces(_add(new_dual, 1.0, _add(new_dual, -1.0, dual)))
    new_fluid = _project_continuity(_add(fluid, -1 / _SIGMA, slope))
    primal = _norm(_add(proximal, -1.0, faces)) / _norm(faces)
    speed = _norm(_from_faces(new_dual)) + _AT_REST * math.sqrt(fluid[0].numel())
    change = _SIGMA * _norm(_add(new_fluid, -1.0, fluid)) / speed
    fluid = _add(fluid, _RELAXATION, _add(new_fluid, -1.0, fluid))
    dual = _add(dual, _RELAXATION, _add(new_dual, -1.0, dual))
    cells = fluid[0][1:].numel()
    return fluid, dual, float(energy) / cells, (float(primal), float(change))


def _project_paraboloids(dual: list[Tensor]) -> list[Tensor]:
    """The nearest point with a + b²/4 ≤ 0, face by face.

    It is (a − 2(s − 1), b/s), with s = 1 inside and else the root s > 1 of s³ − ps² = q, p = a/2 + 1, q = b²/8.
    Newton's method from above, where the cubic is convex, falls to the root without overshooting.
    """
    projected = []
    for a, b in zip(dual[::2], dual[1::2], strict=True):
        p, q = a / 2 + 1, b.square() / 8
        s = (p.clamp(min=0) + q.pow(1 / 3)).clamp(min=1)
        for _ in range(8):
            s = s - (s.square() * (s - p) - q) / (s * (3 * s - 2 * p))
        s = s.clamp(min=1)
        projected += [a - 2 * (s - 1), b / s]
    return projected


def _project_continuity(fluid: list[Tensor]) -> list[Tensor]:
    """The nearest fluid that obeys ∂_t ρ + ∇·m = 0 and keeps its two ends; a change of ρ counts once an axis."""
    density, *momenta = fluid
    steps, axes = density.shape[0] - 1, len(momenta)
    source = density.diff(dim=0) * steps + divergence([with_walls(m, axis) for axis, m in enumerate(momenta, 1)])
    potential = _poisson(source, axes)
    density = density.clone()
    density[1:-1] += potential.diff(dim=0) * steps / axes
    return [density, *(m + gradient(potential, axis) for axis, m in enumerate(momenta, 1))]


def _poisson(source: Float[Tensor, "steps *grid"], time_weight: int) -> Float[Tensor, "steps *grid"]:
    """Solve −(∂_tt/time_weight + Δ) φ = source with zero-flux walls, of mean zero, by the cosine transform."""
    symbol = torch.zeros_like(source)
    for axis, n in enumerate(source.shape):
        k = torch.arange(n, dtype=source.dtype, device=source.device)
        weight = time_weight if axis == 0 else 1.0
        eigenvalues = (2 * n * (math.pi * k / (2 * n)).sin()).square() / weight
        symbol += eigenvalues.reshape([-1 if a == axis else 1 for a in range(source.ndim)])
    symbol[(0,) * source.ndim] = 1.0  # the mean of the source is zero: both ends have the same mass
    spectrum = scipy.fft.dctn(source.cpu().numpy(), norm="ortho")
    return torch.from_numpy(scipy.fft.idctn(spectrum / symbol.cpu().numpy(), norm="ortho")).to(source)


def _to_faces(fluid: list[Tensor]) -> list[Tensor]:
    """K: the mean density and the momentum of every inner face at mid-time, [ρ, m] per axis."""
    density, *momenta = fluid
    middle = mean(density, 0)
    return [x for axis, m in enumerate(momenta, 1) for x in (mean(middle, axis), m)]


def _from_faces(dual: list[Tensor]) -> list[Tensor]:
    """K*, the adjoint of `_to_faces`; the ends do not vary, and a change of ρ counts once an axis."""
    middle = sum(mean(with_walls(a, axis), axis) for axis, a in enumerate(dual[::2], 1))
    return [with_walls(mean(middle, 0), 0) / len(dual[::2]), *dual[1::2]]


def _add(x: list[Tensor], scale: float, y: list[Tensor]) -> list[Tensor]:
    return [p + scale * q for p, q in zip(x, y, strict=True)]


def _norm(x: list[Tensor]) -> Tensor:
    return sum(p.square().sum() for p in x).sqrt()


def _straight_start(rho0: Tensor, rho1: Tensor, steps: int) -> list[Tensor]:
    """The mixture (1 − t) ρ₀ + t ρ₁ with the momentum of least ∫|m|² that carries it."""
    t = torch.linspace(0, 1, steps + 1, dtype=rho0.dtype, device=rho0.device).reshape(-1, *[1] * rho0.ndim)
    density = (1 - t) * rho0 + t * rho1
    still = [
        density.new_zeros(steps, *(n - (a == axis) for a, n in enumerate(rho0.shape))) for axis in range(rho0.ndim)
    ]
    return _project_continuity([density, *still])


def _require_pair(rho0: Tensor, rho1: Tensor) -> None:
    for name, rho in (("rho0", rho0), ("rho1", rho1)):
        if not 1 <= rho.ndim <= 2 or min(rho.shape) < 4:
            raise ValueError(f"{name} must be (nx,) or (nx, ny) with 4 cells or more an axis, got {tuple(rho.shape)}")
        if not torch.isfinite(rho).all() or (rho < 0).any() or not (rho > 0).any():
            raise ValueError(f"{name} must be finite, nonnegative and not all zero; its least value is {rho.min():g}")
    if rho0.shape != rho1.shape:
        raise ValueError(f"rho0 and rho1 need one grid, got {tuple(rho0.shape)} and {tuple(rho1.shape)}")
    if not abs(rho0.mean() - rho1.mean()) <= _MASS_TOLERANCE * rho0.mean():
        raise ValueError(f"masses differ: {rho0.mean():g} and {rho1.mean():g}; divide each density by its mean")
