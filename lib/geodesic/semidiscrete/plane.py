"""Semi-discrete optimal transport in the unit square, exactly: power cells as polygons, Newton's method on the heights.

The source is uniform on [0, 1]², the targets are atoms yᵢ with weights νᵢ, u_h(x) = maxᵢ ⟨x, yᵢ⟩ + hᵢ is the Brenier
potential and Wᵢ(h) the part of the square where atom i attains the maximum. The energy E(h) = ∫ u_h dx − Σ νᵢhᵢ is
convex, with

    ∂E/∂hᵢ = |Wᵢ| − νᵢ      ∂²E/∂hᵢ∂hⱼ = −|Wᵢ ∩ Wⱼ| / ‖yᵢ − yⱼ‖   (i ≠ j, |·| the length of the common side).

Source: Gu, Luo, Sun & Yau, arXiv:1302.5472 (energy and its derivatives); Kitagawa, Mérigot & Thibert,
arXiv:1603.05579 (the damping that makes Newton's method converge from any heights without empty cells).

| symbol | identifier | shape | meaning |
|---|---|---|---|
| y | points | (n, 2) | atoms of the target |
| ν | weights | (n,) | their masses, positive, summing to one |
| h | heights | (n,) | heights of the supporting planes, mean zero |
| Wᵢ | polygons[i] | (k, 2) | power cell, corners counter-clockwise |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from scipy.sparse import coo_array, csr_array
from scipy.sparse.linalg import spsolve
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

from geodesic.semidiscrete import _samples

_OUTSIDE = -1  # label of a side that lies on the border of the square
_SHRINK = 0.5  # factor of the damped steps


@dataclass(frozen=True)
class PowerDiagram:
    """Cells of u_h in the unit square.

    Attributes:
        points: atoms yᵢ, (n, 2).
        heights: hᵢ, (n,).
        polygons: corners of each cell, counter-clockwise; an empty cell has none.
        areas: |Wᵢ|, (n,), summing to one.
        centroids: centre of mass of each cell, (n, 2); nan where the cell is empty.
        sides: pairs i < j of cells with a common side, (m, 2).
        lengths: length of that side, (m,).
    """

    points: Float[Tensor, "n 2"]
    heights: Float[Tensor, " n"]
    polygons: tuple[Tensor, ...]
    areas: Float[Tensor, " n"]
    centroids: Float[Tensor, "n 2"]
    sides: Int[Tensor, "m 2"]
    lengths: Float[Tensor, " m"]

    def energy(self, weights: Float[Tensor, " n"]) -> float:
        """E(h) = ∫ u_h dx − Σ νᵢhᵢ; u_h is linear on each cell, so the integral is exact."""
        full = self.areas > 0
        values = (self.centroids[full] * self.points[full]).sum(1) + self.heights[full]
        return float((self.areas[full] * values).sum() - (weights * self.heights).sum())

    def gradient(self, weights: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """∂E/∂hᵢ = |Wᵢ| − νᵢ."""
        return self.areas - weights

    def hessian(self) -> csr_array:
        """Hessian of E, sparse (n, n): the graph Laplacian with weight |Wᵢ ∩ Wⱼ| / ‖yᵢ − yⱼ‖ on the common sides."""
        i, j = self.sides.numpy().T
        rate = (self.lengths / (self.points[i] - self.points[j]).norm(dim=1)).numpy()
        n = len(self.points)
        rows = np.concatenate([i, j, i, j])
        columns = np.concatenate([j, i, i, j])
        return coo_array((np.concatenate([-rate, -rate, rate, rate]), (rows, columns)), shape=(n, n)).tocsr()


def _neighbours(points: np.ndarray, heights: np.ndarray) -> list[set[int]]:
    """Candidates for a common side: the edges of the lower hull of (yᵢ, −hᵢ), the dual (regular) triangulation."""
    n = len(points)
    everyone = [set(range(n)) - {i} for i in range(n)]
    if n <= 4:
        return everyone
    try:
        hull = ConvexHull(np.column_stack([points, -heights]))
    except QhullError:  # all lifted atoms in one plane: no triangulation, and no hurry
        return everyone
    near: list[set[int]] = [set() for _ in range(n)]
    for a, b, c in hull.simplices[hull.equations[:, 2] <= 0].tolist():
        near[a] |= {b, c}
        near[b] |= {a, c}
        near[c] |= {a, b}
    return near


def _clip(corners: list, labels: list, normal: tuple[float, float], offset: float, label: int) -> tuple[list, list]:
    """Cut a convex polygon by ⟨x, normal⟩ ≤ offset; labels[k] names the line of the side from corner k to k + 1."""
    inside = [normal[0] * x + normal[1] * y - offset for x, y in corners]
    kept, names = [], []
    for k, (x, y) in enumerate(corners):
        here, after = inside[k], inside[(k + 1) % len(corners)]
        if here <= 0:
            kept.append((x, y))
            names.append(labels[k])
        if (here < 0 < after) or (after < 0 < here):
            t = here / (here - after)
            nx, ny = corners[(k + 1) % len(corners)]
            kept.append((x + t * (nx - x), y + t * (ny - y)))
            names.append(label if here < 0 else labels[k])
        elif here == 0 < after:
            names[-1] = label
    return (kept, names) if len(kept) > 2 else ([], [])


def _cell(i: int, points: np.ndarray, heights: np.ndarray, near: set[int]) -> tuple[list, list]:
    """Polygon of cell i and, for each side, the atom beyond it."""
    corners, labels = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)], [_OUTSIDE] * 4
    for j in near:
        normal = (points[j, 0] - points[i, 0], points[j, 1] - points[i, 1])
        corners, labels = _clip(corners, labels, normal, heights[i] - heights[j], j)
        if not corners:
            break
    return corners, labels


def _area_and_centroid(polygon: np.ndarray) -> tuple[float, np.ndarray]:
    """Shoelace formula; the centre of mass of nothing is nan."""
    if len(polygon) == 0:
        return 0.0, np.full(2, np.nan)
    x, y = polygon.T
    nx, ny = np.roll(x, -1), np.roll(y, -1)
    cross = x * ny - nx * y
    area = cross.sum() / 2
    if area <= 0:
        return 0.0, np.full(2, np.nan)
    return area, np.array([((x + nx) * cross).sum(), ((y + ny) * cross).sum()]) / (6 * area)


def diagram(points: Real[Tensor, "n d"], heights: Real[Tensor, " m"]) -> PowerDiagram:
    """Power diagram of u_h(x) = maxᵢ ⟨x, yᵢ⟩ + hᵢ in the unit square, in double precision.

    Args:
        points: atoms, (n, 2); the diagram does not change when all of them are translated.
        heights: (n,).

    Returns:
        the cells with their areas, centres of mass and common sides. Cost O(n log n).

    Raises:
        ValueError: points that are not in the plane, values that are not finite, or not one height a point.
    """
    if len(heights) != len(points):
        raise ValueError(f"{len(heights)} heights for {len(points)} points; give one to each point")
    y, h = _in_plane(points).numpy(), _samples.real(heights, "heights").double().cpu().numpy()
    near = _neighbours(y, h)
    polygons, areas, centroids, sides = [], [], [], {}
    for i in range(len(y)):
        corners, labels = _cell(i, y, h, near[i] if near[i] else set())
        hidden = len(y) > 1 and not near[i]  # below the hull of the others: dominated everywhere
        polygon = np.array([] if hidden else corners).reshape(-1, 2)
        area, centroid = _area_and_centroid(polygon)
        polygon = polygon if area > 0 else polygon[:0]
        polygons.append(torch.from_numpy(polygon))
        areas.append(area)
        centroids.append(centroid)
        for k in range(len(polygon)):
            if labels[k] > i:
                sides[i, labels[k]] = float(np.linalg.norm(polygon[k] - polygon[(k + 1) % len(polygon)]))
    pairs = torch.tensor(list(sides), dtype=torch.long).reshape(-1, 2)
    lengths = torch.tensor(list(sides.values()), dtype=torch.float64)
    return PowerDiagram(
        torch.from_numpy(y),
        torch.from_numpy(h),
        tuple(polygons),
        torch.tensor(areas, dtype=torch.float64),
        torch.from_numpy(np.array(centroids)),
        pairs,
        lengths,
    )


@dataclass(frozen=True)
class PlaneSolution:
    """Outcome of `solve`: the last diagram, and one (diagram, relative error) for every Newton step."""

    heights: Float[Tensor, " n"]
    diagram: PowerDiagram
    history: tuple[tuple[PowerDiagram, float], ...]


def _in_plane(points: Real[Tensor, "n d"]) -> Float[Tensor, "n 2"]:
    """The points in double precision, where polygons are cut."""
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points have shape {tuple(points.shape)}; the plane takes (n, 2)")
    return _samples.real(points.detach(), "points").double().cpu()


def start_heights(points: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
    """Heights −(s/2)‖yᵢ − c‖² of the Voronoi cells of the atoms s(yᵢ − c), shrunk into the square: no cell is empty."""
    low, high = points.double().min(0).values, points.double().max(0).values
    scale = 0.9 / (high - low).max().clamp(min=1e-300)
    corner = (low + high) / 2 - 0.5 / scale
    return -(scale / 2) * (points.double() - corner).pow(2).sum(1)


def solve(
    points: Real[Tensor, "n d"],
    weights: Real[Tensor, " m"] | None = None,
    tol: float = 1e-9,
    max_iterations: int = 100,
) -> PlaneSolution:
    """Heights whose cells have areas νᵢ, by damped Newton steps on E.

    Each step solves (Hessian) δ = ν − areas and is halved until the smallest cell keeps at least half of what it
    must, and the error falls; both always happen for a short enough step.

    Args:
        points: distinct atoms, (n, 2).
        weights: ν, positive, summing to one; uniform when None.
        tol: largest admitted relative error (Σ νᵢ (|Wᵢ|/νᵢ − 1)²)^½.
        max_iterations: Newton steps before giving up.

    Raises:
        ValueError: repeated or non-finite points, points that are not in the plane, or wrong weights.
        RuntimeError: the error is still above tol after max_iterations steps; the message has the error reached.
    """
    if not 0 < tol < 1:
        raise ValueError(f"tol is {tol}; it is a relative error between 0 and 1, for instance 1e-9")
    points = _in_plane(points)
    weights = _samples.check_atoms(points, weights)
    weights = weights / weights.sum()  # single precision is a hundred times coarser than tol
    now = diagram(points, start_heights(points))
    least = 0.5 * min(float(now.areas.min()), float(weights.min()))
    history = [(now, _relative_error(now, weights))]
    while history[-1][1] > tol:
        if len(history) > max_iterations or least <= 0:
            raise RuntimeError(
                f"Newton's method reached a relative error of {history[-1][1]:.2e} in {len(history) - 1} steps, "
                f"not tol = {tol:g}; raise max_iterations, or remove atoms that (almost) coincide"
            )
        now = _newton_step(now, weights, least)
        history.append((now, _relative_error(now, weights)))
    return PlaneSolution(now.heights - now.heights.mean(), now, tuple(history))


def _relative_error(cells: PowerDiagram, weights: Float[Tensor, " n"]) -> float:
    """(Σ νᵢ (|Wᵢ|/νᵢ − 1)²)^½: with equal weights the root mean square of n|Wᵢ| − 1."""
    return float(((cells.areas - weights).pow(2) / weights).sum().sqrt())


def _newton_step(now: PowerDiagram, weights: Float[Tensor, " n"], least: float) -> PowerDiagram:
    """One damped Newton step; the last atom is held, because adding a constant to h changes nothing."""
    residual = -now.gradient(weights)
    direction = torch.zeros(len(weights), dtype=torch.float64)
    solution = spsolve(now.hessian()[:-1, :-1].tocsc(), residual[:-1].numpy())
    direction[:-1] = torch.as_tensor(solution, dtype=torch.float64).reshape(-1)
    step, error = 1.0, float(residual.norm())
    for _ in range(60):
        trial = diagram(now.points, now.heights + step * direction)
        if trial.areas.min() >= least and float(trial.gradient(weights).norm()) <= (1 - step / 2) * error:
            return trial
        step *= _SHRINK
    raise RuntimeError(f"no step of Newton's method reduces the error below {error:.2e}; the atoms may almost coincide")
