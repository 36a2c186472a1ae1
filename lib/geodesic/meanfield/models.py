"""Neurons, losses and teachers for `geodesic.meanfield`.

Each of the first three functions fixes the inputs x_1 … x_n and returns the function of (particles, weights) that is
∫ Φ(θ, ·) dμ(θ) on them, in one pass that never holds the (m, n, k) array of single neurons. The losses return R;
`arc_cosine_teacher` returns a whole functional, the population risk of a teacher–student problem with Gaussian inputs.

Source: Chizat & Bach (2018) for the models; Cho & Saul (2009), Eq. (6), for the arc-cosine kernel.

| symbol | identifier | meaning |
|---|---|---|
| Φ((w, a), x) = a max(0, ⟨w, x⟩) | relu_neurons | ReLU neuron of one output; 2-homogeneous |
| Φ(z, x) = exp(−(x − z)²/2s²) | bumps | one bump of width s at z, on the line |
| Φ((w, b, a), x) = a max(0, ⟨w, x⟩ + b) | two_layer | the same with bias and several outputs |
| α | scale | multiplies f: 1 is the mean-field scaling, √m the standard one |
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodesic.meanfield._functional import Interaction

Integrate = Callable[[Tensor, Tensor], Tensor]


def relu_neurons(inputs: Float[Tensor, "n d"]) -> Integrate:
    """∫ Φ dμ for Φ((w, a), x) = a max(0, ⟨w, x⟩), particles (w, a) in R^(d + 1); returns (..., n).

    The neuron is 2-homogeneous, so that it is a direction w/‖w‖ with the signed mass a‖w‖. Along any gradient flow
    a² − ‖w‖² keeps its value, and where it starts at zero the sign of a never changes.
    """

    def integrate(particles: Tensor, weights: Tensor) -> Tensor:
        inner, outer = particles[..., :-1], particles[..., -1]
        hidden = (inner @ inputs.T).relu()  # (..., m, n)
        return ((outer * weights).unsqueeze(-2) @ hidden).squeeze(-2)

    return integrate


def bumps(inputs: Float[Tensor, " n"], width: float) -> Integrate:
    """∫ Φ dμ for Φ(z, x) = exp(−(x − z)²/(2 width²)), particles z on the line (p = 1); returns (..., n)."""

    def integrate(particles: Tensor, weights: Tensor) -> Tensor:
        shape = torch.exp(-((inputs - particles) ** 2) / (2 * width**2))  # (..., m, n)
        return (weights.unsqueeze(-2) @ shape).squeeze(-2)

    return integrate


def two_layer(inputs: Float[Tensor, "n d"], outputs: int, scale: float = 1.0) -> Integrate:
    """α ∫ a max(0, ⟨w, x⟩ + b) dμ, particles θ = (w, b, a) in R^(d + 1 + outputs); returns (..., n, outputs).

    With α = 1 and m particles it is the mean-field network (1/m) Σ_j; with α = √m the standard one, (1/√m) Σ_j.
    """
    columns = [inputs.shape[1], 1, outputs]

    def integrate(particles: Tensor, weights: Tensor) -> Tensor:
        inner, bias, outer = particles.split(columns, dim=-1)
        hidden = (inputs @ inner.mT + bias.mT).relu()  # (..., n, m)
        return hidden @ (outer * (scale * weights).unsqueeze(-1))

    return integrate


def half_squared_loss(targets: Float[Tensor, "*outputs"]) -> Callable[[Tensor], Tensor]:
    """R(f) = half the mean over all entries of (f − targets)²; the leading axes of f are batch."""
    axes = tuple(range(-targets.ndim, 0))
    return lambda output: (output - targets).square().mean(axes) / 2


def cross_entropy_loss(labels: Int[Tensor, " n"]) -> Callable[[Tensor], Tensor]:
    """R(f) = mean over n of −log softmax(f)[label], for f of shape (..., n, classes)."""

    def risk(output: Tensor) -> Tensor:
        index = labels.expand(output.shape[:-1]).unsqueeze(-1)
        return -output.log_softmax(-1).gather(-1, index).squeeze(-1).mean(-1)

    return risk


def square_decay(strength: float) -> Callable[[Tensor], Tensor]:
    """V(θ) = (strength/2) ‖θ‖²."""
    return lambda particles: strength / 2 * particles.square().sum(-1)


def teacher_student(teacher: Float[Tensor, "*batch m0 p"], decay: float = 0.0) -> Interaction:
    """Population risk of a student f_μ of the teacher f_ν, ν the uniform measure on the teacher's rows, inputs N(0, I).

    `F(μ) = ½ E (f_μ(x) − f_ν(x))² + (decay/2) ∫ ‖θ‖² dμ`, neurons as in `relu_neurons`, integrals over x in closed form
    (`arc_cosine_kernel`). Inputs uniform on the sphere of radius √d give the same, as Φ is homogeneous in x.

    Args:
        teacher: the rows (w, a) of ν; with leading axes, one teacher for each initialisation of the batch.
        decay: strength of the penalty.
    """
    return Interaction(
        kernel=arc_cosine_kernel,
        linear=lambda particles: arc_cosine_kernel(particles, teacher).mean(-1),
        constant=arc_cosine_kernel(teacher, teacher).mean((-2, -1)) / 2,
        potential=square_decay(decay) if decay else None,
    )


def arc_cosine_kernel(first: Float[Tensor, "*#batch m p"], second: Float[Tensor, "*#batch q p"]) -> Tensor:
    """E Φ(θ, x) Φ(θ′, x) over x ~ N(0, I), for Φ((w, a), x) = a max(0, ⟨w, x⟩) and every pair of rows, (..., m, q).

    `K = a a′ ‖w‖ ‖w′‖ (sin φ + (π − φ) cos φ) / 2π`, φ the angle of w and w′.
    """
    inner, other = first[..., :-1], second[..., :-1]
    lengths = inner.norm(dim=-1).unsqueeze(-1) * other.norm(dim=-1).unsqueeze(-2)
    cosine = inner @ other.mT / lengths.clamp_min(torch.finfo(first.dtype).tiny ** 0.5)
    outer = first[..., -1:] * second[..., -1:].mT
    return outer * lengths * _ArcCosine.apply(cosine.clamp(-1, 1)) / (2 * math.pi)


class _ArcCosine(torch.autograd.Function):
    """J(c) = √(1 − c²) + (π − arccos c) c, whose derivative π − arccos c is finite where those of its parts are not."""

    @staticmethod
    def forward(ctx, cosine):
        angle = cosine.acos()
        ctx.save_for_backward(angle)
        return (1 - cosine.square()).clamp_min(0).sqrt() + (math.pi - angle) * cosine

    @staticmethod
    def backward(ctx, grad):
        (angle,) = ctx.saved_tensors
        return grad * (math.pi - angle)
