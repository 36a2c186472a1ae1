"""The grid geodesic against closed forms, exact quantiles in one dimension and exact plans in two."""

import math

import numpy as np
import ot
import pytest
import torch
from geodesic import fluid
from geodesic.fluid._benamou_brenier import _from_faces, _poisson, _project_paraboloids, _to_faces


def axis(cells):
    return (torch.arange(cells, dtype=torch.float64) + 0.5) / cells


def bump(centre, cells, width=0.15):
    rho = (1 - ((axis(cells) - centre) / width) ** 2).clamp(min=0) ** 2
    return rho / rho.mean()


def gaussian(mean, covariance, cells):
    x = torch.cartesian_prod(axis(cells), axis(cells)) - torch.tensor(mean, dtype=torch.float64)
    precision = torch.linalg.inv(torch.tensor(covariance, dtype=torch.float64))
    rho = torch.exp(-0.5 * ((x @ precision) * x).sum(1)).reshape(cells, cells)
    return rho / rho.mean()


def mixture(cells, *parts):
    return sum(weight * gaussian(mean, [[s * s, 0], [0, s * s]], cells) for weight, mean, s in parts)


def waves(cells):
    """Two smooth, positive densities, as exact cell averages."""
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    one = edges + torch.sin(2 * math.pi * edges) / (4 * math.pi)
    two = edges + torch.sin(math.pi * edges) / (2 * math.pi)
    return one.diff() * cells, two.diff() * cells


def quantile_w2_squared(rho0, rho1):
    """Exact for piecewise constant densities: ∫₀¹ (Q₀ − Q₁)² du, both quantile functions linear between levels."""
    edges = np.linspace(0, 1, len(rho0) + 1)
    f0, f1 = (np.concatenate([[0], np.cumsum(rho.numpy())]) / rho.sum().item() for rho in (rho0, rho1))
    levels = np.union1d(f0, f1)
    gap = np.interp(levels, f0, edges) - np.interp(levels, f1, edges)
    return float(((gap[1:] ** 2 + gap[1:] * gap[:-1] + gap[:-1] ** 2) / 3 * np.diff(levels)).sum())


def test_a_translated_bump_costs_its_shift_squared():
    """W₂² of a translation is |shift|² = 0.4² + 0.3², 32 × 32 cells and 16 slabs, within 1 %."""
    rho0, rho1 = (torch.outer(bump(x, 32, 0.25), bump(y, 32, 0.25)) for x, y in ((0.3, 0.3), (0.7, 0.6)))
    assert fluid.benamou_brenier(rho0, rho1, steps=16).w2_squared == pytest.approx(0.25, rel=0.01)


def test_gaussians_cost_the_bures_distance():
    """|m₀ − m₁|² + tr(A + B − 2(A^½ B A^½)^½) with A and B that do not commute, within 1 %."""
    a, b = np.array([[0.006, 0.003], [0.003, 0.004]]), np.array([[0.004, -0.002], [-0.002, 0.008]])
    root = np.sqrt(np.linalg.eigvals(a @ b)).sum()  # trace of (A^½ B A^½)^½: the spectrum is that of AB
    want = 0.3**2 + 0.2**2 + np.trace(a + b) - 2 * root
    rho0, rho1 = gaussian((0.35, 0.4), a, 32), gaussian((0.65, 0.6), b, 32)
    assert fluid.benamou_brenier(rho0, rho1, steps=16).w2_squared == pytest.approx(want, rel=0.01)


def test_a_mixture_costs_what_an_exact_plan_costs():
    """POT's network simplex on the same 32 × 32 cells, within 1 %."""
    rho0 = mixture(32, (1, (0.3, 0.3), 0.1), (0.5, (0.7, 0.5), 0.07))
    rho1 = mixture(32, (0.6, (0.25, 0.7), 0.07), (0.6, (0.75, 0.75), 0.08), (0.3, (0.6, 0.25), 0.06))
    cells = torch.cartesian_prod(axis(32), axis(32))
    masses = [(rho / rho.sum()).flatten().numpy() for rho in (rho0, rho1)]
    want = ot.emd2(*masses, torch.cdist(cells, cells).square().numpy(), numItermax=1_000_000)
    assert fluid.benamou_brenier(rho0, rho1, steps=16).w2_squared == pytest.approx(want, rel=0.01)


@pytest.mark.slow
def test_sixty_four_cells_and_thirty_two_slabs_within_one_per_cent():
    """The full-size grid: a translated bump, default tolerance."""
    rho0, rho1 = (torch.outer(bump(x, 64), bump(y, 64)) for x, y in ((0.3, 0.3), (0.7, 0.6)))
    assert fluid.benamou_brenier(rho0, rho1).w2_squared == pytest.approx(0.25, rel=0.01)


def test_the_error_falls_at_second_order():
    """Exact quantiles on the same cells; steps and cells grow together."""
    errors = []
    for n in (16, 32, 64):
        rho0, rho1 = waves(n)
        solution = fluid.benamou_brenier(rho0, rho1, steps=n // 4, tol=1e-5)
        errors.append(abs(solution.w2_squared - quantile_w2_squared(rho0, rho1)))
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert ((slopes > 1.8) & (slopes < 2.2)).all()


def test_the_curve_has_constant_speed():
    """W₂(ρ_s, ρ_t) = |s − t| W₂, exact quantiles between the quarter times."""
    rho0, rho1 = waves(48)
    density = fluid.benamou_brenier(rho0, rho1, steps=16, tol=1e-4).density
    whole = math.sqrt(quantile_w2_squared(rho0, rho1))
    quarters = [math.sqrt(quantile_w2_squared(density[k], density[k + 4])) / whole for k in (0, 4, 8, 12)]
    torch.testing.assert_close(torch.tensor(quarters), torch.full((4,), 0.25), rtol=5e-3, atol=0)  # discretisation


def test_the_solution_obeys_the_continuity_equation_and_keeps_both_ends():
    """The last step of every iteration projects there; momentum on the walls is zero."""
    rho0, rho1 = (3 * torch.outer(bump(x, 16), bump(0.5, 16)) for x in (0.4, 0.6))
    solution = fluid.benamou_brenier(rho0, rho1, steps=8)
    assert fluid.continuity_residual(solution.density, solution.momentum).abs().max() < 1e-10 * rho0.max()
    torch.testing.assert_close(solution.density[0], rho0, rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.density[-1], rho1, rtol=0, atol=1e-12)
    assert solution.momentum[0][:, [0, -1]].abs().max() == 0


def test_the_energy_is_that_of_the_returned_curve():
    """Where densities are positive, m²/ρ of the answer and the best momentum for its path give the same number."""
    solution = fluid.benamou_brenier(*waves(32), steps=8, tol=1e-6)
    energy = fluid.kinetic_energy(solution.density, solution.momentum)
    assert energy == pytest.approx(solution.w2_squared, rel=1e-4)  # 100 × the stopping threshold
    least = fluid.kinetic_energy(solution.density, fluid.least_momentum(solution.density))
    assert least == pytest.approx(energy, rel=1e-4)


def test_it_is_cheaper_than_the_mixture_and_the_geodesic_stirred():
    """The minimum over all curves, on one grid with one energy."""
    rho0, rho1 = (torch.outer(bump(x, 16), bump(0.5, 16)) * 0.9 + 0.1 for x in (0.35, 0.65))
    solution = fluid.benamou_brenier(rho0, rho1, steps=8)
    t = torch.linspace(0, 1, 9, dtype=torch.float64).reshape(-1, 1, 1)
    mixed = (1 - t) * rho0 + t * rho1
    assert fluid.kinetic_energy(mixed, fluid.least_momentum(mixed)) > 1.5 * solution.w2_squared
    stirred = tuple(m + 0.02 * w for m, w in zip(solution.momentum, fluid.swirl(solution.density), strict=True))
    assert fluid.kinetic_energy(solution.density, stirred) > 1.1 * solution.w2_squared


def test_distance_to_itself_is_zero():
    """Nothing moves."""
    rho, _ = waves(16)
    assert fluid.benamou_brenier(rho, rho).w2_squared == pytest.approx(0, abs=1e-12)


def test_it_is_symmetric_and_free_of_scale():
    """W₂ is a distance between probability measures; the units of mass and the order of the ends do not matter."""
    rho0, rho1 = waves(24)
    one = fluid.benamou_brenier(rho0, rho1, steps=8, tol=1e-5)
    other = fluid.benamou_brenier(7 * rho1, 7 * rho0, steps=8, tol=1e-5)
    assert other.w2_squared == pytest.approx(one.w2_squared, rel=1e-4)  # 10 × the stopping threshold
    torch.testing.assert_close(other.density.flip(0), 7 * one.density, rtol=1e-3, atol=0)


def test_float32_gives_the_same_answer():
    """dtype follows the input; the tolerance is above float32 rounding."""
    rho0, rho1 = waves(32)
    single = fluid.benamou_brenier(rho0.float(), rho1.float(), steps=8)
    assert single.density.dtype == torch.float32
    assert single.w2_squared == pytest.approx(fluid.benamou_brenier(rho0, rho1, steps=8).w2_squared, rel=1e-3)


def test_residuals_record_the_way_down():
    """One row an iteration, the last below tol, none before."""
    solution = fluid.benamou_brenier(*waves(16), steps=4, tol=1e-3)
    assert solution.residuals.shape == (solution.iterations, 2)
    assert solution.residuals[-1].max() <= 1e-3 < solution.residuals[:-1].amax(1).min()


def test_running_out_of_iterations_raises():
    """A number that is not converged is not returned."""
    with pytest.raises(RuntimeError, match=r"reached relative residuals .* not tol=1e-09, in max_iterations=5"):
        fluid.benamou_brenier(*waves(16), tol=1e-9, max_iterations=5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a, b: (-a, b), "rho0 must be finite, nonnegative"),
        (lambda a, b: (a, b * torch.nan), "rho1 must be finite, nonnegative"),
        (lambda a, b: (0 * a, 0 * b), "not all zero"),
        (lambda a, b: (a, 1.01 * b), r"masses differ: 1 and 1\.01"),
        (lambda a, b: (a[:3], b[:3]), r"4 cells or more an axis, got \(3,\)"),
        (lambda a, b: (a[None, :], b[None, :]), r"got \(1, 16\)"),
        (lambda a, b: (a, b[:8]), r"one grid, got \(16,\) and \(8,\)"),
    ],
)
def test_bad_densities_are_refused(change, match):
    """Each message names what was seen."""
    with pytest.raises(ValueError, match=match):
        fluid.benamou_brenier(*change(*waves(16)))


def test_bad_steps_and_tolerances_are_refused():
    """One slab has no inner time, and a tolerance that is not positive is never reached."""
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        fluid.benamou_brenier(*waves(16), steps=1)
    with pytest.raises(ValueError, match="tol must be positive, got 0"):
        fluid.benamou_brenier(*waves(16), tol=0.0)


def test_paraboloids_are_projected_on():
    """Optimality: the answer is feasible, what was removed is a nonnegative multiple of the outward normal (1, b/2)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (10 * torch.randn(2000, generator=generator, dtype=torch.float64) for _ in range(2))
    near_a, near_b = _project_paraboloids([a, b])
    level = near_a + near_b.square() / 4
    assert level.max() < 1e-10
    multiple = a - near_a
    torch.testing.assert_close(b - near_b, multiple * near_b / 2, rtol=0, atol=1e-10)
    assert multiple.min() >= 0
    assert (multiple * level).abs().max() < 1e-9  # nothing is removed from inside


def test_poisson_inverts_second_differences(generator):
    """Oracle: the five-point formula with mirrored values outside, time weighted by 1/2."""
    source = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    source -= source.mean()
    potential = _poisson(source, 2)
    result = torch.zeros_like(source)
    for axis_, weight in ((0, 0.5), (1, 1.0), (2, 1.0)):
        n = source.shape[axis_]
        first, last = potential.narrow(axis_, 0, 1), potential.narrow(axis_, n - 1, 1)
        result -= weight * n**2 * torch.cat([first, potential, last], axis_).diff(n=2, dim=axis_)
    torch.testing.assert_close(result, source, rtol=0, atol=1e-11)


def test_the_two_face_maps_are_adjoint(generator):
    """⟨K u, y⟩ = ⟨u, K* y⟩, a change of density counted once an axis, for changes that vanish at both ends."""
    shapes = [(5, 3, 6), (4, 2, 6), (4, 3, 5)]
    change = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]
    change[0][[0, -1]] = 0
    faces = _to_faces(change)
    dual = [torch.randn(*f.shape, generator=generator, dtype=torch.float64) for f in faces]
    left = sum((f * y).sum() for f, y in zip(faces, dual, strict=True))
    back = _from_faces(dual)
    right = 2 * (change[0] * back[0]).sum() + sum((m * y).sum() for m, y in zip(change[1:], back[1:], strict=True))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)
