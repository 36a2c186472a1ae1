"""Newton steps on the graph of neighbouring power cells, estimated from samples.

The Hessian of the semi-discrete energy is the Laplacian of a graph: cells i and j are joined with the rate at which
mass crosses their facet when a height changes, μ(facet)/‖yᵢ − yⱼ‖. A sample of cell i whose second-best atom is j, at a
gap s between the two scores, changes sides when the heights move by s. Lowering hᵢ by s leaves the points of Wᵢ whose
gap is above s; for a cell that shrinks to a point at s = S in its own shape that is the share (1 − s/S)ᵈ, so the mean
gap is S/(d + 1), and the points with second-best atom j carry the mass S/d · rateᵢⱼ. Hence

    rateᵢⱼ ≈ d/(d + 1) · μ(points of Wᵢ with second-best atom j) / (mean gap in Wᵢ),

a count of samples with no bandwidth to choose, exact in one dimension. Each facet is seen from both its sides; the mean
of the two estimates is used.

Source: Kitagawa, Mérigot & Thibert, arXiv:1603.05579, Theorem 4.1 for the Hessian; the estimate is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LEAST_DAMPING = 1e-6


@dataclass(frozen=True)
class Graph:
    """Edges (i, j) with conductances; an edge may occur many times, once for each sample that saw it.

    `depth` is the height S above its neighbours at which the cell of an atom, shrinking in its own shape, is gone.
    """

    i: Int[Tensor, " e"]
    j: Int[Tensor, " e"]
    conductance: Float[Tensor, " e"]
    degree: Float[Tensor, " n"]
    depth: Float[Tensor, " n"]
    dimension: int

    def joined(self, i: Int[Tensor, " e"], j: Int[Tensor, " e"], mass: Float[Tensor, " e"]) -> Graph:
        """The graph with empty cells i beside the cells j that they touch, as if they had this mass and j's depth."""
        conductance = self.dimension * mass / self.depth[j]
        degree = self.degree.index_add(0, i, conductance).index_add(0, j, conductance)
        edges = (torch.cat([self.i, i]), torch.cat([self.j, j]), torch.cat([self.conductance, conductance]))
        return Graph(*edges, degree, self.depth.index_copy(0, i, self.depth[j]), self.dimension)

    def limit(self, v: Float[Tensor, " n"], ratio: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The step v with no cell moved so far against its neighbours that its mass passes `ratio` by a factor of 4.

        A cell of mass m raised by δ against its neighbours has m(1 + δ/S)ᵈ if it keeps its shape.
        """
        beside = v.new_zeros(len(v)).index_add_(0, self.i, self.conductance * v[self.j])
        beside = beside.index_add_(0, self.j, self.conductance * v[self.i]) / self.degree.clamp(min=1e-300)
        low = (ratio.clamp(max=1) / 4) ** (1 / self.dimension) - 1
        high = (ratio.clamp(min=1) * 4) ** (1 / self.dimension) - 1
        return beside + (v - beside).clamp(low * self.depth, high * self.depth)

    def apply(self, v: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Laplacian times v: Σⱼ wᵢⱼ (vᵢ − vⱼ)."""
        flow = self.conductance * (v[self.i] - v[self.j])
        return torch.zeros_like(v).index_add_(0, self.i, flow).index_add_(0, self.j, -flow)


def facets(
    atoms: Float[Tensor, "n d"], best: Int[Tensor, " m"], second: Int[Tensor, " m"], gap: Float[Tensor, " m"]
) -> Graph:
    """Graph whose Laplacian estimates the Hessian of the energy from the two best atoms of m samples.

    Args:
        atoms: yᵢ, (n, d).
        best: index of the best atom of each sample.
        second: index of its second-best atom.
        gap: difference of their scores, nonnegative.
    """
    n, d = atoms.shape
    total = torch.full((n,), float(gap.median()), dtype=torch.float64, device=atoms.device)
    mean_gap = total.index_add_(0, best, gap.double()) / (1 + torch.bincount(best, minlength=n))
    i, j = best, second
    conductance = d / (d + 1) / (2 * len(gap) * mean_gap[best])
    degree = torch.zeros(len(atoms), dtype=torch.float64, device=atoms.device)
    degree.index_add_(0, i, conductance).index_add_(0, j, conductance)
    return Graph(i, j, conductance, degree, (d + 1) * mean_gap, d)


@dataclass(frozen=True)
class Newton:
    """Everything a step needs, kept so that a refused step can be taken again, shorter."""

    heights: Float[Tensor, " n"]
    graph: Graph
    residual: Float[Tensor, " n"]
    ratio: Float[Tensor, " n"]  # target mass over the mass seen
    square: float  # squared relative error at `heights`, and its standard error
    standard_error: float
    gain: float

    def step(self, damping: float) -> Float[Tensor, " n"]:
        """Heights after h + gain · (L + damping · mean degree)⁻¹ residual; long damping means a short step."""
        shift = max(damping, _LEAST_DAMPING) * float(self.graph.degree.mean())
        step = self.gain * _conjugate_gradients(self.graph, shift, self.residual)
        return self.heights + self.graph.limit(step, self.ratio)


def _conjugate_gradients(
    graph: Graph, shift: float, target: Float[Tensor, " n"], rtol: float = 1e-2, limit: int = 200
) -> Float[Tensor, " n"]:
    """Solve (L + shift) v = target to a hundredth: sampling noise in L and target makes more digits pointless."""
    diagonal = graph.degree + shift
    v, r = torch.zeros_like(target), target.clone()
    p = z = r / diagonal
    product, goal = r @ z, rtol * r.norm()
    for _ in range(limit):
        if r.norm() <= goal:
            break
        image = graph.apply(p) + shift * p
        length = product / (p @ image)
        v, r = v + length * p, r - length * image
        z = r / diagonal
        previous, product = product, r @ z
        p = z + product / previous * p
    return v - v.mean()
