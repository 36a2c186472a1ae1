"""Particles and finite volumes against the closed-form flow of v = 2at sin(πx), and the Helmholtz split."""

import math

import numpy as np
import pytest
import torch
from geodesic import fluid

RATE = 0.3


def sine_flow(points, t):
    """Component by component ẋ = 2at sin(πx): tan(πx/2) grows by exp(πat²), and the walls do not move."""
    return 2 * RATE * t * torch.sin(math.pi * points)


def flowed(x, sign=1.0):
    """The flow of `sine_flow` from time 0 to 1; sign=-1 gives its inverse."""
    grown = math.exp(sign * math.pi * RATE) * torch.sin(math.pi * x / 2)
    return 2 / math.pi * torch.atan2(grown, torch.cos(math.pi * x / 2))


def sine_densities(cells, dim=1):
    """Exact cell averages at times 0 and 1: the distribution function of 1 − cos(2πx)/2 is carried by the flow."""
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    pair = [(x - torch.sin(2 * math.pi * x) / (4 * math.pi)).diff() * cells for x in (edges, flowed(edges, -1.0))]
    return pair if dim == 1 else [torch.outer(rho, rho) for rho in pair]


def still(points, t):
    return torch.zeros_like(points)


def slopes(errors):
    return np.log2(np.array(errors[:-1]) / np.array(errors[1:]))


def centres(*cells):
    return torch.meshgrid(*((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in cells), indexing="ij")


def test_particles_follow_the_closed_form_at_fourth_order():
    """Runge–Kutta of order 4 on a field with a closed-form flow."""
    points = torch.linspace(0.05, 0.95, 14, dtype=torch.float64).reshape(7, 2)
    errors = [(fluid.push(points, sine_flow, n) - flowed(points)).abs().max() for n in (4, 8, 16)]
    assert ((slopes(errors) > 3.7) & (slopes(errors) < 4.5)).all()


def test_particles_come_back_when_the_flow_runs_backwards():
    """The flow from 1 to 0 inverts the flow from 0 to 1."""
    points = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)[:, None]
    back = fluid.push(fluid.push(points, sine_flow, 50), sine_flow, 50, start=1.0, stop=0.0)
    torch.testing.assert_close(back, points, rtol=0, atol=1e-7)  # discretisation, O(steps⁻⁴)


@pytest.mark.parametrize(("dim", "cells"), [(1, (64, 128, 256)), (2, (48, 96))])
@pytest.mark.parametrize(("scheme", "low", "high"), [("upwind", 0.8, 1.15), ("van leer", 1.7, 2.25)])
def test_the_density_converges_at_the_order_of_the_scheme(dim, cells, scheme, low, high):
    """L¹ error against the exact cell averages: order 1 for upwind, 2 for limited slopes with Heun steps."""
    errors = []
    for n in cells:
        start, want = sine_densities(n, dim)
        got = fluid.advect(start, sine_flow, steps=(1 + dim) * n, scheme=scheme)
        errors.append((got - want).abs().mean().item())
    assert ((slopes(errors) > low) & (slopes(errors) < high)).all()


def test_the_wasserstein_distance_to_the_exact_density_falls_at_first_order():
    """In one dimension W₁ is the L¹ distance of the distribution functions."""
    errors = []
    for n in (64, 128, 256):
        start, want = sine_densities(n)
        errors.append(((fluid.advect(start, sine_flow, steps=2 * n) - want).cumsum(0) / n).abs().mean().item())
    assert ((slopes(errors) > 0.85) & (slopes(errors) < 1.15)).all()


def test_particles_and_finite_volumes_agree():
    """The share of particles left of each cell edge, from quantiles of the first density, against the masses."""
    start, _ = sine_densities(100)
    distribution = torch.cat([torch.zeros(1, dtype=torch.float64), start.cumsum(0) / 100])
    levels = (np.arange(20000) + 0.5) / 20000
    points = torch.tensor(np.interp(levels, distribution.numpy(), np.linspace(0, 1, 101)))[:, None]
    moved = fluid.push(points, sine_flow, 20)[:, 0]
    got = fluid.advect(start, sine_flow, 400, scheme="van leer").cumsum(0) / 100
    shares = torch.searchsorted(moved, torch.linspace(0.01, 1, 100, dtype=torch.float64)) / 20000
    assert (got - shares).abs().mean() < 5e-4  # discretisation, 1/cells²


@pytest.mark.parametrize("scheme", ["upwind", "van leer"])
@pytest.mark.parametrize("dim", [1, 2])
def test_mass_is_kept_to_round_off(scheme, dim, generator):
    """What leaves a cell enters the next, whatever the field, also one that runs into the walls."""
    density = torch.rand(*(20,) * dim, generator=generator, dtype=torch.float64)
    got = fluid.advect(density, lambda x, t: 0.5 - 0.8 * x.flip(1) + t, steps=150, scheme=scheme)
    torch.testing.assert_close(got.sum(), density.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scheme", ["upwind", "van leer"])
def test_density_stays_nonnegative_at_the_largest_courant_number(scheme):
    """A spike in an empty domain, on a field that changes sign."""
    density = torch.zeros(20, 20, dtype=torch.float64)
    density[3, 16] = 400.0
    steps = 20 if scheme == "upwind" else 40
    got = fluid.advect(density, lambda x, t: 0.5 * torch.sign(x.flip(1) - 0.5), steps=steps, scheme=scheme)
    assert got.min() >= 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_upwind_at_courant_number_one_shifts_by_whole_cells(sign):
    """A unit velocity moves the density by 5 cells in 5 steps of one cell, exactly."""
    density = torch.zeros(20, dtype=torch.float64)
    density[8:11] = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    got = fluid.advect(density, lambda x, t: torch.full_like(x, sign), steps=5, stop=0.25)
    torch.testing.assert_close(got, density.roll(5 if sign > 0 else -5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", ["upwind", "van leer"])
def test_a_mirrored_field_gives_the_mirrored_density(scheme, generator):
    """Left and right are a convention."""
    density = torch.rand(30, generator=generator, dtype=torch.float64)
    one = fluid.advect(density, lambda x, t: 0.8 - x, steps=80, scheme=scheme)
    other = fluid.advect(density.flip(0), lambda x, t: 0.2 - x, steps=80, scheme=scheme)
    torch.testing.assert_close(other, one.flip(0), rtol=1e-11, atol=0)  # float64 algebra


def test_first_axis_moves_first_component():
    """A field along the second component leaves the sums along the second axis alone."""
    density = torch.rand(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = fluid.advect(density, lambda x, t: x.new_tensor([0.0, 1.0]).expand_as(x), steps=20)
    torch.testing.assert_close(got.sum(1), density.sum(1), rtol=1e-12, atol=0)
    assert got[:, -1].sum() > 5 * density[:, -1].sum()


def test_a_shear_moves_each_row_at_the_speed_of_its_centre():
    """With v = (y, 0) the mean position of a row away from the walls moves by exactly y in unit time."""
    x, y = centres(40, 5)
    density = torch.exp(-((x - 0.3) ** 2) / 0.005) * (x < 0.5)
    got = fluid.advect(density, lambda p, t: torch.stack([p[:, 1], torch.zeros(len(p))], 1), steps=20, stop=0.25)
    shift = (x * got).sum(0) / got.sum(0) - (x * density).sum(0) / density.sum(0)
    torch.testing.assert_close(shift, 0.25 * y[0], rtol=0, atol=1e-9)  # what numerical diffusion brings to the walls


def test_a_courant_number_above_one_is_refused_and_the_advice_works():
    """Speed 1 on 20 cells needs 20 steps; 8 are 2.5 times too few."""
    density = torch.ones(20, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Courant number 2\.5 at t=0 is above 1 .* at least 2\.5 times as many"):
        fluid.advect(density, lambda x, t: torch.ones_like(x), steps=8)
    assert fluid.advect(density, lambda x, t: torch.ones_like(x), steps=20).isfinite().all()
    with pytest.raises(ValueError, match=r"above 0\.5 for 'van leer'"):
        fluid.advect(density, lambda x, t: torch.ones_like(x), steps=20, scheme="van leer")


def test_dtype_follows_the_density():
    """float32 in, float32 out."""
    density, _ = sine_densities(16)
    assert fluid.advect(density.float(), sine_flow, 32, scheme="van leer").dtype == torch.float32
    assert fluid.helmholtz(torch.rand(2, 4, 4)).gradient.dtype == torch.float32


@pytest.mark.parametrize(
    ("density", "match"),
    [
        (torch.tensor([1.0, -2.0, 1.0]), "nonnegative; its least value is -2"),
        (torch.tensor([1.0, torch.nan, 1.0]), "finite"),
        (torch.ones(1), r"2 cells or more an axis, got \(1,\)"),
        (torch.ones(3, 3, 3), r"got \(3, 3, 3\)"),
    ],
)
def test_bad_densities_are_refused(density, match):
    """Each message names what was seen."""
    with pytest.raises(ValueError, match=match):
        fluid.advect(density, still, 4)


def test_bad_times_steps_schemes_and_fields_are_refused():
    """Each message names what was seen."""
    density = torch.ones(8)
    with pytest.raises(ValueError, match=r"\[0, 1\], got start=0 and stop=1\.5"):
        fluid.advect(density, still, 4, stop=1.5)
    with pytest.raises(ValueError, match=r"\[0, 1\], got start=-0\.1"):
        fluid.push(torch.zeros(3, 1), still, 4, start=-0.1)
    with pytest.raises(ValueError, match="forwards only"):
        fluid.advect(density, still, 4, start=0.5, stop=0.2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        fluid.push(torch.zeros(3, 1), still, 0)
    with pytest.raises(ValueError, match="got 'godunov'"):
        fluid.advect(density, still, 4, scheme="godunov")
    with pytest.raises(ValueError, match=r"shape \(7, 1\), got shape \(7,\)"):
        fluid.advect(density, lambda x, t: x[:, 0], 4)
    with pytest.raises(ValueError, match="7 that are not finite"):
        fluid.advect(density, lambda x, t: x / 0, 4)


def test_helmholtz_is_the_projection_on_gradients(generator):
    """Oracle: dense least squares on the gradients of all corner potentials of a 3 × 4 grid."""
    columns = []
    for corner in torch.eye(20, dtype=torch.float64).reshape(20, 4, 5):
        along_x = corner.diff(dim=0).unfold(1, 2, 1).mean(-1) * 3
        along_y = corner.diff(dim=1).unfold(0, 2, 1).mean(-1) * 4
        columns.append(torch.stack([along_x, along_y]).flatten())
    v = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    matrix = torch.stack(columns, 1).numpy()
    want = matrix @ np.linalg.lstsq(matrix, v.flatten().numpy(), rcond=None)[0]
    torch.testing.assert_close(fluid.helmholtz(v).gradient.flatten(), torch.tensor(want), rtol=0, atol=1e-12)


def test_helmholtz_parts_are_orthogonal_and_add_up(generator):
    """Pythagoras to round-off, on a field that is noise."""
    v = torch.randn(2, 17, 24, generator=generator, dtype=torch.float64)
    split = fluid.helmholtz(v)
    torch.testing.assert_close(split.gradient + split.solenoidal, v, rtol=0, atol=1e-13)
    assert (split.gradient * split.solenoidal).sum().abs() < 1e-11 * v.square().sum()
    parts = split.gradient.square().sum() + split.solenoidal.square().sum()
    torch.testing.assert_close(parts, v.square().sum(), rtol=1e-12, atol=0)


def test_quadratic_potentials_are_pure_gradients():
    """Central differences are exact for p = x² + 3xy − y²/2 + x."""
    x, y = centres(12, 9)
    split = fluid.helmholtz(torch.stack([2 * x + 3 * y + 1, 3 * x - y]))
    assert split.solenoidal.abs().max() < 1e-13


@pytest.mark.parametrize("part", ["gradient", "solenoidal"])
def test_smooth_gradients_and_curls_are_recognised_at_second_order(part):
    """∇ of cos(2πx)cos(πy), and the curl of the stream function sin(2πx)sin(πy): the other part falls as h²."""
    wrong = []
    for n in (16, 32, 64):
        x, y = (math.pi * z for z in centres(n, n))
        if part == "gradient":
            v = torch.stack([-2 * (2 * x).sin() * y.cos(), -(2 * x).cos() * y.sin()])
            wrong.append(fluid.helmholtz(v).solenoidal.norm() / n)
        else:
            v = torch.stack([(2 * x).sin() * y.cos(), -2 * (2 * x).cos() * y.sin()])
            wrong.append(fluid.helmholtz(v).gradient.norm() / n)
    assert ((slopes(wrong) > 1.9) & (slopes(wrong) < 2.1)).all()
    assert wrong[-1] < 1e-3


def test_the_divergence_free_share_is_that_of_the_mixture():
    """3 parts of a unit gradient and 4 of a unit curl, mode (1, 1), where both are exact: 16/25."""
    x, y = (math.pi * z for z in centres(16, 16))
    gradient = torch.stack([-x.sin() * y.cos(), -x.cos() * y.sin()])
    curl = torch.stack([x.sin() * y.cos(), -x.cos() * y.sin()])
    assert fluid.helmholtz(3 * gradient + 4 * curl).solenoidal_share == pytest.approx(16 / 25, rel=1e-12)


def test_bad_fields_are_refused_by_helmholtz():
    """Each message names what was seen."""
    with pytest.raises(ValueError, match="got 1 x 4"):
        fluid.helmholtz(torch.ones(2, 1, 4))
    with pytest.raises(ValueError, match="8 values of v are not finite"):
        fluid.helmholtz(torch.full((2, 2, 2), torch.nan))
