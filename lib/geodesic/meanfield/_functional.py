"""Functionals of a measure, F(μ) = R(∫ Φ dμ) + ∫ V dμ, and their derivatives.

A functional is known through one function, its value on weighted particles; everything else is differentiated from it:
in the weights for the first variation, in the positions for the Wasserstein gradient. The two are tied by
`∂F/∂θ_j = w_j ∇F′(μ)(θ_j)`. The symbols are those of `geodesic.meanfield`, which gives all names of this module again.

Source: Chizat & Bach (2018), Section 2; Mei, Montanari & Nguyen (2018).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Functional(Protocol):
    """A functional F of measures, known through its value on weighted particles; all else is differentiated from it."""

    @property
    def inside(self) -> Callable[[Tensor], Tensor] | None:
        """Indicator of Θ, from (..., m, p) to a boolean (..., m); None where Θ is all of R^p."""
        ...

    def energy(self, particles: Float[Tensor, "... m p"], weights: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
        """F(Σ_j w_j δ_{θ_j}), one value for each leading index; differentiable in both arguments."""
        ...


@dataclass(frozen=True)
class Problem:
    """F(μ) = R(∫ Φ dμ) + ∫ V dμ on measures over Θ.

    Attributes:
        integrate: (particles (..., m, p), weights (..., m)) -> ∫ Φ dμ, shape (..., *outputs). It must be linear in the
            weights; Φ(θ, ·) itself is its value on one particle of weight one.
        risk: R, from (..., *outputs) to (...). None together with `integrate` leaves the potential alone.
        potential: V, from (..., m, p) to (..., m). None is V = 0.
        inside: indicator of Θ, from (..., m, p) to a boolean (..., m). None is Θ = R^p.

    Raises:
        ValueError: if only one of `integrate` and `risk` is given, or nothing at all.
    """

    integrate: Callable[[Tensor, Tensor], Tensor] | None = None
    risk: Callable[[Tensor], Tensor] | None = None
    potential: Callable[[Tensor], Tensor] | None = None
    inside: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.integrate is None) != (self.risk is None):
            raise ValueError("a Problem needs integrate and risk together, or neither; got only one of them")
        if self.risk is None and self.potential is None:
            raise ValueError("a Problem without risk and potential has nothing to minimise; give at least one")

    def energy(self, particles: Float[Tensor, "... m p"], weights: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
        """F(Σ_j w_j δ_{θ_j}) = R(f_μ) + Σ_j w_j V(θ_j)."""
        value = particles.new_zeros(particles.shape[:-2])
        if self.integrate is not None and self.risk is not None:
            value = value + self.risk(self.integrate(particles, weights))
        if self.potential is not None:
            value = value + (weights * self.potential(particles)).sum(-1)
        return value


@dataclass(frozen=True)
class Interaction:
    """F(μ) = ½ ∬ K dμ dμ − ∫ h dμ + c + ∫ V dμ: the squared loss with its inputs integrated out.

    For `R(f) = ½ E(f(x) − y(x))²` expanding the square gives `K(θ, θ′) = E Φ(θ, x) Φ(θ′, x)`,
    `h(θ) = E Φ(θ, x) y(x)` and `c = ½ E y²`; where these are known the flow of the population risk is followed
    without drawing a single input.

    Attributes:
        kernel: K, from ((..., m, p), (..., q, p)) to (..., m, q), symmetric.
        linear: h, from (..., m, p) to (..., m).
        constant: c, a number or one value for each leading index.
        potential: V, from (..., m, p) to (..., m). None is V = 0.
        inside: indicator of Θ, from (..., m, p) to a boolean (..., m). None is Θ = R^p.

    Source: Mei, Montanari & Nguyen (2018), Eq. (2).
    """

    kernel: Callable[[Tensor, Tensor], Tensor]
    linear: Callable[[Tensor], Tensor]
    constant: Tensor | float = 0.0
    potential: Callable[[Tensor], Tensor] | None = None
    inside: Callable[[Tensor], Tensor] | None = None

    def energy(self, particles: Float[Tensor, "... m p"], weights: Float[Tensor, "... m"]) -> Float[Tensor, "..."]:
        """½ Σ_ij w_i w_j K(θ_i, θ_j) − Σ_j w_j h(θ_j) + c + Σ_j w_j V(θ_j). Cost O(m²)."""
        smoothed = (self.kernel(particles, particles) @ weights.unsqueeze(-1)).squeeze(-1)  # (..., m)
        single = smoothed / 2 - self.linear(particles)
        if self.potential is not None:
            single = single + self.potential(particles)
        return (weights * single).sum(-1) + self.constant


def uniform_weights(particles: Float[Tensor, "... m p"]) -> Float[Tensor, "... m"]:
    """The weights 1/m of the measure a network of m neurons stands for."""
    return torch.full_like(particles[..., 0], 1 / particles.shape[-2])


def energy(problem: Functional, particles: Float[Tensor, "... m p"]) -> Float[Tensor, "..."]:
    """F(μ_m) for m particles of equal weight, without gradient."""
    with torch.no_grad():
        return problem.energy(particles, uniform_weights(particles))


def first_variation(
    problem: Functional,
    particles: Float[Tensor, "*batch m p"],
    points: Float[Tensor, "*batch q p"] | None = None,
    weights: Float[Tensor, "*batch m"] | None = None,
) -> Float[Tensor, "*batch q"]:
    """F′(μ) at `points`: the derivative of F when mass is added there.

    By definition `d/dε F(μ + ε δ_θ)` at ε = 0, and that is how it is computed: the points join the particles with
    weight zero, and F is differentiated in those weights. For a `Problem` it equals ⟨∇R(f_μ), Φ(θ, ·)⟩ + V(θ). It
    can be differentiated again in `points` when they require a gradient.

    Args:
        problem: F.
        particles: support of μ.
        points: where F′ is wanted; the particles themselves if None.
        weights: weights of the particles, 1/m if None.

    Returns:
        F′(μ)(points). Between probability measures only its differences matter; the constant here is F's own.
    """
    weights = uniform_weights(particles) if weights is None else weights
    with torch.enable_grad():
        if points is None:
            mass = weights.detach().requires_grad_()
            return torch.autograd.grad(problem.energy(particles.detach(), mass).sum(), mass)[0]
        added = torch.zeros_like(points[..., 0]).detach().requires_grad_()
        support = torch.cat([particles.detach(), points], -2)
        value = problem.energy(support, torch.cat([weights.detach(), added], -1)).sum()
        return torch.autograd.grad(value, added, create_graph=points.requires_grad)[0]


def wasserstein_gradient(problem: Functional, particles: Float[Tensor, "*batch m p"]) -> Float[Tensor, "*batch m p"]:
    """∇F′(μ_m) at the particles: m times the gradient of F in the parameters, minus the velocity of the flow."""
    return energy_and_gradient(problem, particles)[1]


def energy_and_gradient(problem: Functional, particles: Tensor) -> tuple[Tensor, Tensor]:
    """F(μ_m), shape (...), and ∇F′(μ_m) at the particles, shape (..., m, p), from one pass forward and back."""
    leaf = particles.detach().requires_grad_()
    with torch.enable_grad():
        value = problem.energy(leaf, uniform_weights(leaf))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient * particles.shape[-2]
