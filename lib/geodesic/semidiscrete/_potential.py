"""The Brenier potential that the solver finds, its maps, and the source from which they carry.

u_h(x) = maxᵢ ⟨x, yᵢ⟩ + hᵢ is convex and piecewise linear; its gradient, constant on each cell, is the optimal map.

Source: Lei, An, Guo, Su, Liu, Luo, Yau & Gu, Engineering 6 (2020), the potential and its energy.

| symbol | identifier | shape | meaning |
|---|---|---|---|
| y | points | (n, d) | atoms |
| ν | weights | (n,) | their masses |
| h | heights | (n,) | heights of the supporting planes, mean zero |
| τ | bandwidth | () | difference of scores below which `extend` blends |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from geodesic.semidiscrete import _samples
from geodesic.semidiscrete._samples import Frame, Source

_ACTIVE = 32  # atoms among which `extend` may blend


@dataclass(frozen=True)
class Progress:
    """One batch: its size, the error it measured before it was used, and the step it led to."""

    batch: int
    samples: int  # drawn so far
    error: float  # held-out relative error, noise removed
    standard_error: float  # of `error` squared
    gain: float  # share of the observed error that is not noise
    empty: int  # cells without a sample


@dataclass(frozen=True)
class Potential:
    """A Brenier potential with its certificate.

    Attributes:
        marginal_error: held-out relative cell-mass error, (Σ νᵢ (μ(Wᵢ)/νᵢ − 1)²)^½, corrected for sampling noise; the
            root mean square of n μ(Wᵢ) − 1 for equal weights.
        standard_error: standard error of the *square* of `marginal_error`.
        iterations: batches drawn; samples: points drawn in all of them, not counting those of coarser problems.
        bandwidth: median difference between best and second-best score, the default blending width of `extend`.
    """

    points: Float[Tensor, "n d"]
    weights: Float[Tensor, " n"]
    heights: Float[Tensor, " n"]
    source: Source
    marginal_error: float
    standard_error: float
    iterations: int
    samples: int
    bandwidth: float
    history: tuple[Progress, ...] = field(repr=False, default=())

    def cell(self, x: Real[Tensor, "m d"]) -> Int[Tensor, " m"]:
        """Index of the cell of each x: the atom with the largest ⟨x, yᵢ⟩ + hᵢ. Cost O(m n d), memory O(m + n)."""
        x, frame = _checked(x, self.points), Frame.of(self.points, self.source)
        h = frame.shrink(self.heights)
        return torch.cat([_samples.best(s)[0] for s in _samples.tiles(x.to(frame.atoms), frame.atoms, h)])

    def transport(self, x: Real[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """T(x) = ∇u_h(x), the atom of the cell of x: the optimal map, discontinuous across the facets."""
        return self.points[self.cell(x)]

    def value(self, x: Real[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """u_h(x) = maxᵢ ⟨x, yᵢ⟩ + hᵢ."""
        cell = self.cell(x)
        return (x * self.points[cell]).sum(1) + self.heights[cell]

    def energy(self, x: Real[Tensor, "m d"]) -> float:
        """E(h) = mean u_h(x) − Σ νᵢhᵢ: at least the mean of ⟨x, y⟩ over every plan between x and the atoms."""
        return float(self.value(x).double().mean() - (self.weights.double() * self.heights.double()).sum())

    def fold_angle(self, x: Real[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """Dihedral angle (radians) at which the supporting planes of the two best atoms of x meet.

        The normals are (yᵢ, −1), with the atoms centred and brought to the spread of the source, so that the angle
        depends neither on the units of the target nor on its place.
        """
        frame = Frame.of(self.points, self.source)
        _, atoms = self._leaders(x, frame, 2)
        return _samples.dihedral(frame.atoms[atoms[:, 0]], frame.atoms[atoms[:, -1]])

    def facet(self, x: Real[Tensor, "m d"]) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"], Float[Tensor, " m"]]:
        """Best and second-best atom of each x, and the distance of x from the hyperplane where they tie."""
        frame = Frame.of(self.points, self.source)
        scores, atoms = self._leaders(x, frame, 2)
        ahead = (frame.atoms[atoms[:, 0]] - frame.atoms[atoms[:, 1]]).norm(dim=1)
        return self.points[atoms[:, 0]], self.points[atoms[:, 1]], (scores[:, 0] - scores[:, 1]) / ahead

    def extend(
        self, x: Real[Tensor, "m d"], angle: float | None = None, bandwidth: float | None = None
    ) -> Float[Tensor, "m d"]:
        """Continuous piecewise-linear map that agrees with `transport` where one atom leads by the bandwidth τ.

        It is the gradient of u_τ(x) = max over convex weights p of Σ pᵢ(⟨x, yᵢ⟩ + hᵢ) − (τ/2)‖p‖², so it is again an
        optimal map. Near a corner of the cells the weights p move over the face of the dual (Delaunay) triangulation
        that belongs to the corner: the map fills the triangulation, where the discrete map only hits its vertices.

        Args:
            x: points of the source.
            angle: when given, an atom takes part only if its plane meets that of the cell's own atom at a dihedral
                angle below it (radians): the map then jumps across the singular set instead of bridging it.
            bandwidth: τ; the median lead when None.
        """
        frame = Frame.of(self.points, self.source)
        weights, atoms = self._blend(x, frame, angle, bandwidth)
        return (weights[:, :, None] * self.points[atoms]).sum(1)

    def singular(self, x: Real[Tensor, "m d"], angle: float, bandwidth: float | None = None) -> Bool[Tensor, " m"]:
        """Whether `extend` would bridge two atoms at x whose planes meet at more than `angle` (radians)."""
        frame = Frame.of(self.points, self.source)
        weights, atoms = self._blend(x, frame, None, bandwidth)
        turned = _samples.dihedral(frame.atoms[atoms[:, :1]], frame.atoms[atoms]) > angle
        return (turned & (weights > 0)).any(1)

    def _leaders(self, x: Tensor, frame: Frame, k: int) -> tuple[Tensor, Tensor]:
        """The k best scores of each x, in decreasing order, and their atoms."""
        x = _checked(x, self.points)
        k = min(k, len(self.points))
        h = frame.shrink(self.heights)
        best = [s.topk(k, dim=1) for s in _samples.tiles(x.to(frame.atoms), frame.atoms, h)]
        return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])

    def _blend(self, x: Tensor, frame: Frame, angle: float | None, bandwidth: float | None) -> tuple[Tensor, Tensor]:
        if bandwidth is not None and not bandwidth >= 0:
            raise ValueError(f"bandwidth is {bandwidth}; it is a difference of scores, at least 0")
        if angle is not None and not angle >= 0:
            raise ValueError(f"angle is {angle}; it is in radians, at least 0")
        width = (self.bandwidth if bandwidth is None else bandwidth) / frame.scale
        scores, atoms = self._leaders(x, frame, _ACTIVE)
        if angle is not None:
            turned = _samples.dihedral(frame.atoms[atoms[:, :1]], frame.atoms[atoms]) > angle
            turned[:, 0] = False
            scores = scores.masked_fill(turned, -math.inf)
        return _samples.project_to_simplex((scores - scores[:, :1]) / max(width, 1e-30)), atoms


def draw(
    n: int, d: int, source: str, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Float[Tensor, "n d"]:
    """Draw n quasi-random points of the source in dimension d, each with exactly its law.

    Raises:
        ValueError: for an unknown source, no points, or a dimension that is not within 1 … 21201.
    """
    if n < 1 or d < 1:
        raise ValueError(f"{n} points in dimension {d} are none; ask for at least one, in at least one dimension")
    frame = Frame(torch.zeros(1, d, device=device), 1.0, source)
    return torch.cat(list(_samples.sequence(n, d, frame, generator)))


def _checked(x: Tensor, points: Tensor) -> Tensor:
    """Points of the source, in the dimension of the atoms."""
    if x.shape[1] != points.shape[1]:
        raise ValueError(f"x has dimension {x.shape[1]}, the atoms have {points.shape[1]}; use the same dimension")
    return _samples.real(x, "points of the source")
