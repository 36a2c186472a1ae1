"""The stochastic solver against closed forms, the exact planar solver and a linear-assignment oracle."""

import math

import pytest
import torch
from geodesic import semidiscrete
from geodesic.semidiscrete import _newton, _samples, _solver, _starts, plane
from scipy.optimize import linear_sum_assignment


def potential_of(points, heights, source="cube", bandwidth=1.0):
    """A potential put together by hand, with equal weights."""
    weights = torch.full_like(heights, 1 / len(heights))
    return semidiscrete.Potential(points, weights, heights, source, 0.0, 0.0, 0, 0, bandwidth)


def certificate(potential):
    """Upper end of the certified relative error, four standard errors up."""
    return math.sqrt(potential.marginal_error**2 + 4 * potential.standard_error)


@pytest.mark.parametrize("source", ["cube", "normal"])
def test_on_the_line_the_heights_are_sums_of_quantiles(source, generator):
    """d = 1: cell i is the i-th quantile interval, so h_{i+1} − h_i = −q_i (y_{i+1} − y_i) with q_i the quantile."""
    points = torch.randn(9, 1, dtype=torch.float64, generator=generator).sort(0).values
    weights = torch.arange(1, 10, dtype=torch.float64) / 45
    found = semidiscrete.solve(points, weights, source, tol=2e-3, generator=generator)
    cut = weights.cumsum(0)[:-1]
    quantile = cut if source == "cube" else torch.special.ndtri(cut)
    reached = -found.heights.diff() / points.diff(dim=0)[:, 0]
    torch.testing.assert_close(reached, quantile, rtol=0, atol=10 * 2e-3)  # 10x the stopping threshold


def test_two_atoms_split_the_square_at_the_mass_quantile(generator):
    """Masses 0.3 and 0.7 side by side: the cut is the line x = 0.3."""
    found = semidiscrete.solve(
        torch.tensor([[1.0, 4.0], [3.0, 4.0]]), torch.tensor([0.3, 0.7]), tol=2e-3, generator=generator
    )
    x = torch.tensor([[0.295, 0.1], [0.305, 0.9]])  # 5e-3 either side; the error of the cut is below 2e-3
    assert found.cell(x).tolist() == [0, 1]


def test_a_product_grid_has_constant_power_weights(generator):
    """Centres of a 3×3×3 board in the cube: Voronoi cells of equal mass, so ‖y‖² + 2h is constant."""
    ticks = (torch.arange(3) + 0.5) / 3
    board = torch.cartesian_prod(ticks, ticks, ticks)
    found = semidiscrete.solve(board, tol=0.01, generator=generator)
    power = (board**2).sum(1) + 2 * found.heights
    # a face moves by dh/‖yᵢ − yⱼ‖ = 3 dh and sweeps that share of a cell of depth ⅓: relative mass 9 dh
    torch.testing.assert_close(power, power.mean().expand(27), rtol=0, atol=10 * 2 * 0.01 / 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certified_error_covers_the_exact_one_in_the_plane(dtype, generator):
    """Oracle: the areas of the stochastic solver's cells as polygons; the certificate must hold for them."""
    points = torch.rand(100, 2, generator=generator).to(dtype)
    found = semidiscrete.solve(points, generator=generator)
    assert found.heights.dtype == dtype
    areas = plane.diagram(points, found.heights).areas
    exact = float((100 * areas - 1).pow(2).mean().sqrt())
    assert exact <= certificate(found)  # Monte-Carlo, four standard errors
    assert exact >= math.sqrt(max(0.0, found.marginal_error**2 - 4 * found.standard_error))


def test_newton_and_stochastic_heights_agree_in_the_plane(generator):
    """Both minimise the same convex energy, so at its minimum their difference is second order in the error."""
    points = torch.rand(60, 2, dtype=torch.float64, generator=generator)
    weights = torch.full((60,), 1 / 60, dtype=torch.float64)
    exact = plane.solve(points)
    found = semidiscrete.solve(points, tol=0.02, generator=generator)
    excess = plane.diagram(points, found.heights).energy(weights) - exact.diagram.energy(weights)
    # convexity: 0 ≤ E(h) − E(h*) ≤ ⟨∇E(h), h − h*⟩
    slope = plane.diagram(points, found.heights).gradient(weights) @ (found.heights - exact.heights)
    assert -1e-12 <= excess <= float(slope) + 1e-12
    torch.testing.assert_close(found.heights, exact.heights, rtol=0, atol=10 * 0.02 * 0.01)  # 10 tol x a height's scale


def test_translating_all_atoms_changes_no_cell(generator):
    """A common ⟨x, t⟩ in all scores leaves the argmax alone, so the heights do not move."""
    points = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    here, there = (semidiscrete.solve(p, generator=torch.Generator().manual_seed(1)) for p in (points, points + 5))
    torch.testing.assert_close(here.heights, there.heights, rtol=1e-9, atol=1e-9)  # float64 algebra, same samples


def test_scaling_the_atoms_scales_the_heights(generator):
    """Scores ⟨x, s y⟩ + s h: the same cells for every s > 0."""
    points = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    small, large = (semidiscrete.solve(p, generator=torch.Generator().manual_seed(1)) for p in (points, 7 * points))
    torch.testing.assert_close(7 * small.heights, large.heights, rtol=1e-9, atol=1e-9)


def test_weak_duality_on_fresh_samples(generator):
    """E(h) on a sample is at least the best correlation of any plan (SciPy's assignment), for every h."""
    points = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    found = semidiscrete.solve(points, source="normal", generator=generator)
    x = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    gain = (x @ points.T).numpy()
    best = gain[linear_sum_assignment(gain, maximize=True)].mean()
    assert found.energy(x) >= best


def test_energy_gradient_is_the_mass_defect(generator):
    """On a fixed sample E is piecewise linear: a difference too short to change a cell is exact."""
    points = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    found = semidiscrete.solve(points, tol=0.2, generator=generator)
    x = torch.rand(500, 3, dtype=torch.float64, generator=generator)
    mass = torch.bincount(found.cell(x), minlength=6) / 500
    for i in range(6):
        raised = potential_of(points, found.heights + 1e-9 * torch.eye(6, dtype=torch.float64)[i])
        slope = (raised.energy(x) - found.energy(x)) / 1e-9
        torch.testing.assert_close(slope, float(mass[i]) - 1 / 6, rtol=0, atol=1e-6)  # rounding 1e-16/1e-9


def test_held_out_error_has_no_bias_of_noise(generator):
    """Multinomial counts at known masses: the mean over 400 batches is the true squared error, four standard errors."""
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    mass = torch.tensor([0.2, 0.3, 0.28, 0.22], dtype=torch.float64)
    squares = []
    for _ in range(400):
        draws = torch.multinomial(mass.expand(8, 4), 50, replacement=True, generator=generator)
        counts = torch.stack([torch.bincount(row, minlength=4) for row in draws])
        squares.append(_solver._held_out(counts, weights)[0])
    squares = torch.tensor(squares, dtype=torch.float64)
    true = float((weights * (mass / weights - 1) ** 2).sum())
    assert abs(float(squares.mean()) - true) <= 4 * float(squares.std()) / 20


def test_graph_estimates_the_hessian_of_the_line(generator):
    """d = 1, uniform source: the rate between neighbours is 1/(y_{i+1} − y_i) exactly, the estimate is unbiased."""
    points = torch.tensor([[0.0], [0.1], [0.5], [0.6], [1.4]], dtype=torch.float64)
    cuts = torch.tensor([0.1, 0.35, 0.6, 0.9], dtype=torch.float64)
    heights = torch.cat([torch.zeros(1).double(), -(cuts * points.diff(dim=0)[:, 0]).cumsum(0)])
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    scores, atoms = (x @ points.T + heights).topk(2, dim=1)
    graph = _newton.facets(points, atoms[:, 0], atoms[:, 1], scores[:, 0] - scores[:, 1])
    laplacian = torch.stack([graph.apply(e) for e in torch.eye(5, dtype=torch.float64)])
    torch.testing.assert_close(-laplacian.diagonal(1), 1 / points.diff(dim=0)[:, 0], rtol=1e-3, atol=0)  # grid 1e-5


def test_a_moved_cell_keeps_its_mass_within_bounds():
    """Two cells of depth 1 in the plane, joined: against its still neighbour a cell may grow to 4 or shrink to ¼
    of its mass when its target is what it has: (1 + δ)² = 4 and ¼."""
    one = torch.ones(1, dtype=torch.float64)
    depth = torch.ones(2, dtype=torch.float64)
    graph = _newton.Graph(torch.tensor([0]), torch.tensor([1]), one, torch.ones(2, dtype=torch.float64), depth, 2)
    moved = graph.limit(torch.tensor([5.0, 0.0], dtype=torch.float64), depth)
    torch.testing.assert_close(moved, torch.tensor([1.0, 4.5], dtype=torch.float64))  # 0 + 1, and 5 − ½


def test_an_empty_cell_is_joined_where_it_touches():
    """Conductance d ν/S and the depth of the cell that it touches."""
    one = torch.ones(1, dtype=torch.float64)
    depth = torch.tensor([2.0, 0.5, 9.0], dtype=torch.float64)
    graph = _newton.Graph(torch.tensor([0]), torch.tensor([1]), one, torch.tensor([1.0, 1, 0]).double(), depth, 3)
    joined = graph.joined(torch.tensor([2]), torch.tensor([1]), 0.25 * one)
    assert float(joined.conductance[1]) == 3 * 0.25 / 0.5
    assert joined.degree.tolist() == [1.0, 1 + 1.5, 1.5]
    assert joined.depth.tolist() == [2.0, 0.5, 0.5]


@pytest.fixture
def pieces(generator):
    """A thousand atoms of the plane in ten groups of unequal spread: far from Gaussian."""
    centres, group = 3 * torch.randn(10, 2, generator=generator), torch.randint(10, (1000,), generator=generator)
    return centres[group] + (0.3 + group[:, None] / 10) * torch.randn(1000, 2, generator=generator)


def test_start_from_a_coarser_problem_is_better_than_gaussian(pieces, generator):
    """E at the interpolated heights lies between its minimum (the solution's, to its error) and the Gaussian start."""
    frame, weights = _samples.Frame.of(pieces, "normal"), torch.full((1000,), 1e-3, dtype=torch.float64)
    x = semidiscrete.draw(20_000, 2, "normal", generator)
    start = _solver._start(frame, weights, generator)
    solved = semidiscrete.solve(pieces, source="normal", tol=0.1, generator=generator).heights.double() / frame.scale
    least, ours, gauss = (
        potential_of(frame.atoms.double(), h, "normal").energy(x.double())
        for h in (solved, start, _starts.gaussian(frame))
    )
    assert least < ours < least + 0.1 * (gauss - least)


def test_a_cloud_in_pieces_is_solved_in_the_plane(pieces, generator):
    """400 samples an atom certify 5 %; without the coarse start and the limit on steps it took 1,000 and more."""
    assert semidiscrete.solve(pieces, source="normal", generator=generator).samples < 600_000


def test_warm_start_needs_fewer_samples(generator):
    """Heights of the same problem, solved before, are certified by the first batches."""
    points = torch.randn(100, 8, generator=generator)
    cold = semidiscrete.solve(points, source="normal", generator=generator)
    warm = semidiscrete.solve(points, source="normal", generator=generator, start=cold.heights)
    assert warm.samples < cold.samples / 2


def test_same_generator_same_heights(generator):
    points = torch.randn(30, 2, generator=generator)
    first, second = (semidiscrete.solve(points, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.heights, second.heights)


def test_one_atom_takes_everything():
    found = semidiscrete.solve(torch.tensor([[3.0, 1.0]]))
    assert found.cell(torch.rand(5, 2)).tolist() == [0] * 5


@pytest.fixture
def clusters(generator):
    """Two clusters of ten atoms, eight apart along the first axis, and their potential."""
    points = torch.randn(20, 2, dtype=torch.float64, generator=generator) / 2
    points[:, 0] += torch.arange(20) % 2 * 8 - 4
    return semidiscrete.solve(points, source="normal", generator=generator)


@pytest.fixture
def noise(generator):
    return torch.randn(400, 2, dtype=torch.float64, generator=generator)


def test_transport_hits_atoms_with_their_weights(clusters):
    """Fresh samples: relative mass error within the certificate plus the noise of 40 000 points, four deviations."""
    x = torch.randn(40_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    share = torch.bincount(clusters.cell(x), minlength=20) / 40_000
    error = float((20 * share - 1).pow(2).mean().sqrt())
    assert error <= certificate(clusters) + 4 * math.sqrt(20 / 40_000)


def test_extension_is_the_gradient_of_a_convex_function(clusters, noise):
    """Monotone on every pair: ⟨x − x', T(x) − T(x')⟩ ≥ 0."""
    image = clusters.extend(noise)
    products = ((noise[:200] - noise[200:]) * (image[:200] - image[200:])).sum(1)
    assert products.min() >= -1e-12  # float64 algebra


def test_extension_is_continuous(clusters, noise):
    """Two points 1e-6 apart: scores are Lipschitz, the projection contracts, so the images are 1e-6·C/τ apart."""
    moved = clusters.extend(noise + 1e-6) - clusters.extend(noise)
    spread = float(clusters.points.norm(dim=1).max())
    assert moved.norm(dim=1).max() <= 1e-6 * 20 * (2 * spread) ** 2 / clusters.bandwidth  # C <= n · diameter²


def test_extension_keeps_the_map_where_one_atom_leads(clusters, noise):
    """A bandwidth of nothing leaves the discrete map."""
    torch.testing.assert_close(clusters.extend(noise, bandwidth=1e-12), clusters.transport(noise))


def test_extension_between_two_atoms_is_linear():
    """Atoms 0 and 1 on the line cut at ½ with τ = ¼: image ½ + (x − ½)/(2τ) between them."""
    potential = potential_of(torch.tensor([[0.0], [1.0]]), torch.tensor([0.25, -0.25]), bandwidth=0.25)
    x = torch.tensor([[0.2], [0.5], [0.55], [0.9]])
    torch.testing.assert_close(potential.extend(x), torch.tensor([[0.0], [0.5], [0.6], [1.0]]))


def test_singular_set_separates_the_clusters(clusters, noise):
    """Wherever the extension lands between the clusters the point is singular; the threshold lies between the folds."""
    between = clusters.extend(noise)[:, 0].abs() < 2
    assert between.any()
    assert clusters.singular(noise, angle=0.8)[between].all()


def test_angle_keeps_the_extension_inside_the_clusters(clusters, noise):
    """With the angle given nothing lands between the clusters, whose atoms have |y₁| > 2."""
    assert clusters.points[:, 0].abs().min() > 2
    assert clusters.extend(noise, angle=0.8)[:, 0].abs().min() > 2


def test_fold_angle_of_a_right_angle():
    """Two atoms: centred and brought to unit spread per coordinate they are (±1); the normals (1, −1), (−1, −1)."""
    potential = potential_of(torch.tensor([[3.0], [5.0]]), torch.zeros(2), "normal")
    torch.testing.assert_close(potential.fold_angle(torch.zeros(1, 1)), torch.tensor([math.pi / 2]))


def test_quasi_random_points_have_the_law_of_the_source(generator):
    """Mean and standard deviation of each coordinate; Sobol points are far closer than the four deviations of iid."""
    x = semidiscrete.draw(4096, 3, "normal", generator)
    torch.testing.assert_close(x.mean(0), torch.zeros(3), rtol=0, atol=4 / 64)
    torch.testing.assert_close(x.std(0), torch.ones(3), rtol=0, atol=4 / 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.ones(3, 2)}, "2 of 3 points repeat another"),
        ({"points": torch.tensor([[0.0, math.nan], [1.0, 2.0]])}, "1 of 2 points are not finite"),
        ({"weights": torch.tensor([0.5, 0.6, 0.1])}, "the weights sum to 1.2"),
        ({"weights": torch.tensor([-0.2, 0.6, 0.6])}, r"point 0 has weight -0.2: its cell must be empty"),
        ({"weights": torch.tensor([0.0, 0.5, 0.5])}, r"point 0 has weight 0: its cell must be empty"),
        ({"weights": torch.tensor([0.5, 0.5])}, "2 weights for 3 points"),
        ({"source": "ball"}, "source is 'ball'"),
        ({"tol": 2.0}, "tol is 2.0"),
        ({"tol": 0.001, "max_samples": 1000}, "the test alone takes about"),
        ({"start": torch.zeros(2)}, "start has 2 heights for 3 points"),
        ({"start": torch.tensor([0.0, math.nan, 1.0])}, "1 of 3 heights of start are not finite"),
        ({"start": torch.tensor([0.0, math.inf, 1.0])}, "1 of 3 heights of start are not finite"),
        ({"weights": torch.tensor([0.5, math.nan, 0.5])}, "1 of 3 weights are not finite"),
        ({"weights": torch.tensor([0.5, math.inf, 0.5])}, "1 of 3 weights are not finite"),
        ({"weights": torch.tensor([math.nan] * 3)}, "3 of 3 weights are not finite"),
        ({"points": torch.tensor([[2**53 + 1, 0], [1, 2]])}, r"points reach 9007199254740993, beyond 2\*\*53"),
        ({"points": torch.zeros(0, 2)}, "no points"),
        ({"points": torch.eye(2, 21202)}, "dimension 21202 is above 21201"),
        ({"tol": math.nan}, "tol is nan"),
    ],
)
def test_bad_input_is_refused(change, message, generator):
    arguments = {"points": torch.randn(3, 2, generator=generator), **change}
    with pytest.raises(ValueError, match=message):
        semidiscrete.solve(**arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["cell", "transport", "value", "energy", "fold_angle", "facet", "extend"])
def test_points_of_the_source_that_are_not_finite_are_refused(clusters, method, bad):
    x = torch.zeros(4, 2, dtype=torch.float64)
    x[1, 1] = bad
    with pytest.raises(ValueError, match="1 of 4 points of the source are not finite"):
        getattr(clusters, method)(x)


@pytest.mark.parametrize("change", [{"bandwidth": math.nan}, {"bandwidth": -1.0}, {"angle": math.nan}])
def test_blending_by_no_number_is_refused(clusters, noise, change):
    with pytest.raises(ValueError, match=rf"{next(iter(change))} is (nan|-1.0); it is "):
        clusters.extend(noise, **change)


@pytest.mark.parametrize(("n", "d", "source", "message"), [
    (5, 2, "gauss", "source is 'gauss'; use \"cube\" or \"normal\""),
    (0, 2, "cube", "0 points in dimension 2"),
    (5, 0, "cube", "5 points in dimension 0"),
    (5, 21202, "normal", "dimension 21202 is above 21201"),
])  # fmt: skip
def test_draws_of_nothing_known_are_refused(n, d, source, message):
    with pytest.raises(ValueError, match=message):
        semidiscrete.draw(n, d, source)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.bfloat16])
def test_integer_and_half_points_are_taken(dtype):
    """Small integers are exact in every type: the solution is that of the wider one, whose type it has."""
    points = torch.tensor([[0, 1], [3, 0], [2, 5], [7, 7]])
    wide = torch.float32 if dtype.is_floating_point else torch.float64
    found, want = (
        semidiscrete.solve(points.to(t), tol=0.02, generator=torch.Generator().manual_seed(0)) for t in (dtype, wide)
    )
    assert found.points.dtype == found.heights.dtype == wide
    assert (found.heights == want.heights).all()
    assert (found.cell(points.to(dtype)) == want.cell(points.to(wide))).all()


def test_complex_points_are_refused():
    with pytest.raises(TypeError):
        semidiscrete.solve(torch.ones(3, 2, dtype=torch.complex64))


@pytest.mark.parametrize(("dtype", "size"), [
    (torch.float32, 2.0**100), (torch.float32, 2.0**-100), (torch.float32, 2.0**126),
    (torch.float64, 2.0**900), (torch.float64, 2.0**-900),
])  # fmt: skip
def test_points_of_any_size_have_the_same_cells(dtype, size, generator):
    """A power of two rounds nothing, so the heights are scaled by it, bit for bit."""
    points = torch.rand(30, 3, dtype=dtype, generator=generator)
    one, other = (semidiscrete.solve(p, generator=torch.Generator().manual_seed(1)) for p in (points, points * size))
    assert (other.heights == one.heights * size).all()
    x = torch.rand(50, 3, dtype=dtype, generator=generator)
    torch.testing.assert_close(other.facet(x)[2], one.facet(x)[2])
    assert (other.cell(x) == one.cell(x)).all()


def test_few_points_of_high_dimension_cost_no_matrix_of_it(monkeypatch):
    """Three points in dimension 5000: nothing of size d × d is decomposed, and the heights are those of the formula.

    Oracle: the same points turned into the plane that they span; the Gaussian map does not see the rotation.
    """
    points = torch.randn(3, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frame = _samples.Frame.of(points, "normal")
    eigh, sizes = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
    high = _starts.gaussian(frame)
    turned = frame.atoms @ torch.linalg.svd(frame.atoms, full_matrices=False).Vh[:2].T
    low = _starts.gaussian(_samples.Frame(turned, 1.0, "normal"))
    torch.testing.assert_close(high, low, rtol=1e-10, atol=1e-8)
    assert max(sizes, default=0) <= 3


def test_wrong_dimension_is_refused(clusters):
    with pytest.raises(ValueError, match="x has dimension 3, the atoms have 2"):
        clusters.transport(torch.zeros(4, 3, dtype=torch.float64))


def test_spent_budget_raises_with_the_error_reached(generator):
    with pytest.raises(RuntimeError, match=r"held-out relative error is .*, not tol = 0.05"):
        semidiscrete.solve(torch.randn(200, 30, generator=generator), source="normal", max_samples=40_000)
