"""Curves of densities on a staggered grid of the unit interval or square: their continuity equation and their energy.

Space is cut into cells, the unit of time into `steps` slabs; no mass crosses the walls. Densities sit in the cells at
the times k/steps, momenta on the faces between cells at the times (k + ½)/steps, so the continuity equation is an
identity of sums. The energy of a face is m²/ρ with ρ the mean of the cells and times around it. One path of densities
has many momenta: `least_momentum` is the cheapest, ρ times a gradient; with `swirl` added it carries the same path.

Source: Papadakis, Peyré & Oudet, "Optimal transport with proximal splitting" (2014), section 3 for the staggered grid
(they put the energy in the cells, we on the faces).

| symbol | identifier | shape, meaning |
|---|---|---|
| ρ | density | (steps + 1, *grid), mass per unit of length or area |
| m = ρv | momentum | one tensor an axis, (steps, *grid) with one more along that axis: flux, zero on the walls |
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from scipy.sparse.linalg import spsolve
from torch import Tensor
from torch.nn.functional import pad

Momentum = tuple[Tensor, ...]

_MASS_TOLERANCE = 1e-6  # relative difference up to which two masses are called equal
_SOLVE_TOLERANCE = 1e-8  # what a solve may leave of the continuity equation, against the largest rate of change


def kinetic_energy(density: Float[Tensor, "times *grid"], momentum: Momentum) -> float:
    """∫₀¹∫ |m|²/ρ per unit of mass: what it costs to carry a curve of densities with this momentum.

    At least W₂² of the two ends if the pair obeys the continuity equation, which is not checked here but by
    `continuity_residual`. +∞ where momentum meets a face without density.

    Raises:
        ValueError: if shapes do not fit or a value is not finite.
    Source: paper eq. (8), right-hand side.
    """
    _require_curve(density)
    _require_momentum(density, momentum)
    total = 0.0
    for axis, m in enumerate(momentum, 1):
        rho, flux = mean(mean(density, 0), axis), m.narrow(axis, 1, m.shape[axis] - 2)
        total += torch.where(rho > 0, flux.square() / rho, torch.inf)[flux != 0].sum().item()
    return total / (momentum[0].shape[0] * density[0].sum().item())


def continuity_residual(density: Float[Tensor, "times *grid"], momentum: Momentum) -> Float[Tensor, "steps *grid"]:
    """∂_t ρ + ∇·m, slab by slab and cell by cell.

    Raises:
        ValueError: if shapes do not fit or a value is not finite.
    Source: paper eq. (1).
    """
    _require_curve(density)
    _require_momentum(density, momentum)
    return density.diff(dim=0) * (density.shape[0] - 1) + divergence(momentum)


def least_momentum(density: Float[Tensor, "times *grid"]) -> Momentum:
    """The momentum of least energy that carries a given curve: m = ρ∇φ with ∇·(ρ∇φ) = −∂_t ρ, one solve a slab.

    In one dimension it is the only momentum. Its energy is ∫|μ'|² dt, the squared speed of the curve in W₂.

    Raises:
        ValueError: for fewer than two times, densities that are not finite and positive, or a mass that changes.
        RuntimeError: if a solve leaves a residual, as with densities that all but vanish between two masses.
    Source: Ambrosio, Gigli & Savaré (2008), Theorem 8.3.1. Cost: a sparse factorisation a slab.
    """
    _require_curve(density)
    if (density <= 0).any():
        raise ValueError(f"densities must be positive, the least is {density.min():g}; mix in a uniform density")
    masses = density.flatten(1).sum(1)
    if ((masses - masses[0]).abs() > _MASS_TOLERANCE * masses[0]).any():
        raise ValueError(f"the mass changes along the curve, from {masses.min():g} to {masses.max():g}")
    exact = density.double()
    rate = exact.diff(dim=0) * (density.shape[0] - 1)
    rate = rate - rate.mean(dim=tuple(range(1, rate.ndim)), keepdim=True)  # masses are equal up to rounding only
    axes = range(1, density.ndim)
    weights = [mean(mean(exact, 0), axis) for axis in axes]
    operators = _gradient_matrices(tuple(density.shape[1:]))
    slabs = [_solve_slab(rate[k], [w[k] for w in weights], operators) for k in range(rate.shape[0])]
    momentum = tuple(with_walls(torch.stack(m), axis) for axis, m in zip(axes, zip(*slabs, strict=True), strict=True))
    left = (rate + divergence(momentum)).abs().max()
    if not left <= _SOLVE_TOLERANCE * rate.abs().max():
        raise RuntimeError(f"least_momentum left a continuity residual of {left:.1e}; mix in a uniform density")
    return tuple(m.to(density) for m in momentum)


def swirl(density: Float[Tensor, "times *grid"]) -> Momentum:
    """A divergence-free momentum, the curl of the stream function ρ sin(πx) sin(πy): it moves no density at all.

    It runs along the level lines of the stream function, and is orthogonal to `least_momentum` in the energy.

    Raises:
        ValueError: in one dimension, where only zero is divergence-free, or for a non-finite density.
    """
    _require_curve(density)
    if density.ndim != 3:
        raise ValueError(
            f"only in two dimensions is there something to swirl; density has shape {tuple(density.shape)}"
        )
    corners = mean(mean(mean(density, 0), 1), 2)
    sines = [
        (math.pi * torch.arange(1, n, dtype=density.dtype, device=density.device) / n).sin() for n in density.shape[1:]
    ]
    stream = pad(corners * torch.outer(*sines), (1, 1, 1, 1))
    return stream.diff(dim=2) * density.shape[2], -stream.diff(dim=1) * density.shape[1]


def divergence(momentum: Sequence[Tensor]) -> Tensor:
    """∇·m in every cell, from the fluxes through all its faces."""
    return sum(m.diff(dim=axis) * (m.shape[axis] - 1) for axis, m in enumerate(momentum, 1))


def gradient(potential: Tensor, axis: int) -> Tensor:
    """Differences of cell values across the inner faces of an axis of length 1; minus the adjoint of `divergence`."""
    return potential.diff(dim=axis) * potential.shape[axis]


def mean(x: Tensor, axis: int) -> Tensor:
    """Means of neighbours along an axis, one fewer than there are values."""
    n = x.shape[axis] - 1
    return (x.narrow(axis, 0, n) + x.narrow(axis, 1, n)) / 2


def with_walls(x: Tensor, axis: int) -> Tensor:
    """One slice of zeros before and one after."""
    wall = torch.zeros_like(x.narrow(axis, 0, 1))
    return torch.cat([wall, x, wall], dim=axis)


def _gradient_matrices(shape: tuple[int, ...]) -> list[scipy.sparse.csr_array]:
    """`gradient` along each axis of a flattened grid."""
    matrices = []
    for axis, n in enumerate(shape):
        factors = [scipy.sparse.eye_array(k) for k in shape]
        factors[axis] = scipy.sparse.diags_array(
            [-n * np.ones(n - 1), n * np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n)
        )
        matrices.append(functools.reduce(scipy.sparse.kron, factors).tocsr())
    return matrices


def _solve_slab(change: Tensor, weights: list[Tensor], operators: list[scipy.sparse.csr_array]) -> list[Tensor]:
    """ρ∇φ on the inner faces of each axis, where ∇·(ρ∇φ) = −change and φ is pinned where the density is greatest."""
    diagonals = [w.cpu().numpy().ravel() for w in weights]
    laplacian = sum(g.T @ scipy.sparse.diags_array(d) @ g for g, d in zip(operators, diagonals, strict=True)).tocsc()
    free = np.arange(change.numel()) != laplacian.diagonal().argmax()
    potential = np.zeros(change.numel())
    potential[free] = spsolve(laplacian[free][:, free], change.cpu().numpy().ravel()[free])
    fluxes = [d * (g @ potential) for g, d in zip(operators, diagonals, strict=True)]
    return [torch.from_numpy(m).reshape(w.shape).to(w) for m, w in zip(fluxes, weights, strict=True)]


def _require_curve(density: Tensor) -> None:
    if not 2 <= density.ndim <= 3 or min(density.shape) < 2:
        raise ValueError(
            f"a curve of densities is (times, nx) or (times, nx, ny), each 2 or more; got {tuple(density.shape)}"
        )
    if not torch.isfinite(density).all():
        raise ValueError(
            f"{int((~torch.isfinite(density)).sum())} values of the density are not finite; mask or repair them"
        )


def _require_momentum(density: Tensor, momentum: Momentum) -> None:
    steps, *grid = density.shape[0] - 1, *density.shape[1:]
    want = [(steps, *(n + (a == axis) for a, n in enumerate(grid))) for axis in range(len(grid))]
    got = [tuple(m.shape) for m in momentum]
    if got != want:
        raise ValueError(f"a density of shape {tuple(density.shape)} needs momenta of shapes {want}, got {got}")
    if not all(torch.isfinite(m).all() for m in momentum):
        raise ValueError("the momentum has values that are not finite")
