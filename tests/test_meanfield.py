"""Particles, grid and recorded runs of the mean-field flow, against closed forms."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from geodesic import meanfield as mf
from geodesic import records, transport
from geodesic.meanfield import models, pde, runs
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

F64 = torch.float64


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=F64)


def quadratic(matrix, centre):
    """V(θ) = ½ (θ − a)ᵀ A (θ − a)."""
    return mf.Problem(potential=lambda z: ((z - centre) @ matrix * (z - centre)).sum(-1) / 2)


def spread(strength):
    """(k/4) ∬ ‖x − y‖² dμ dμ = (k/2) (∫ ‖x‖² dμ − ‖∫ x dμ‖²), through the moments Φ(x) = (x, ‖x‖²)."""

    def moments(points, weights):
        mean = (weights.unsqueeze(-1) * points).sum(-2)
        return torch.cat([mean, (weights * points.square().sum(-1)).sum(-1, keepdim=True)], -1)

    return mf.Problem(moments, lambda f: strength / 2 * (f[..., -1] - f[..., :-1].square().sum(-1)))


def neurons(generator, dimension=2, inputs=7):
    """A smooth two-layer problem with everything in it: data, square loss, decay."""
    x, y = draw(generator, inputs, dimension), draw(generator, inputs)

    def integrate(points, weights):
        hidden = torch.tanh(points[..., :dimension] @ x.T)
        return ((weights * points[..., dimension]).unsqueeze(-2) @ hidden).squeeze(-2)

    return mf.Problem(integrate, models.half_squared_loss(y), models.square_decay(0.1)), x, y


def brute_w2_squared(x, y):
    cost = (x[:, None] - y[None]).square().sum(-1)
    rows, columns = linear_sum_assignment(cost.numpy())
    return cost[rows, columns].mean()


# ---------------------------------------------------------------------------------------------------------- derivatives
def test_first_variation_is_the_formula_of_the_text(generator):
    """⟨∇R(f_μ), Φ(θ, ·)⟩ + V(θ), written out by hand for a tanh network and the square loss."""
    problem, x, y = neurons(generator)
    particles, points = draw(generator, 5, 3), draw(generator, 4, 3)
    features = lambda z: z[:, 2:] * torch.tanh(z[:, :2] @ x.T)  # noqa: E731
    slope = (features(particles).mean(0) - y) / len(y)
    want = features(points) @ slope + 0.05 * points.square().sum(-1)
    assert_close(mf.first_variation(problem, particles, points), want, rtol=1e-10, atol=1e-12)  # float64 algebra


def test_first_variation_is_the_derivative_along_a_mixture(generator):
    """d/dε F((1 − ε) μ + ε ν) at 0 is ∫ F′(μ) d(ν − μ); the left side by central differences."""
    problem, *_ = neurons(generator)
    mu, nu = draw(generator, 5, 3), draw(generator, 4, 3)
    both = torch.cat([mu, nu])
    mass = lambda e: torch.tensor([(1 - e) / 5] * 5 + [e / 4] * 4, dtype=F64)  # noqa: E731
    value = lambda e: problem.energy(both, mass(e))  # noqa: E731
    want = (value(1e-4) - value(-1e-4)) / 2e-4
    got = mf.first_variation(problem, mu, nu).mean() - mf.first_variation(problem, mu).mean()
    assert_close(got, want, rtol=1e-7, atol=1e-9)  # F is quadratic in ε: rounding of the difference only


def test_parameter_gradient_is_the_wasserstein_gradient_over_m(generator):
    """∂F/∂θ_j = (1/m) ∇F′(μ)(θ_j), ∇F′ by differentiating the first variation in θ with μ held fixed."""
    problem, *_ = neurons(generator)
    particles = draw(generator, 6, 3).requires_grad_()
    (plain,) = torch.autograd.grad(problem.energy(particles, mf.uniform_weights(particles)), particles)
    points = particles.detach().clone().requires_grad_()
    (velocity,) = torch.autograd.grad(mf.first_variation(problem, particles.detach(), points).sum(), points)
    assert_close(plain, velocity / 6, rtol=1e-10, atol=1e-12)  # float64 algebra
    assert_close(mf.wasserstein_gradient(problem, particles.detach()), velocity, rtol=1e-10, atol=1e-12)


def test_energy_is_convex_along_mixtures(generator):
    """F(½ μ + ½ ν) ≤ ½ F(μ) + ½ F(ν) for 50 random pairs: R is convex and ∫ V dμ linear."""
    problem, *_ = neurons(generator)
    mu, nu = draw(generator, 50, 5, 3), draw(generator, 50, 5, 3)
    middle = mf.energy(problem, torch.cat([mu, nu], -2))
    assert (middle <= (mf.energy(problem, mu) + mf.energy(problem, nu)) / 2 + 1e-12).all()


def test_problem_refuses_half_a_loss():
    with pytest.raises(ValueError, match="integrate and risk together"):
        mf.Problem(risk=lambda f: f)


def test_problem_refuses_nothing():
    with pytest.raises(ValueError, match="nothing to minimise"):
        mf.Problem()


# ------------------------------------------------------------------------------------------------ closed forms of flows
def test_quadratic_potential_has_the_matrix_exponential(generator):
    """X_t = a + e^{−At} (X_0 − a)."""
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    centre = torch.tensor([1.0, -2.0], dtype=F64)
    start = draw(generator, 6, 2)
    end = mf.flow(quadratic(matrix, centre), start, [0.0, 0.7], "rk4", substeps=50).particles[-1]
    want = centre + (start - centre) @ torch.matrix_exp(-0.7 * matrix)
    assert_close(end, want, rtol=0, atol=1e-8)  # RK4: step⁴ ~ 4e-8 times a small constant


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4), ("jko", 1)])
def test_scheme_has_its_order(method, order, generator):
    """Slope of log error against log step on the quadratic potential, between 8 and 16 steps."""
    matrix, start = torch.diag(torch.tensor([1.0, 2.0], dtype=F64)), draw(generator, 3, 2)
    problem = quadratic(matrix, torch.zeros(2, dtype=F64))
    want = start @ torch.matrix_exp(-matrix)
    errors = [(mf.flow(problem, start, [0.0, 1.0], method, substeps=n).particles[-1] - want).norm() for n in (8, 16)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)  # leading term only at this step


def test_langevin_keeps_a_gaussian_gaussian():
    """V = ½ l x², temperature τ: mean e^{−lt} m₀, variance τ/l + (s₀ − τ/l) e^{−2lt}, at two times.

    The particles do not interact, so 20,000 of them estimate both; the chain of Euler–Maruyama is Gaussian too.
    """
    generator = torch.Generator().manual_seed(1)
    l, tau, n, step = 1.5, 0.4, 20_000, 0.005
    start = 2 + 0.5 * torch.randn(n, 1, generator=generator, dtype=F64)
    problem = mf.Problem(potential=models.square_decay(l))
    trajectory = mf.flow(problem, start, [0, 0.5, 1.0], noise=tau, generator=generator, substeps=int(0.5 / step))
    for t, cloud in zip((0.5, 1.0), trajectory.particles[1:, :, 0], strict=True):
        mean, variance = 2 * math.exp(-l * t), tau / l + (0.25 - tau / l) * math.exp(-2 * l * t)
        bias = l * step  # first-order scheme, relative
        # Gaussian W₂ (Bures on the line) to the closed form, against 4 standard errors of mean and deviation
        w2 = math.hypot(cloud.mean() - mean, cloud.std() - math.sqrt(variance))
        assert w2 < 4 * math.sqrt(1.5 * variance / n) + bias * (mean + math.sqrt(variance))


def test_interaction_contracts_deviations_and_keeps_the_mean(generator):
    """(k/4) ∬ ‖x − y‖²: x − mean shrinks as e^{−kt}, the mean stands still."""
    start = draw(generator, 7, 2)
    end = mf.flow(spread(0.8), start, [0.0, 1.3], "rk4", substeps=40).particles[-1]
    mean = start.mean(0)
    assert_close(end.mean(0), mean, rtol=1e-10, atol=1e-12)  # float64 algebra
    assert_close(end - mean, math.exp(-0.8 * 1.3) * (start - mean), rtol=0, atol=1e-7)  # RK4 error


@pytest.mark.parametrize("n", [1, 3, 20])
def test_distance_of_samples_to_the_uniform_measure(n):
    """E W₂²(μ_n, U[0, 1]) = 1/(6n) exactly (order statistics); 4,000 draws, 4 standard errors.

    M midpoints stand for U[0, 1]: their cells add exactly 1/(12 M²).
    """
    generator = torch.Generator().manual_seed(n)
    midpoints = (torch.arange(600, dtype=F64) + 0.5) / 600
    cost = runs.line_w2_squared(torch.rand(4000, n, generator=generator, dtype=F64), midpoints) + 1 / (12 * 600**2)
    assert abs(cost.mean() - 1 / (6 * n)) < 4 * cost.std() / math.sqrt(4000)


def test_energy_identity_and_halving_of_its_residual(generator):
    """F(0) − F(T) = ∫ ∫ ‖∇F′‖² dμ dt; what Euler's scheme leaves over halves with the step."""
    problem, *_ = neurons(generator)
    start = draw(generator, 8, 3)
    left = [mf.flow(problem, start, [0.0, 2.0], substeps=n).imbalance()[-1].abs() for n in (200, 400)]
    lost = mf.energy(problem, start) - mf.flow(problem, start, [0.0, 2.0], substeps=200).energies[-1]
    assert left[0] < 0.02 * lost  # first order: 200 steps leave about a hundredth
    assert float(left[0] / left[1]) == pytest.approx(2, rel=0.05)  # leading term only


def test_dissipation_is_the_rate_of_decrease(generator):
    """−dF/dt at the start by a difference quotient of a very small step."""
    problem, *_ = neurons(generator)
    trajectory = mf.flow(problem, draw(generator, 8, 3), [0.0, 1e-6])
    rate = (trajectory.energies[0] - trajectory.energies[1]) / 1e-6
    assert_close(rate, trajectory.dissipation[0], rtol=1e-4, atol=0)  # O(step), and rounding 1e-16/1e-6


def test_two_flows_of_a_convex_functional_contract(generator):
    """F = ∫ l/2 ‖x‖² + (k/2) variance is l-convex along geodesics: W₂(μ_t, ν_t) ≤ e^{−lt} W₂(μ_0, ν_0)."""
    base = spread(0.8)
    problem = dataclasses.replace(base, potential=models.square_decay(0.6))
    mu, nu = draw(generator, 9, 2), 2 + draw(generator, 9, 2)
    ends = mf.flow(problem, torch.stack([mu, nu]), [0.0, 1.0], "rk4", substeps=40).particles[-1]
    assert brute_w2_squared(*ends) <= math.exp(-2 * 0.6) * brute_w2_squared(mu, nu) * (1 + 1e-6)  # RK4 error


def test_two_flows_of_a_potential_contract_exactly(generator):
    """With V = l/2 ‖x‖² alone the flow is a scaling, and the bound an equality."""
    mu, nu = draw(generator, 9, 2), 2 + draw(generator, 9, 2)
    problem = mf.Problem(potential=models.square_decay(0.6))
    ends = mf.flow(problem, torch.stack([mu, nu]), [0.0, 1.0], "rk4", substeps=40).particles[-1]
    assert_close(brute_w2_squared(*ends), math.exp(-1.2) * brute_w2_squared(mu, nu), rtol=1e-7, atol=0)  # RK4


@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "jko"])
def test_doubled_particles_move_as_before(method, generator):
    """A measure does not know how many particles carry it; a step without the factor m would halve the motion."""
    problem, *_ = neurons(generator)
    start = draw(generator, 5, 3)
    once, twice = (
        mf.flow(problem, z, [0.0, 1.0], method, substeps=4).particles[-1] for z in (start, torch.cat([start, start]))
    )
    assert_close(twice[:5], once, rtol=0, atol=2e-6)  # 10 times the tolerance of the inner solver of "jko"
    assert_close(twice[5:], once, rtol=0, atol=2e-6)


def test_plain_gradient_descent_with_the_step_times_m_is_the_euler_scheme(generator):
    """torch.optim.SGD with lr = m · step on F(θ_1 … θ_m) goes through the same states."""
    problem, *_ = neurons(generator)
    start = draw(generator, 5, 3)
    theta = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([theta], lr=5 * 0.1)
    for _ in range(10):
        optimiser.zero_grad()
        problem.energy(theta, mf.uniform_weights(theta)).backward()
        optimiser.step()
    assert_close(mf.flow(problem, start, [0, 1], substeps=10).particles[-1], theta.detach(), rtol=1e-10, atol=1e-12)


def test_batch_of_initialisations_is_each_of_them_alone(generator):
    """Leading axes do not see each other."""
    problem, *_ = neurons(generator)
    start = draw(generator, 2, 3, 5, 3)
    together = mf.flow(problem, start, [0.0, 1.0], "heun", substeps=5)
    for index in itertools.product(range(2), range(3)):
        alone = mf.flow(problem, start[index], [0.0, 1.0], "heun", substeps=5)
        assert_close(together.particles[:, *index], alone.particles, rtol=1e-10, atol=1e-12)
        assert_close(together.dissipated[:, *index], alone.dissipated, rtol=1e-10, atol=1e-12)


def test_single_precision_stays_single(generator):
    start = torch.randn(4, 2, generator=generator)
    trajectory = mf.flow(mf.Problem(potential=models.square_decay(1.0)), start, [0, 1], substeps=20)
    assert trajectory.particles.dtype == trajectory.energies.dtype == torch.float32


def test_noise_repeats_with_its_seed(generator):
    start = draw(generator, 4, 2)
    problem = mf.Problem(potential=models.square_decay(1.0))
    ends = [
        mf.flow(problem, start, [0, 1], noise=0.1, generator=torch.Generator().manual_seed(s), substeps=9).particles[-1]
        for s in (3, 3, 4)
    ]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flow_on_a_cuda_device_follows_the_cpu(generator):
    start, teacher = runs.draw_neurons((6,), 3, generator), runs.draw_neurons((2,), 3, generator)
    ends = [
        mf.flow(models.teacher_student(teacher.to(d)), start.to(d), [0, 1], substeps=10).particles[-1].cpu()
        for d in ("cpu", "cuda")
    ]
    assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)  # order of summation


# -------------------------------------------------------------------------------------------------- minimising movement
def test_minimising_movement_of_a_quadratic_is_the_resolvent(generator):
    """argmin ½ yᵀAy + ‖y − x‖²/(2h) is (1 + hA)⁻¹ x."""
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    start = draw(generator, 6, 2)
    got = mf.minimising_movement(quadratic(matrix, torch.zeros(2, dtype=F64)), start, 0.7)
    want = torch.linalg.solve(torch.eye(2, dtype=F64) + 0.7 * matrix, start.T).T
    assert_close(got, want, rtol=0, atol=2e-6)  # 10 times the solver's threshold


def test_minimising_movement_beats_standing_still_by_the_distance(generator):
    """F(ν) + W₂²(μ, ν)/(2h) ≤ F(μ), W₂ by an assignment that knows nothing of the pairing."""
    problem, *_ = neurons(generator)
    start = draw(generator, 6, 3)
    end = mf.minimising_movement(problem, start, 2.0)
    assert mf.energy(problem, end) + brute_w2_squared(start, end) / 4 < mf.energy(problem, start)


def test_minimising_movement_is_stable_where_euler_is_not(generator):
    problem, start = mf.Problem(potential=models.square_decay(50.0)), draw(generator, 3, 2)
    with pytest.raises(RuntimeError, match="method 'jko'"):
        mf.flow(problem, start, [0.0, 1.0])
    energies = mf.flow(problem, start, [0.0, 1.0, 2.0], "jko").energies
    assert (energies.diff() < 0).all()


def test_minimising_movement_says_when_it_did_not_converge(generator):
    problem, *_ = neurons(generator)
    with pytest.raises(RuntimeError, match=r"reached a residual of .* more iterations \(now 1\)"):
        mf.minimising_movement(problem, draw(generator, 6, 3), 5.0, iterations=1)


def test_minimising_movement_refuses_a_step_of_zero(generator):
    with pytest.raises(ValueError, match="must be positive, got 0"):
        mf.minimising_movement(spread(1.0), draw(generator, 3, 2), 0.0)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("particles", "times", "options", "message"),
    [
        (torch.zeros(0, 2), [0, 1], {}, "there are no particles"),
        (torch.tensor([[0.0, math.nan]]), [0, 1], {}, "1 entries of the particles are not finite"),
        (torch.tensor([[0.0, -3.0]]), [0, 1], {}, "1 of 1 particles lie outside Θ"),
        (torch.zeros(1, 2), [-1.0, 1.0], {}, "not negative"),
        (torch.zeros(1, 2), [0.0, 2.0, 1.0], {}, "increase strictly"),
        (torch.zeros(1, 2), [0.0, math.inf], {}, "finite"),
        (torch.zeros(1, 2), [], {}, "non-empty"),
        (torch.zeros(1, 2), [0, 1], {"method": "newton"}, "unknown method 'newton'"),
        (torch.zeros(1, 2), [0, 1], {"noise": -1.0}, "got noise -1.0"),
        (torch.zeros(1, 2), [0, 1], {"noise": 1.0, "method": "rk4"}, "used with 'euler'"),
        (torch.zeros(1, 2), [0, 1], {"substeps": 0}, "substeps must be at least 1"),
    ],
)
def test_flow_refuses(particles, times, options, message):
    problem = mf.Problem(potential=models.square_decay(1.0), inside=lambda z: (z >= -1).all(-1))
    with pytest.raises(ValueError, match=message):
        mf.flow(problem, particles, times, **options)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_too_long_a_step_is_refused_with_the_remedy(noise, generator):
    """V = ½ · 10 x²: an Euler step of 0.5 multiplies by −4. With noise it is the drift that is judged."""
    problem = mf.Problem(potential=models.square_decay(10.0))
    start = torch.stack([torch.zeros(3, 2), torch.ones(3, 2)])
    message = r"step of 0\.5 .* raised the energy .*\(initialisation 1\).* 0\.125 through substeps"
    with pytest.raises(RuntimeError, match=message):
        mf.flow(problem, start, [0, 1], substeps=2, noise=noise, generator=generator)


def test_infinite_energy_at_the_start_is_refused():
    problem = mf.Problem(potential=lambda z: z.log().sum(-1))
    with pytest.raises(ValueError, match="energy of the initial particles"):
        mf.flow(problem, torch.zeros(2, 1), [0, 1])


def test_leaving_the_domain_is_refused():
    problem = mf.Problem(potential=lambda z: z.sum(-1), inside=lambda z: (z >= 0).all(-1))
    with pytest.raises(RuntimeError, match="2 particles left Θ"):
        mf.flow(problem, torch.full((2, 1), 0.5), [0, 1])


def test_slack_lets_a_kink_pass():
    """V = |x|: a step across the kink raises the energy by less than the step."""
    problem = mf.Problem(potential=lambda z: z.abs().sum(-1))
    start = torch.tensor([[0.01]], dtype=F64)
    with pytest.raises(RuntimeError, match="allow a slack"):
        mf.flow(problem, start, [0.0, 0.1])
    assert mf.flow(problem, start, [0.0, 0.1], slack=0.1).particles[-1].item() == pytest.approx(-0.09)


# --------------------------------------------------------------------------------------------------------------- models
def test_two_layer_is_the_torch_network(generator):
    """(1/m) Σ a ReLU(⟨w, x⟩ + b) by nn.Linear layers with the last divided by m."""
    x, theta = draw(generator, 6, 4), draw(generator, 5, 4 + 1 + 3)
    first, last = torch.nn.Linear(4, 5).double(), torch.nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        first.weight.copy_(theta[:, :4])
        first.bias.copy_(theta[:, 4])
        last.weight.copy_(theta[:, 5:].T / 5)
        want = last(first(x).relu())
    assert_close(models.two_layer(x, 3)(theta, mf.uniform_weights(theta)), want, rtol=1e-10, atol=1e-12)
    assert_close(models.two_layer(x, 3, 2.0)(theta, mf.uniform_weights(theta)), 2 * want, rtol=1e-10, atol=1e-12)


def test_cross_entropy_is_torchs(generator):
    output, labels = draw(generator, 2, 6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    want = torch.stack([torch.nn.functional.cross_entropy(each, labels) for each in output])
    assert_close(models.cross_entropy_loss(labels)(output), want, rtol=1e-10, atol=1e-12)


def test_arc_cosine_kernel_is_the_mean_over_gaussian_inputs(generator):
    """In the plane x ~ N(0, I) may be replaced by the circle of radius √2: 20,000 equally spaced angles."""
    theta, other = draw(generator, 4, 3), draw(generator, 5, 3)
    angle = 2 * math.pi * torch.arange(20_000, dtype=F64) / 20_000
    x = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
    values = [z[:, 2:] * (z[:, :2] @ x.T).relu() for z in (theta, other)]
    want = values[0] @ values[1].T / len(x)
    assert_close(models.arc_cosine_kernel(theta, other), want, rtol=0, atol=1e-6)  # kinks: O(1/20,000²)


def test_population_flow_is_the_limit_of_many_inputs(generator):
    """∇F′ of the Interaction equals that of a Problem on the circle of radius √2 (same quadrature)."""
    teacher, student = runs.draw_neurons((3,), 2, generator), draw(generator, 4, 3)
    angle = 2 * math.pi * torch.arange(20_000, dtype=F64) / 20_000
    integrate = models.relu_neurons(math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1))
    sampled = mf.Problem(
        integrate, models.half_squared_loss(integrate(teacher, mf.uniform_weights(teacher))), models.square_decay(0.3)
    )
    exact = models.teacher_student(teacher, 0.3)
    assert_close(mf.energy(exact, student), mf.energy(sampled, student), rtol=0, atol=1e-6)
    got, want = (mf.wasserstein_gradient(problem, student) for problem in (exact, sampled))
    assert_close(got, want, rtol=0, atol=1e-3)  # a kink between two angles moves the gradient by O(1/20,000)


def test_arc_cosine_gradient_is_finite_for_equal_and_opposite_neurons():
    """The angle's own derivative is infinite there, that of K is not: at φ = 0 it is that of ½ a a′ ⟨w, w′⟩."""
    theta = torch.tensor([[3.0, 4.0, 2.0]], dtype=F64, requires_grad=True)  # ‖w‖ = 5, cos φ = ±1: exact
    other = torch.tensor([[3.0, 4.0, 1.0], [-3.0, -4.0, 1.0]], dtype=F64)
    (equal,) = torch.autograd.grad(models.arc_cosine_kernel(theta, other)[0, 0], theta)
    (opposite,) = torch.autograd.grad(models.arc_cosine_kernel(theta, other)[0, 1], theta)
    assert_close(equal, torch.tensor([[3.0, 4.0, 12.5]], dtype=F64), rtol=1e-10, atol=0)  # float64 algebra
    assert_close(opposite, torch.zeros(1, 3, dtype=F64), rtol=0, atol=1e-10)


def test_relu_flow_keeps_the_balance_of_its_layers(generator):
    """a² − ‖w‖² is conserved by the flow of 2-homogeneous neurons, so signs of a stay."""
    teacher, start = runs.draw_neurons((3,), 4, generator), runs.draw_neurons((6,), 4, generator)
    end = mf.flow(models.teacher_student(teacher), start, [0.0, 5.0], "rk4", substeps=50).particles[-1]
    assert_close(end[:, -1].square(), end[:, :-1].square().sum(-1), rtol=0, atol=1e-6)  # RK4 error
    assert torch.equal(end[:, -1].sign(), start[:, -1].sign())


# ----------------------------------------------------------------------------------------------------------------- grid
def gaussian_masses(grid, mean, variance):
    distance = (grid.centres - torch.tensor(mean, dtype=F64)).square().sum(-1)
    density = torch.exp(-distance / (2 * variance))
    return density / density.sum()


def moments(grid, masses):
    mean = masses @ grid.centres
    return mean, masses @ (grid.centres - mean).square()


@pytest.mark.parametrize(("mean", "cells"), [((1.0,), (600,)), ((1.0, -0.5), (80, 80))])
def test_grid_follows_the_gaussian_of_langevin(mean, cells):
    """In one and two dimensions: mean e^{−lt} m₀, variance τ/l + (s₀ − τ/l) e^{−2lt} on every axis."""
    l, tau, t, p = 1.0, 0.1, 0.5, len(cells)
    grid = pde.Grid((-3.0,) * p, (3.0,) * p, cells)
    start = gaussian_masses(grid, mean, 0.2)
    end = pde.solve_density(mf.Problem(potential=models.square_decay(l)), start, grid, [0, t], noise=tau).masses[-1]
    got_mean, got_variance = moments(grid, end)
    spacing = grid.spacing[0]
    assert_close(got_mean, math.exp(-l * t) * torch.tensor(mean, dtype=F64), rtol=0, atol=spacing)  # first order
    want = tau / l + (0.2 - tau / l) * math.exp(-2 * l * t)
    # upwinding adds a viscosity of at most |v| spacing / 2, here |v| < 1.5 where there is mass
    assert_close(got_variance, torch.full((p,), want, dtype=F64), rtol=0, atol=1.5 * spacing * t + spacing**2)


def test_grid_keeps_mass_and_sign_exactly(generator):
    grid = pde.Grid((-0.5,), (1.5,), (50,))
    start = torch.rand(50, generator=generator, dtype=F64)
    run = pde.solve_density(runs.line_problem(), start, grid, [0.0, 2.0, 4.0], noise=0.01)
    assert_close(run.masses.sum(-1), torch.ones(3, dtype=F64), rtol=1e-12, atol=0)  # rounding
    assert (run.masses >= 0).all()


def test_grid_loses_energy():
    grid = pde.Grid((-0.5,), (1.5,), (100,))
    run = pde.solve_density(runs.line_problem(), torch.ones(100, dtype=F64), grid, [0.0, 1.0, 5.0, 20.0])
    assert (run.energies.diff() < 0).all()


def test_grid_and_particles_agree_at_first_order():
    """W₂ of 2,000 equally spaced particles to the density, on cells halved twice: falls with the spacing."""
    problem, ends = runs.line_problem(), []
    particles = ((torch.arange(2000, dtype=F64) + 0.5) / 2000).unsqueeze(-1)
    cloud = mf.flow(problem, particles, [0.0, 10.0], "heun", substeps=20).particles[-1, :, 0]
    for cells in (100, 200, 400):
        grid = pde.Grid((0.0,), (1.0,), (cells,))
        masses = pde.solve_density(problem, torch.ones(cells, dtype=F64), grid, [0.0, 10.0]).masses[-1]
        # quantiles of the cell-wise constant density at the levels of the particles
        edges = torch.cat([torch.zeros(1, dtype=F64), masses.cumsum(0)])
        levels = (torch.arange(2000, dtype=F64) + 0.5) / 2000
        cell = torch.searchsorted(edges, levels).clamp(1, cells) - 1
        quantile = (cell + (levels - edges[cell]) / masses[cell]) * grid.spacing[0]
        ends.append(float(((quantile - cloud.sort().values) ** 2).mean().sqrt()))
    assert ends[2] < 0.4 * ends[0]  # factor 4 at first order, √4 at worst where the density jumps
    assert ends[2] < 0.02


def test_grid_and_particles_agree_in_two_dimensions():
    """Neurons (w, a) in the plane: network output of the density against that of 40 × 40 equally spaced particles."""
    x = torch.linspace(-2, 2, 9, dtype=F64)

    def integrate(points, weights):
        return ((weights * points[..., 1]).unsqueeze(-2) @ torch.tanh(points[..., :1] * x)).squeeze(-2)

    problem = mf.Problem(integrate, models.half_squared_loss(torch.tanh(1.5 * x)))
    grid = pde.Grid((-2.0, -2.0), (2.0, 2.0), (60, 60))
    inside = (grid.centres.abs() < 1).all(-1).double()
    masses = pde.solve_density(problem, inside, grid, [0.0, 2.0]).masses[-1]
    axis = (torch.arange(40, dtype=F64) + 0.5) / 20 - 1
    cloud = mf.flow(problem, torch.cartesian_prod(axis, axis), [0.0, 2.0], "heun", substeps=10).particles[-1]
    got, want = integrate(grid.centres, masses), integrate(cloud, mf.uniform_weights(cloud))
    assert want.norm() > 0.5
    assert (got - want).norm() < 0.1 * want.norm()  # first order in the spacing 1/15


@pytest.mark.parametrize(
    ("masses", "times", "noise", "message"),
    [
        (torch.ones(3), [0, 1], 0.0, "3 masses for a grid of 4 cells"),
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), [0, 1], 0.0, "not negative"),
        (torch.zeros(4), [0, 1], 0.0, "not all zero"),
        (torch.ones(4), [1, 0], 0.0, "strictly increasing"),
        (torch.ones(4), [0, 1], -1.0, "got -1.0"),
    ],
)
def test_grid_refuses(masses, times, noise, message):
    problem = mf.Problem(potential=models.square_decay(1.0))
    with pytest.raises(ValueError, match=message):
        pde.solve_density(problem, masses, pde.Grid((0.0,), (1.0,), (4,)), times, noise)


def test_grid_says_how_far_it_came():
    problem, grid = mf.Problem(potential=models.square_decay(1.0)), pde.Grid((0.0,), (1.0,), (40,))
    with pytest.raises(RuntimeError, match="5 steps reached time"):
        pde.solve_density(problem, torch.ones(40), grid, [0, 1], noise=1.0, most_steps=5)


@pytest.mark.parametrize("corner", [((0.0,), (0.0,), (4,)), ((0.0,), (1.0,), (1,)), ((0.0, 0.0), (1.0,), (4,))])
def test_grid_refuses_an_empty_box(corner):
    with pytest.raises(ValueError, match="lower"):
        pde.Grid(*corner)


# -------------------------------------------------------------------------------------------------------- recorded runs
SMALL = {
    "success": {"particles": [[1, 3], [20, 3]], "dimension": 4, "teacher_neurons": 1, "steps": 40},
    "chaos": {"particles": [4, 8], "reference": 16, "repeats": {"line": 2, "plane": 2, "sphere": 2}, "substeps": 20,
              "times": {"line": [0, 1], "plane": [0, 1], "sphere": [0, 1]}},
    "replication": {"particles": [4, 8], "reference": 16, "repeats": {"plane": 2}, "times": {"plane": [0, 1]},
                    "substeps": 20},
    "real": {"dataset": "digits", "particles": [10, 20], "scalings": [["mean-field", 1.0, 500], ["standard", 1.0, 500]],
             "steps": 10, "seeds": [0], "w2_points": 15},
}  # fmt: skip


@pytest.fixture(params=sorted(SMALL))
def small(request):
    return runs.SETTINGS[request.param] | SMALL[request.param]


def test_recorded_run_is_complete_and_repeats_nothing(small, tmp_path):
    path = runs.run(small, tmp_path)
    record = records.read(path)
    assert record["status"] == "complete"
    assert record["provenance"]["command"].endswith("--out results/meanfield")
    before = path.stat().st_mtime_ns
    assert runs.run(small, tmp_path) == path
    assert path.stat().st_mtime_ns == before


def test_interrupted_run_goes_on_where_it_stopped(small, tmp_path, monkeypatch):
    """The second part fails once; the finished run holds the same numbers as one without interruption."""
    whole = records.read(runs.run(small, tmp_path / "whole"))["final"]["parts"]
    parts, measure = runs._EXPERIMENTS[small["experiment"]]
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setitem(runs._EXPERIMENTS, small["experiment"], (parts, failing))
    with pytest.raises(KeyboardInterrupt):
        runs.run(small, tmp_path)
    assert records.read(tmp_path / f"{records.name(small)}.json")["status"] == "unfinished"
    again = records.read(runs.run(small, tmp_path))["final"]["parts"]
    assert len(calls) == len(whole) + 1
    strip = lambda parts: [{k: v for k, v in part.items() if "seconds" not in k} for part in parts]  # noqa: E731
    assert json.dumps(strip(again)) == json.dumps(strip(whole))


def test_replication_is_the_chaos_of_another_seed_without_its_distances(tmp_path):
    settings = runs.SETTINGS["replication"] | SMALL["replication"]
    whole = {key: value for key, value in settings.items() if key != "w2_repeats"} | {"experiment": "chaos"}
    first, second = (records.read(runs.run(each, tmp_path))["final"]["parts"] for each in (settings, whole))
    for part, other in zip(first, second, strict=True):
        assert part["function_gap"] == other["function_gap"]
        assert part["loss_gap"] == other["loss_gap"]
        assert [len(row) for row in part["w2_squared"]] == [0, 0]
        assert [len(row) for row in other["w2_squared"]] == [2, 2]


def test_success_needs_a_neuron_of_the_right_sign(tmp_path):
    """One teacher neuron, twenty students: all learn; one student learns only with the teacher's sign."""
    parts = records.read(
        runs.run(runs.SETTINGS["success"] | SMALL["success"] | {"particles": [[1, 6], [20, 6]], "steps": 150}, tmp_path)
    )["final"]["parts"]
    one, many = ([risk < 1e-2 for risk in part["relative_risk"]] for part in parts)
    assert one == parts[0]["enough_signs"]
    assert all(many)


def test_standard_scaling_moves_particles_less(tmp_path):
    """At equal speed of f the displacement falls as 1/√m in the standard scaling, and not in the mean-field one."""
    settings = runs.SETTINGS["real"] | SMALL["real"] | {"particles": [20, 320], "steps": 30}
    parts = records.read(runs.run(settings, tmp_path))["final"]["parts"]
    moved = {(part["scaling"], part["m"]): part["displacement"] for part in parts}
    assert moved["standard", 20] / moved["standard", 320] == pytest.approx(4, rel=0.3)
    assert moved["mean-field", 20] / moved["mean-field", 320] == pytest.approx(1, rel=0.3)
    assert all(part["w2"] <= part["displacement"] * 1.5 for part in parts)


def test_line_distance_is_the_assignment(generator):
    x, y = draw(generator, 4), draw(generator, 12)
    want = transport.w2_squared(x.repeat_interleave(3).unsqueeze(-1), y.unsqueeze(-1))
    assert float(runs.line_w2_squared(x, y)) == pytest.approx(want, rel=1e-9)


def test_missing_record_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m geodesic\.meanfield\.runs chaos"):
        runs.recorded("chaos", tmp_path)


def test_missing_data_end_the_command_with_one_line(tmp_path, capsys):
    assert runs.main(["real", "--out", str(tmp_path), "--root", str(tmp_path / "nothing")]) == 2
    assert "GEODESIC_DATA" in capsys.readouterr().err
