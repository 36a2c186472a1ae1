"""The exact planar solver against closed forms, finite differences and counting."""

from math import inf, nan

import pytest
import torch
from geodesic.semidiscrete import plane


@pytest.fixture
def atoms(generator):
    return torch.rand(30, 2, dtype=torch.float64, generator=generator)


def test_cells_fill_the_square(atoms, generator):
    """The cells of any heights partition the unit square, of area 1."""
    cells = plane.diagram(atoms, torch.rand(30, dtype=torch.float64, generator=generator) / 10)
    torch.testing.assert_close(float(cells.areas.sum()), 1.0, rtol=1e-10, atol=0)  # float64 algebra


def test_areas_agree_with_counting_the_largest_score(atoms):
    """Oracle: the argmax of ⟨x, y⟩ + h on a grid of 1000² midpoints, which knows nothing of polygons."""
    cells = plane.diagram(atoms, plane.start_heights(atoms))
    ticks = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    best = (torch.cartesian_prod(ticks, ticks) @ atoms.T + cells.heights).argmax(1)
    counted = torch.bincount(best, minlength=30) / 1e6
    torch.testing.assert_close(cells.areas, counted.double(), rtol=0, atol=1e-3)  # perimeter/1000 at worst


def test_an_atom_below_the_envelope_has_no_cell():
    """Three atoms on a line, the middle one lowered: u_h never touches its plane."""
    cells = plane.diagram(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([0.0, -9.0, -1.0]))
    assert cells.areas[1] == 0
    assert len(cells.polygons[1]) == 0


def test_two_atoms_split_at_the_mass_quantile():
    """Atoms side by side with masses 0.3 and 0.7: the square is cut at x = 0.3, so h₂ − h₁ = −0.3·(distance 2)."""
    found = plane.solve(torch.tensor([[1.0, 4.0], [3.0, 4.0]]), torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(float(found.heights.diff()), -0.6, rtol=1e-6, atol=0)  # weights are float32


def test_a_product_grid_has_constant_power_weights():
    """Centres of a 5×5 board: the cells are the squares of the board, Voronoi cells, so ‖y‖² + 2h is constant."""
    ticks = (torch.arange(5, dtype=torch.float64) + 0.5) / 5
    board = torch.cartesian_prod(ticks, ticks)
    found = plane.solve(board, tol=1e-10)
    power = (board**2).sum(1) + 2 * found.heights
    torch.testing.assert_close(
        power, power.mean().expand(25), rtol=0, atol=1e-8
    )  # 10x the square-root of the areas' tol


def test_gradient_is_the_finite_difference_of_the_energy(atoms, generator):
    """Central differences of the exact energy, step 1e-5: error O(step²) plus rounding 1e-11."""
    weights = torch.full((30,), 1 / 30, dtype=torch.float64)
    heights = plane.start_heights(atoms)
    along = torch.randn(30, dtype=torch.float64, generator=generator)
    up, down = (plane.diagram(atoms, heights + s * 1e-5 * along).energy(weights) for s in (1, -1))
    slope = float(plane.diagram(atoms, heights).gradient(weights) @ along)
    torch.testing.assert_close((up - down) / 2e-5, slope, rtol=0, atol=1e-7)


def test_hessian_is_the_finite_difference_of_the_gradient(atoms, generator):
    """Central differences of the areas, step 1e-6; facets appear and vanish only in second order."""
    heights = plane.start_heights(atoms)
    along = torch.randn(30, dtype=torch.float64, generator=generator)
    up, down = (plane.diagram(atoms, heights + s * 1e-6 * along).areas for s in (1, -1))
    curvature = torch.from_numpy(plane.diagram(atoms, heights).hessian() @ along.numpy())
    torch.testing.assert_close((up - down) / 2e-6, curvature, rtol=0, atol=1e-3)  # entries are of order 10


def test_newton_reaches_unequal_weights(atoms, generator):
    """The areas are the weights at the minimum of E."""
    weights = torch.rand(30, dtype=torch.float64, generator=generator) + 0.2
    weights /= weights.sum()
    found = plane.solve(atoms, weights)
    torch.testing.assert_close(found.diagram.areas, weights, rtol=1e-8, atol=0)  # 10x the stopping threshold


def test_newton_survives_tight_clusters(generator):
    """Eight clusters of four atoms, each a hundred times smaller than their distance: most cells start as slivers."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    ring = 2 * torch.stack([angle.cos(), angle.sin()], 1).repeat(4, 1)
    ring = ring + 0.02 * torch.randn(32, 2, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(plane.solve(ring).diagram.areas, torch.full((32,), 1 / 32).double(), rtol=1e-8, atol=0)


def test_no_iterations_raise_with_the_error_reached(atoms):
    with pytest.raises(RuntimeError, match=r"relative error of .* in 0 steps"):
        plane.solve(atoms, max_iterations=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [0.5, nan, 0.5]}, "1 of 3 weights are not finite"),
        ({"weights": [0.5, 0.5]}, "2 weights for 3 points"),
        ({"weights": [0.5, 0.6, -0.1]}, "point 2 has weight -0.1"),
        ({"weights": [0.5, 0.5, 0.5]}, "the weights sum to 1.5"),
        ({"points": [[0.0, 1.0], [inf, 0.0], [1.0, 1.0]]}, "1 of 3 points are not finite"),
        ({"points": [[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]}, "1 of 3 points repeat another"),
        ({"points": [[0.0, 1.0, 2.0]] * 3}, r"points have shape \(3, 3\); the plane takes \(n, 2\)"),
        ({"tol": nan}, "tol is nan"),
    ],
)
def test_bad_input_is_refused(change, message, atoms):
    arguments = {"points": atoms[:3], **change}
    arguments = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        plane.solve(**arguments)


@pytest.mark.parametrize(
    ("heights", "message"),
    [([0.0, nan, 1.0], "1 of 3 heights are not finite"), ([0.0, 1.0], "2 heights for 3 points")],
)
def test_bad_heights_are_refused(heights, message, atoms):
    with pytest.raises(ValueError, match=message):
        plane.diagram(atoms[:3], torch.tensor(heights))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_integer_and_half_points_are_taken(dtype):
    points = torch.tensor([[0, 1], [3, 0], [2, 5], [7, 7]])
    assert (plane.solve(points.to(dtype)).heights == plane.solve(points.double()).heights).all()
