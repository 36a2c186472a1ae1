"""Heights to begin with: those of a Gaussian map, or those of a coarser problem.

The conjugate of the Brenier potential, u*(y) = sup ⟨x, y⟩ − u(x), has the values −hᵢ at the atoms and as its gradient
the inverse of the optimal map. Where the source has full support that gradient is continuous, however split the atoms
are; so u* of a coarser problem, with atoms Yⱼ merged from neighbours, is interpolated between its atoms from the values
−hⱼ and the gradients bⱼ, the centres of mass of the coarse cells.

Source: Mérigot, Computer Graphics Forum 30 (2011), for the coarse problems; the interpolation is ours.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geodesic.semidiscrete import _samples
from geodesic.semidiscrete._samples import Frame


def gaussian(frame: Frame) -> Float[Tensor, " n"]:
    """Heights hᵢ = −u*(yᵢ) of the optimal map between Gaussians with the covariances of source and atoms.

    With A = Σ_y^½/σ the map is x ↦ A(x − m), and u*(y) = ½⟨y, A⁻¹y⟩ + ⟨y, m⟩, m the mean of the source.
    """
    y = frame.atoms.double()
    spread, centre = (math.sqrt(1 / 12), 0.5) if frame.source == "cube" else (1.0, 0.0)
    if len(y) < y.shape[1]:  # few atoms span little: no matrix of the size of the dimension
        left, singular, _ = torch.linalg.svd(y, full_matrices=False)
        eigenvalues, along = singular.square() / len(y), left * singular
    else:
        eigenvalues, axes = torch.linalg.eigh(y.T @ y / len(y))
        along = y @ axes
    stretch = eigenvalues.clamp(min=1e-6 * float(eigenvalues.max()) + 1e-30).sqrt() / spread
    return -0.5 * (along**2 / stretch).sum(1) - centre * y.sum(1)


def merged(
    frame: Frame, weights: Float[Tensor, " n"], count: int, generator: torch.Generator | None
) -> tuple[Frame, Float[Tensor, " k"]]:
    """The problem with atoms merged around `count` of them, chosen at random: centres of mass, and their masses."""
    picked = torch.randperm(len(frame.atoms), generator=generator)[:count].to(frame.atoms.device)
    group = _nearest(frame.atoms, frame.atoms[picked], 1)[:, 0]
    mass = weights.new_zeros(count).index_add_(0, group, weights)
    weighted = weights[:, None] * frame.atoms.double()
    centres = weighted.new_zeros(count, weighted.shape[1]).index_add_(0, group, weighted) / mass[:, None]
    return Frame(centres.to(frame.atoms), frame.scale, frame.source), mass


def prolonged(
    frame: Frame, coarse: Frame, heights: Float[Tensor, " k"], generator: torch.Generator | None
) -> Float[Tensor, " n"]:
    """Heights −u*(yᵢ) of the atoms, from those of the coarse problem.

    From a coarse atom Y with value −H and gradient b, the trapezoid rule says u*(y) ≈ −H + ⟨(b + b(y))/2, y − Y⟩; both
    this and the gradient b(y) are averages over the d + 1 nearest coarse atoms, with weights that fall with distance.
    """
    centres, seen = _centres_of_mass(coarse, heights, generator)
    atoms, heights = coarse.atoms[seen].double(), heights[seen]
    near = _nearest(frame.atoms, coarse.atoms[seen], min(atoms.shape[1] + 1, len(atoms)))
    offset = frame.atoms.double()[:, None] - atoms[near]  # (n, k, d)
    square = offset.pow(2).sum(2)
    share = (-square / square.mean(1, keepdim=True).clamp(min=1e-300)).softmax(1)
    gradient = (share[:, :, None] * centres[near]).sum(1)
    slope = (centres[near] + gradient[:, None]) / 2
    return -(share * ((slope * offset).sum(2) - heights[near])).sum(1)


def _centres_of_mass(
    frame: Frame, heights: Float[Tensor, " n"], generator: torch.Generator | None
) -> tuple[Float[Tensor, "k d"], Int[Tensor, " k"]]:
    """Centres of mass of the cells that sixteen samples an atom have seen, and the atoms of these cells."""
    n, d = frame.atoms.shape
    count, total = heights.new_zeros(n), heights.new_zeros(n, d)
    for x in _samples.sequence(16 * n, d, frame, generator):
        for rows, scores in zip(_samples.rows(x, n), _samples.tiles(x, frame.atoms, heights.to(x)), strict=True):
            cell = _samples.best(scores)[0]
            count += torch.bincount(cell, minlength=n)
            total.index_add_(0, cell, rows.to(total))
    seen = count.nonzero()[:, 0]
    return total[seen] / count[seen, None], seen


def _nearest(points: Float[Tensor, "m d"], atoms: Float[Tensor, "n d"], k: int) -> Int[Tensor, "m k"]:
    """Indices of the k nearest atoms of each point."""
    return torch.cat([s.topk(k, 1).indices for s in _samples.tiles(points, atoms, -atoms.pow(2).sum(1) / 2)])
