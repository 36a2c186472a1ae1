"""The continuity equation ∂_t ρ + ∇·(ρv) = 0 on the unit interval or square: particles, finite volumes, Helmholtz.

One velocity field pushes particles (`push`) and a density on cells (`advect`); no mass crosses the walls. `helmholtz`
splits a field into the gradient that moves mass and the part that only stirs. What needs a whole curve of densities
(its energy, the geodesic) is in `_staggered` and `_benamou_brenier`.

Source: paper eqs (1), (2), (8), (15); LeVeque, "Finite Volume Methods for Hyperbolic Problems" (2002) for upwind fluxes
and the van Leer limiter.

| symbol | identifier | shape, meaning |
|---|---|---|
| ρ | density | (nx,) or (nx, ny), cell averages |
| v | velocity | (points (n, d), time) ↦ (n, d) |
| ∇p, w | gradient, solenoidal | (2, nx, ny): v = ∇p + w, w without divergence and tangent to the walls |
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import scipy.fft
import torch
from jaxtyping import Float
from torch import Tensor

from geodesic.fluid._staggered import divergence, with_walls

Velocity = Callable[[Tensor, float], Tensor]

# Largest Courant number that keeps densities nonnegative: limited slopes can double the value at a face.
_COURANT = {"upwind": 1.0, "van leer": 0.5}


def push(
    points: Float[Tensor, "n d"], velocity: Velocity, steps: int, start: float = 0.0, stop: float = 1.0
) -> Float[Tensor, "n d"]:
    """Carry particles along ẋ = v(x, t) from start to stop by the classical Runge–Kutta method, error O(steps⁻⁴).

    A stop before the start runs the flow backwards. Walls are not enforced: a field that points out of the domain
    takes particles with it.

    Raises:
        ValueError: for times outside [0, 1], fewer than one step, or a velocity of the wrong shape or not finite.
    """
    _require_times(steps, start, stop)
    dt = (stop - start) / steps
    for k in range(steps):
        t = start + k * dt
        first = _evaluate(velocity, points, t)
        second = _evaluate(velocity, points + dt / 2 * first, t + dt / 2)
        third = _evaluate(velocity, points + dt / 2 * second, t + dt / 2)
        fourth = _evaluate(velocity, points + dt * third, t + dt)
        points = points + dt / 6 * (first + 2 * second + 2 * third + fourth)
    return points


def advect(
    density: Float[Tensor, "*grid"],
    velocity: Velocity,
    steps: int,
    start: float = 0.0,
    stop: float = 1.0,
    scheme: str = "upwind",
) -> Float[Tensor, "*grid"]:
    """Solve ∂_t ρ + ∇·(ρv) = 0 by finite volumes: what leaves a cell through a face enters the next.

    "upwind" takes the density upstream of a face and Euler steps: first order. "van leer" adds limited slopes and
    Heun steps: second order where the density is smooth. Both keep the mass to round-off and the density nonnegative.

    Args:
        density: nonnegative cell averages on the unit interval (nx,) or square (nx, ny), 2 cells or more an axis.
        velocity: the field, called on face centres; its normal component on the walls is taken as zero.
        steps: time steps between start and stop.
        start: time of the given density, in [0, 1].
        stop: time of the answer, in [start, 1].
        scheme: "upwind" or "van leer".

    Raises:
        ValueError: for a bad density, times outside [0, 1], an unknown scheme, or a Courant number
            dt Σ_axes max|v|/h above 1 (upwind) or 1/2 (van leer), with the number of steps that would do.
    Source: paper eq. (1).
    """
    if scheme not in _COURANT:
        raise ValueError(f"scheme must be one of {sorted(_COURANT)}, got {scheme!r}")
    _require_times(steps, start, stop)
    _require_density(density)
    if stop < start:
        raise ValueError(f"finite volumes run forwards only: stop={stop:g} lies before start={start:g}")
    dt, rho = (stop - start) / steps, density[None]
    for k in range(steps):
        t = start + k * dt
        if scheme == "upwind":
            rho = _euler(rho, velocity, t, dt, scheme)
        else:
            twice = _euler(_euler(rho, velocity, t, dt, scheme), velocity, t + dt, dt, scheme)
            rho = (rho + twice) / 2
    return rho[0]


def _euler(rho: Tensor, velocity: Velocity, t: float, dt: float, scheme: str) -> Tensor:
    """ρ − dt ∇·(ρv) with the fluxes of the scheme; rho carries a leading axis of length 1."""
    normals = [_normal_velocity(rho, velocity, t, axis) for axis in range(1, rho.ndim)]
    courant = dt * sum(v.abs().max().item() * rho.shape[axis] for axis, v in enumerate(normals, 1))
    if courant > _COURANT[scheme]:
        more = math.ceil(courant / _COURANT[scheme] * 10) / 10
        raise ValueError(
            f"Courant number {courant:.4g} at t={t:.3g} is above {_COURANT[scheme]:g} for {scheme!r}; "
            f"take at least {more:g} times as many steps"
        )
    return rho - dt * divergence(tuple(_flux(rho, v, axis, scheme) for axis, v in enumerate(normals, 1)))


def _flux(rho: Tensor, normal: Tensor, axis: int, scheme: str) -> Tensor:
    """Mass through the faces of an axis per unit of time: the density upstream times the velocity."""
    inner = rho.shape[axis] - 1
    slope = torch.zeros_like(rho)
    if scheme == "van leer" and inner > 1:
        jumps = rho.diff(dim=axis)
        product = jumps.narrow(axis, 0, inner - 1) * jumps.narrow(axis, 1, inner - 1)
        total = jumps.narrow(axis, 0, inner - 1) + jumps.narrow(axis, 1, inner - 1)
        slope = with_walls(torch.where(product > 0, 2 * product / total, 0.0), axis)
    upward = (rho + slope / 2).narrow(axis, 0, inner)
    downward = (rho - slope / 2).narrow(axis, 1, inner)
    return with_walls(normal.clamp(min=0) * upward + normal.clamp(max=0) * downward, axis)


def _normal_velocity(rho: Tensor, velocity: Velocity, t: float, axis: int) -> Tensor:
    """The component along an axis at the centres of its inner faces, shaped like them."""
    ticks = []
    for a, n in enumerate(rho.shape[1:], 1):
        index = torch.arange(1, n) if a == axis else torch.arange(n) + 0.5
        ticks.append(index.to(rho) / n)
    centres = torch.stack(torch.meshgrid(*ticks, indexing="ij"), dim=-1)
    values = _evaluate(velocity, centres.reshape(-1, len(ticks)), t)
    return values[:, axis - 1].reshape(1, *centres.shape[:-1])


class Split(NamedTuple):
    """The two orthogonal parts of a velocity field on the cells of the unit square, v = gradient + solenoidal."""

    gradient: Float[Tensor, "2 nx ny"]
    solenoidal: Float[Tensor, "2 nx ny"]

    @property
    def solenoidal_share(self) -> float:
        """‖w‖² / ‖v‖² in [0, 1]; NaN for v = 0."""
        stirred = self.solenoidal.square().sum()
        return (stirred / (stirred + self.gradient.square().sum())).item()


def helmholtz(v: Float[Tensor, "2 nx ny"]) -> Split:
    """The Helmholtz decomposition v = ∇p + w with ∇·w = 0 and w tangent to the walls, orthogonal to round-off.

    p lives on the corners of the cells and ∇p is the mean of its differences along the edges, exact for quadratic p.
    The Poisson equation for p (with ∂p/∂n = v·n on the walls) is diagonal in cosines: mode by mode v is projected on
    (sin θ_k cos θ_l / h_x, cos θ_k sin θ_l / h_y), θ_k = πk/2n.

    Args:
        v: cell-centred velocities, component first; v[0] points along the first grid axis. Any square domain will
            do: scaling it leaves the parts as they are.

    Raises:
        ValueError: for fewer than 2 cells an axis or values that are not finite.
    Source: paper eq. (15). Cost: O(nx ny log(nx ny)).
    """
    nx, ny = v.shape[1:]
    if min(nx, ny) < 2:
        raise ValueError(f"helmholtz needs 2 cells or more an axis, got {nx} x {ny}")
    if not torch.isfinite(v).all():
        raise ValueError(f"{int((~torch.isfinite(v)).sum())} values of v are not finite; mask or repair them")
    theta_x = torch.linspace(0, math.pi / 2, nx + 1, dtype=v.dtype)[:, None]
    theta_y = torch.linspace(0, math.pi / 2, ny + 1, dtype=v.dtype)[None, :]
    modes = torch.stack([nx * theta_x.sin() * theta_y.cos(), ny * theta_x.cos() * theta_y.sin()])
    modes[:, [0, -1], [0, -1]] = 0.0  # the constant and the checkerboard have no gradient
    spectrum = torch.zeros_like(modes)
    x, y = v.cpu().numpy()
    spectrum[0, 1:, :-1] = torch.from_numpy(scipy.fft.dst(scipy.fft.dct(x, axis=1, norm="ortho"), axis=0, norm="ortho"))
    spectrum[1, :-1, 1:] = torch.from_numpy(scipy.fft.dct(scipy.fft.dst(y, axis=1, norm="ortho"), axis=0, norm="ortho"))
    size = modes.square().sum(0)
    potential = (modes * spectrum).sum(0) / torch.where(size > 0, size, 1.0)
    x, y = (modes * potential)[0, 1:, :-1].numpy(), (modes * potential)[1, :-1, 1:].numpy()
    x = scipy.fft.idct(scipy.fft.idst(x, axis=0, norm="ortho"), axis=1, norm="ortho")
    y = scipy.fft.idst(scipy.fft.idct(y, axis=0, norm="ortho"), axis=1, norm="ortho")
    gradient = torch.stack([torch.from_numpy(x), torch.from_numpy(y)]).to(v)
    return Split(gradient, v - gradient)


def _evaluate(velocity: Velocity, points: Tensor, t: float) -> Tensor:
    values = velocity(points, t)
    if values.shape != points.shape or not torch.isfinite(values).all():
        raise ValueError(
            f"velocity must return finite values of shape {tuple(points.shape)}, got shape {tuple(values.shape)}"
            f" with {int((~torch.isfinite(values)).sum())} that are not finite"
        )
    return values


def _require_times(steps: int, start: float, stop: float) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (0 <= start <= 1 and 0 <= stop <= 1):
        raise ValueError(f"times must lie in [0, 1], got start={start:g} and stop={stop:g}; rescale the velocity")


def _require_density(density: Tensor) -> None:
    if not 1 <= density.ndim <= 2 or min(density.shape) < 2:
        raise ValueError(f"density must be (nx,) or (nx, ny), 2 cells or more an axis, got {tuple(density.shape)}")
    if not torch.isfinite(density).all() or (density < 0).any():
        raise ValueError(f"density must be finite and nonnegative; its least value is {density.min():g}")
