"""Wasserstein gradient flows of functionals of a measure, followed by particles.

The training of a wide two-layer network is a curve of probability measures over its neurons. With
`f_μ = ∫ Φ(θ, ·) dμ(θ)` and `F(μ) = R(f_μ) + ∫ V dμ` it is the gradient flow of F for the Wasserstein metric,

    ∂_t μ = ∇·(μ ∇F′(μ)) + τ Δμ,        F′(μ)(θ) = ⟨∇R(f_μ), Φ(θ, ·)⟩ + V(θ),

and `m` particles of weight `1/m` that move with the velocity `−∇F′(μ_m)` follow it exactly when τ = 0. Because
`∂F/∂θ_j = (1/m) ∇F′(θ_j)`, that is gradient descent with the step **multiplied by m**.

Source: Chizat & Bach (2018); Mei, Montanari & Nguyen (2018); Rotskoff & Vanden-Eijnden (2018); Sirignano & Spiliopoulos
(2018); the minimising movement is that of Jordan, Kinderlehrer & Otto (1998).

| symbol | identifier | shape | meaning |
|---|---|---|---|
| θ_j | particles | (..., m, p) | parameters of the m neurons; leading axes are independent initialisations |
| μ_m | particles, weights | (..., m) | the measure Σ_j w_j δ_{θ_j}; w_j = 1/m unless weights are given |
| f_μ | integrate(particles, weights) | (..., *outputs) | ∫ Φ(θ, ·) dμ(θ), the network on its inputs |
| R | risk | (...) | convex loss of f_μ |
| V | potential | (..., m) | convex penalty of one particle |
| F(μ) | problem.energy | (...) | R(f_μ) + ∫ V dμ |
| F′(μ) | first_variation | (..., q) | first variation at q points |
| ∇F′(μ) | wasserstein_gradient | (..., m, p) | minus the velocity of the particles |
| τ | noise | scalar | temperature; adds τ ∫ log μ dμ to F |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from geodesic.meanfield._functional import (
    Functional,
    energy_and_gradient,
    uniform_weights,
    wasserstein_gradient,
)

METHODS = ("euler", "heun", "rk4", "jko")


@dataclass(frozen=True)
class Trajectory:
    """A flow at its recorded times.

    Attributes:
        times: (times,), in the flow's own unit: θ′ = −∇F′.
        particles: (times, ..., m, p).
        energies: (times, ...), F(μ_m), without the entropy when there is noise.
        dissipation: (times, ...), ∫ ‖∇F′‖² dμ_m, the rate −dF/dt of the flow without noise.
        dissipated: (times, ...), ∫_0^t of that rate by the trapezium rule over **every** step taken, so that
            `imbalance` is what the scheme fails to balance.
        method: the scheme.
        noise: τ.
    """

    times: Float[Tensor, " times"]
    particles: Float[Tensor, "times ... m p"]
    energies: Float[Tensor, "times ..."]
    dissipation: Float[Tensor, "times ..."]
    dissipated: Float[Tensor, "times ..."]
    method: str
    noise: float

    def imbalance(self) -> Float[Tensor, "times ..."]:
        """F(0) − F(t) − ∫_0^t ∫ ‖∇F′‖² dμ ds, in the unit of F: zero for the exact flow, O(step) for Euler."""
        return self.energies[0] - self.energies - self.dissipated


def flow(
    problem: Functional,
    particles: Float[Tensor, "*batch m p"],
    times: Float[Tensor, " times"] | Sequence[float | int],
    method: str = "euler",
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    substeps: int = 1,
    slack: float = 0.0,
) -> Trajectory:
    """Follow the Wasserstein gradient flow of F from m particles, all leading axes at once.

    `θ_j′ = −∇F′(μ_m)(θ_j)`, plus `√(2τ) dB_j` with noise τ, which is the mean-field Langevin dynamics: the flow of
    F(μ) + τ ∫ log μ dμ.

    Args:
        problem: F.
        particles: initial positions, float32 or float64, on any device.
        times: increasing times ≥ 0; the first is the time of `particles`, and the state is kept at each.
        method: "euler" (order 1), "heun" (2), "rk4" (4), explicit; "jko", the minimising movement, implicit, order 1.
        noise: τ ≥ 0; Euler–Maruyama, so it needs method "euler".
        generator: source of the noise, on the particles' device.
        substeps: steps taken between two recorded times.
        slack: rise of the energy in one step that is put up with, relative to one plus its size. Zero, which still
            forgives rounding, is right for a differentiable F; where ReLU neurons meet finitely many inputs F has
            kinks, and a flow that slides along one lowers it on average only.

    Raises:
        ValueError: particles empty, non-finite, or outside Θ; times negative or unsorted; unknown method;
            noise negative or with another method than Euler.
        RuntimeError: a step raised the energy or left Θ, or the inner problem of "jko" did not converge.
    """
    grid = _checked_times(times, particles)
    _check_arguments(problem, particles, method, noise, substeps)
    slack += 100 * torch.finfo(particles.dtype).eps
    value, gradient = energy_and_gradient(problem, particles)
    if not value.isfinite().all():
        raise ValueError(f"the energy of the initial particles is {value.tolist()}; check the inputs of the problem")
    rate, spent = _dissipation(gradient), torch.zeros_like(value)
    kept = [(particles, value, rate, spent)]
    for start, stop in pairwise(grid.tolist()):
        step = (stop - start) / substeps
        for index in range(substeps):
            moved = _step(problem, particles, gradient, step, method)
            new_value, gradient = energy_and_gradient(problem, moved)
            _refuse_rise(value, new_value, start + index * step, step, slack)
            before, rate = rate, _dissipation(gradient)
            spent = spent + step / 2 * (before + rate)
            if noise > 0:
                kick = torch.randn(moved.shape, generator=generator, dtype=moved.dtype, device=moved.device)
                moved = moved + (2 * noise * step) ** 0.5 * kick
                new_value, gradient = energy_and_gradient(problem, moved)
                rate = _dissipation(gradient)
            if outside := _count_outside(problem, moved):
                raise RuntimeError(
                    f"{outside} particles left Θ in the step of {step:.3g} at time {start + index * step:.3g}; take "
                    f"smaller steps or a potential that keeps them inside"
                )
            particles, value = moved, new_value
        kept.append((particles, value, rate, spent))
    return Trajectory(grid, *map(torch.stack, zip(*kept, strict=True)), method=method, noise=noise)


def minimising_movement(
    problem: Functional,
    particles: Float[Tensor, "*batch m p"],
    step: float,
    tolerance: float | None = None,
    iterations: int = 500,
) -> Float[Tensor, "*batch m p"]:
    """One step of Jordan, Kinderlehrer & Otto among measures of m particles: argmin_ν F(ν) + W₂²(μ_m, ν) / (2 step).

    The minimum over ν and over the pairing of its particles with those of μ_m is a minimum over labelled particles,
    because F does not see labels: `min_Y F(Y) + Σ_j ‖y_j − θ_j‖² / (2 m step)`. It is solved by L-BFGS from
    `particles`, and its optimality condition `y_j = θ_j − step ∇F′(ν)(y_j)` is the implicit Euler scheme. Meant for
    small m.

    Args:
        problem: F.
        particles: μ_m.
        step: time step > 0.
        tolerance: largest accepted entry of the optimality residual `∇F′(ν) + (y − θ)/step`, relative to one plus
            that of the gradient at the start. None is 10 √ε of the dtype: the search compares energies, which settle a
            minimiser to √ε.
        iterations: at most so many L-BFGS iterations.

    Raises:
        ValueError: if the step is not positive.
        RuntimeError: if the residual is above the tolerance at the end; says what was reached.
    """
    if not step > 0:
        raise ValueError(f"the step of a minimising movement must be positive, got {step}")
    m = particles.shape[-2]
    moved = particles.detach().clone().requires_grad_()
    tolerance = 10 * torch.finfo(particles.dtype).eps ** 0.5 if tolerance is None else tolerance
    goal = tolerance * (1 + float(wasserstein_gradient(problem, particles).abs().max()))
    solver = torch.optim.LBFGS(
        [moved], max_iter=iterations, tolerance_grad=goal / 10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        distance = (moved - particles).square().sum((-2, -1)) / (2 * step)
        value = (m * problem.energy(moved, uniform_weights(moved)) + distance).sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(objective)
    moved = moved.detach()
    residual = float((wasserstein_gradient(problem, moved) + (moved - particles) / step).abs().max())
    if not residual <= goal:
        raise RuntimeError(
            f"the minimising movement reached a residual of {residual:.2e}, above {goal:.2e}; take a smaller step "
            f"(now {step:.3g}), more iterations (now {iterations}), or double precision (now {particles.dtype})"
        )
    return moved


def _step(problem: Functional, particles: Tensor, gradient: Tensor, step: float, method: str) -> Tensor:
    """One step from `particles`, where ∇F′ is `gradient`."""
    if method == "euler":
        return particles - step * gradient
    if method == "heun":
        slope = wasserstein_gradient(problem, particles - step * gradient)
        return particles - step / 2 * (gradient + slope)
    if method == "rk4":
        second = wasserstein_gradient(problem, particles - step / 2 * gradient)
        third = wasserstein_gradient(problem, particles - step / 2 * second)
        fourth = wasserstein_gradient(problem, particles - step * third)
        return particles - step / 6 * (gradient + 2 * second + 2 * third + fourth)
    return minimising_movement(problem, particles, step)


def _dissipation(gradient: Tensor) -> Tensor:
    return gradient.square().sum((-2, -1)) / gradient.shape[-2]


def _refuse_rise(before: Tensor, after: Tensor, time: float, step: float, slack: float) -> None:
    """Stop where the energy rises beyond the slack, or is no number."""
    if bool((after <= before + slack * (1 + before.abs())).all()):
        return
    worst = int((after - before).nan_to_num(torch.inf).argmax())
    raise RuntimeError(
        f"the step of {step:.3g} at time {time:.3g} raised the energy from {before.flatten()[worst]:.9g} to "
        f"{after.flatten()[worst]:.9g} (initialisation {worst}); take smaller steps, for instance {step / 4:.3g} "
        f"through substeps, or method 'jko'; where F has kinks, allow a slack"
    )


def _count_outside(problem: Functional, particles: Tensor) -> int:
    return 0 if problem.inside is None else int((~problem.inside(particles)).sum())


def _checked_times(times: Tensor | Sequence[float | int], particles: Tensor) -> Tensor:
    grid = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    if grid.ndim != 1 or len(grid) == 0:
        raise ValueError(f"times must be a non-empty list of numbers, got shape {tuple(grid.shape)}")
    if not bool(grid.isfinite().all()) or bool((grid < 0).any()):
        raise ValueError(f"times must be finite and not negative, got {grid.tolist()[:8]}")
    if bool((grid.diff() <= 0).any()):
        raise ValueError(f"times must increase strictly, got {grid.tolist()[:8]}; sort them and drop repetitions")
    return grid


def _check_arguments(problem: Functional, particles: Tensor, method: str, noise: float, substeps: int) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if not 0 <= noise < float("inf") or (noise > 0 and method != "euler"):
        raise ValueError(
            f"noise must be finite, not negative, and used with 'euler'; got noise {noise} with {method!r}"
        )
    if substeps < 1:
        raise ValueError(f"substeps must be at least 1, got {substeps}")
    if particles.numel() == 0:
        raise ValueError(f"there are no particles: shape {tuple(particles.shape)}; give at least one")
    if not bool(particles.isfinite().all()):
        raise ValueError(
            f"{int((~particles.isfinite()).sum())} entries of the particles are not finite; clean them first"
        )
    if outside := _count_outside(problem, particles):
        raise ValueError(
            f"{outside} of {particles[..., 0].numel()} particles lie outside Θ; project them into it or redraw them"
        )
