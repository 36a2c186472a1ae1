"""The same gradient flow as a partial differential equation on a grid, to check the particles against.

    ∂_t ρ = ∇·(ρ ∇F′(ρ)) + τ Δρ   on a box, no flux through its sides,

by finite volumes in any dimension (meant for 1 and 2): the velocity −∇F′ lives on the faces, the density is taken from
the upwind cell, and explicit steps are as long as positivity allows. Mass is kept to rounding, the density stays
positive, and the error is of first order in the cell size.

Source: Carrillo, Chertock & Huang (2015), Section 2, at first order and with the diffusion kept apart.

| symbol | identifier | shape | meaning |
|---|---|---|---|
| | grid.centres | (cells, p) | cell centres, last axis of the box fastest |
| ρ dθ | masses | (cells,) | mass of each cell, sums to 1 |
| Δ | grid.spacing | (p,) | cell sizes |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from geodesic.meanfield._functional import Functional, first_variation

# Fraction of the longest step for which an explicit upwind step keeps every cell's mass positive.
_SAFETY = 0.9


@dataclass(frozen=True)
class Grid:
    """A box cut into equal cells.

    Attributes:
        lower: corner of the box, one number per axis.
        upper: opposite corner.
        cells: number of cells along each axis.

    Raises:
        ValueError: if the three differ in length, a side is not positive, or an axis has fewer than 2 cells.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    cells: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.lower) == len(self.upper) == len(self.cells) > 0:
            raise ValueError(
                f"lower, upper and cells need one entry per axis, got {self.lower}, {self.upper}, {self.cells}"
            )
        if not all(low < high for low, high in zip(self.lower, self.upper, strict=True)) or min(self.cells) < 2:
            raise ValueError(
                f"the box from {self.lower} to {self.upper} in {self.cells} cells needs lower < upper, cells >= 2"
            )

    @property
    def spacing(self) -> tuple[float, ...]:
        """Cell size along each axis."""
        return tuple((b - a) / n for a, b, n in zip(self.lower, self.upper, self.cells, strict=True))

    @property
    def axes(self) -> list[Float[Tensor, " cells"]]:
        """Cell centres along each axis, float64."""
        return [
            a + step * (torch.arange(n, dtype=torch.float64) + 0.5)
            for a, step, n in zip(self.lower, self.spacing, self.cells, strict=True)
        ]

    @property
    def centres(self) -> Float[Tensor, "cells p"]:
        """All cell centres, float64, the last axis of the box fastest."""
        return torch.cartesian_prod(*self.axes).reshape(math.prod(self.cells), len(self.cells))


@dataclass(frozen=True)
class DensityTrajectory:
    """The density at its recorded times.

    Attributes:
        times: (times,).
        masses: (times, cells), mass of each cell; divide by the cell volume for the density.
        energies: (times,), F(ρ), without the entropy when there is noise.
        grid: where the cells are.
        steps: how many steps were taken in all.
    """

    times: Float[Tensor, " times"]
    masses: Float[Tensor, "times cells"]
    energies: Float[Tensor, " times"]
    grid: Grid
    steps: int


def solve_density(
    problem: Functional,
    masses: Float[Tensor, " cells"],
    grid: Grid,
    times: Sequence[float | int] | Float[Tensor, " times"],
    noise: float = 0.0,
    most_steps: int = 200_000,
) -> DensityTrajectory:
    """Solve ∂_t ρ = ∇·(ρ ∇F′(ρ)) + τ Δρ by an explicit upwind scheme whose step keeps the density positive.

    Args:
        problem: F, evaluated at the cell centres weighted by their masses.
        masses: initial mass of each cell, not negative; normalised to sum 1.
        grid: the box; its cells in the order of `grid.centres`.
        times: increasing times ≥ 0 at which the density is kept.
        noise: τ ≥ 0.
        most_steps: give up after so many steps.

    Raises:
        ValueError: masses of the wrong length, negative or non-finite or all zero; times negative or unsorted.
        RuntimeError: if more than `most_steps` steps are needed; says how far it came.
    """
    grid_times = torch.as_tensor(times, dtype=torch.float64)
    _check(masses, grid, grid_times, noise)
    centres = grid.centres.to(masses)
    state = masses / masses.sum()
    kept, steps = [state], 0
    for start, stop in pairwise(grid_times.tolist()):
        time = start
        while time < stop:
            flux, longest = _fluxes(first_variation(problem, centres, weights=state), state, grid, noise)
            # The interval is cut into equal steps of at most the longest: no sliver of a step remains at its end.
            step = (stop - time) / math.ceil((stop - time) / (_SAFETY * longest))
            state = state - step * flux
            time = stop if stop - time <= step * (1 + 1e-9) else time + step
            steps += 1
            if steps > most_steps:
                raise RuntimeError(
                    f"{most_steps} steps reached time {time:.4g} of {stop:.4g} at a step of {step:.2g}; take coarser "
                    f"cells, less noise (now {noise:.3g}), an earlier end, or a larger most_steps"
                )
        kept.append(state)
    with torch.no_grad():
        energies = torch.stack([problem.energy(centres, each) for each in kept])
    return DensityTrajectory(grid_times, torch.stack(kept), energies, grid, steps)


def _fluxes(variation: Tensor, masses: Tensor, grid: Grid, noise: float) -> tuple[Tensor, float]:
    """What leaves each cell per unit of time, and the longest step that takes no more than it holds."""
    shape = grid.cells
    variation, masses = variation.reshape(shape), masses.reshape(shape)
    leaving = torch.zeros_like(masses)
    rate = torch.zeros_like(masses)  # share of a cell's own mass that leaves per unit of time
    for axis, spacing in enumerate(grid.spacing):
        below, above = _sides(variation, axis)
        velocity = (below - above) / spacing  # −∇F′ on the faces of this axis
        upward = velocity.clamp_min(0) / spacing + noise / spacing**2
        downward = (-velocity).clamp_min(0) / spacing + noise / spacing**2
        held_below, held_above = _sides(masses, axis)
        across = upward * held_below - downward * held_above
        for total, out_of_below, out_of_above in ((leaving, across, -across), (rate, upward, downward)):
            total_below, total_above = _sides(total, axis)
            total_below += out_of_below
            total_above += out_of_above
    return leaving.flatten(), 1 / max(float(rate.max()), 1e-300)


def _sides(cells: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """For every inner face of an axis, views of the cells below and above it."""
    faces = cells.shape[axis] - 1
    return cells.narrow(axis, 0, faces), cells.narrow(axis, 1, faces)


def _check(masses: Tensor, grid: Grid, times: Tensor, noise: float) -> None:
    if masses.shape[0] != math.prod(grid.cells):
        raise ValueError(
            f"{masses.shape[0]} masses for a grid of {math.prod(grid.cells)} cells; give one mass per cell"
        )
    if not bool(masses.isfinite().all()) or bool((masses < 0).any()) or not float(masses.sum()) > 0:
        raise ValueError("the masses of the cells must be finite, not negative and not all zero")
    if times.ndim != 1 or len(times) == 0 or bool((times < 0).any()) or bool((times.diff() <= 0).any()):
        raise ValueError(f"times must be not negative and strictly increasing, got {times.tolist()[:8]}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and not negative, got {noise}")
