"""Curves of densities on a staggered grid: closed forms in one dimension, orthogonality in two."""

import math

import numpy as np
import pytest
import torch
from geodesic.fluid import _staggered as staggered


def displaced(times, cells, size=0.1):
    """Cell averages of the geodesic from the uniform density by T(x) = x + size·sin(πx): W₂² = size²/2."""
    edges, start = np.linspace(0, 1, cells + 1), np.linspace(0, 1, 20001)
    rows = [np.diff(np.interp(edges, start + t * size * np.sin(np.pi * start), start)) * cells for t in times]
    return torch.tensor(np.array(rows))


def mixture(rho0, rho1, steps):
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64).reshape(-1, *[1] * rho0.ndim)
    return (1 - t) * rho0 + t * rho1


def random_path(generator, *shape):
    density = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.2
    return density / density.flatten(1).mean(1).reshape(-1, *[1] * (len(shape) - 1))


def energy(density):
    return staggered.kinetic_energy(density, staggered.least_momentum(density))


def test_a_geodesic_costs_w2_squared_at_second_order():
    """W₂² = ∫ size² sin²(πx) dx = size²/2; the error falls as h² with steps ∝ 1/h."""
    errors = [abs(energy(displaced(np.linspace(0, 1, n // 4 + 1), n)) - 0.005) for n in (32, 64, 128)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert ((slopes > 1.8) & (slopes < 2.2)).all()  # order of the midpoint and central differences
    assert errors[-1] < 5e-3 * 0.005


def test_a_geodesic_run_at_another_pace_costs_four_thirds():
    """With s(t) = t² the speed is 2t times the constant one, and ∫ (2t)² dt = 4/3."""
    t = np.linspace(0, 1, 65)
    ratio = energy(displaced(t**2, 64)) / energy(displaced(t, 64))
    assert ratio == pytest.approx(4 / 3, rel=2e-3)  # discretisation, O(1/steps²)


def test_the_mixture_costs_its_closed_form():
    """In one dimension m = F₀ − F₁ whatever the time, and ∫₀¹ dt/((1−t)ρ₀ + tρ₁) = log(ρ₁/ρ₀)/(ρ₁ − ρ₀)."""
    cells, edges = 200, np.linspace(0, 1, 201)
    rho0, rho1 = (1 + a * np.pi / 2 * np.sin(np.pi * np.linspace(0, 1, 20001)) - a for a in (0.5, -0.5))
    fine = np.linspace(0, 1, 20001)
    cdf = [x + a * ((1 - np.cos(np.pi * x)) / 2 - x) for a in (0.5, -0.5) for x in (fine,)]
    gap = np.where(np.abs(rho1 - rho0) > 1e-9, rho1 - rho0, np.nan)
    want = np.trapezoid(np.nan_to_num((cdf[1] - cdf[0]) ** 2 * np.log(rho1 / rho0) / gap), fine)
    masses = [torch.tensor(np.diff(np.interp(edges, fine, c)) * cells) for c in cdf]
    assert energy(mixture(*masses, 64)) == pytest.approx(want, rel=1e-3)  # discretisation


def test_in_one_dimension_the_momentum_is_minus_the_rate_of_the_distribution(generator):
    """∂_t F + m = 0 on every face: the only momentum without flux through the walls."""
    density = random_path(generator, 6, 9)
    distribution = torch.nn.functional.pad(density.cumsum(1), (1, 0)) / 9
    (momentum,) = staggered.least_momentum(density)
    torch.testing.assert_close(momentum, -distribution.diff(dim=0) * 5, rtol=0, atol=1e-12)  # float64 algebra


@pytest.mark.parametrize("shape", [(4, 8), (4, 6, 5)])
def test_the_least_momentum_obeys_the_continuity_equation(generator, shape):
    """By construction; checked cell by cell."""
    density = random_path(generator, *shape)
    momentum = staggered.least_momentum(density)
    assert staggered.continuity_residual(density, momentum).abs().max() < 1e-11  # float64 solve


def test_the_least_momentum_is_orthogonal_to_every_swirl(generator):
    """Energy of least + s·swirl = energy of least + s² energy of swirl (Pythagoras in the weight 1/ρ)."""
    density = random_path(generator, 3, 6, 5)
    least, stir = staggered.least_momentum(density), staggered.swirl(density)
    both = tuple(m + 0.7 * w for m, w in zip(least, stir, strict=True))
    parts = staggered.kinetic_energy(density, least) + 0.49 * staggered.kinetic_energy(density, stir)
    assert staggered.kinetic_energy(density, both) == pytest.approx(parts, rel=1e-11)  # float64 algebra


def test_no_momentum_through_the_same_path_is_cheaper_in_a_dense_solve(generator):
    """Oracle: the KKT system of min Σ m²/ρ with the divergence given, solved by dense least squares on 3 × 4 cells."""
    density = random_path(generator, 2, 3, 4)
    rho_x, rho_y = density.mean(0).unfold(0, 2, 1).mean(-1), density.mean(0).unfold(1, 2, 1).mean(-1)
    rows = []
    for i in range(2 * 4 + 3 * 3):
        unit = torch.zeros(17, dtype=torch.float64)
        unit[i] = 1
        m = (unit[:8].reshape(1, 2, 4), unit[8:].reshape(1, 3, 3))
        rows.append(staggered.divergence(tuple(staggered.with_walls(x, a) for a, x in enumerate(m, 1))).flatten())
    weight = torch.cat([rho_x.flatten(), rho_y.flatten()]).sqrt().numpy()
    matrix = torch.stack(rows, 1).numpy() * weight
    best = np.linalg.lstsq(matrix, -density.diff(dim=0).flatten().numpy(), rcond=None)[0]  # least-norm solution
    assert energy(density) == pytest.approx((best**2).sum() / density[0].sum().item(), rel=1e-10)


def test_a_swirl_has_no_divergence_and_no_flux_through_walls(generator):
    """A discrete curl: every corner value enters a cell twice with each sign."""
    density = random_path(generator, 4, 6, 5)
    x, y = staggered.swirl(density)
    assert staggered.divergence((x, y)).abs().max() < 1e-11
    assert x[:, [0, -1]].abs().max() == 0
    assert y[:, :, [0, -1]].abs().max() == 0


def test_energy_does_not_depend_on_the_unit_of_mass(generator):
    """m²/ρ is homogeneous of degree one, and energies are per unit of mass."""
    density = random_path(generator, 4, 6, 5)
    assert energy(7 * density) == pytest.approx(energy(density), rel=1e-10)


def test_momentum_without_density_costs_infinity():
    """The Benamou–Brenier functional is +∞ there."""
    density = torch.ones(2, 4, dtype=torch.float64)
    density[:, :2] = 0
    momentum = torch.zeros(1, 5, dtype=torch.float64)
    assert staggered.kinetic_energy(density, (momentum,)) == 0
    momentum[0, 1] = 1.0
    assert staggered.kinetic_energy(density, (momentum,)) == math.inf


def test_dtype_follows_the_density(generator):
    """float32 in, float32 out."""
    momentum = staggered.least_momentum(random_path(generator, 3, 4, 4).float())
    assert {m.dtype for m in momentum} == {torch.float32}


def test_bad_curves_are_refused(generator):
    """Each message names what was seen."""
    density = random_path(generator, 3, 6)
    momentum = staggered.least_momentum(density)
    with pytest.raises(ValueError, match="each 2 or more; got \\(1, 6\\)"):
        staggered.least_momentum(density[:1])
    with pytest.raises(ValueError, match="the least is 0"):
        staggered.least_momentum(density * (torch.arange(6) > 0))
    with pytest.raises(ValueError, match="mass changes along the curve"):
        staggered.least_momentum(density * torch.tensor([[1.0], [1.0], [1.1]]))
    with pytest.raises(ValueError, match="1 values of the density are not finite"):
        staggered.kinetic_energy(density.where(density != density[0, 0], torch.nan), momentum)
    with pytest.raises(ValueError, match="needs momenta of shapes"):
        staggered.kinetic_energy(density[:2], momentum)
    with pytest.raises(ValueError, match="momentum has values that are not finite"):
        staggered.kinetic_energy(density, (momentum[0] * torch.inf,))
    with pytest.raises(ValueError, match="two dimensions"):
        staggered.swirl(density)
