"""Capacity and one step against closed forms, other derivatives and counting."""

import math
from itertools import pairwise

import pytest
import torch
from geodesic import degradation, networks
from geodesic.degradation import Chain
from torch import nn
from torch.nn import functional as F


def squared(value, target):
    """Half the squared error, summed."""
    return 0.5 * (value - target).square().sum()


def perceptron(generator, sizes=(5, 7, 7, 3), dtype=torch.float64):
    """A small ReLU network with random weights and biases."""
    layers = []
    for before, after in pairwise(sizes):
        layer = nn.Linear(before, after, dtype=dtype)
        nn.init.normal_(layer.weight, std=before**-0.5, generator=generator)
        nn.init.normal_(layer.bias, std=0.3, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batch(generator, n=11, inputs=5, classes=3):
    x = torch.randn(n, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (n,), generator=generator)


# ------------------------------------------------------------------------------------------------------------ capacity
class Linear(Chain):
    """⟨θ, x⟩: a model whose capacity is known."""

    parameters = property(lambda self: self.width)

    def draw(self, tries, generator):
        return torch.randn(tries, self.width, generator=generator, dtype=torch.float64)

    def __call__(self, theta, x):
        return theta @ x


@pytest.mark.parametrize(("extra", "solvable"), [(0, True), (1, False)])
def test_a_linear_model_fits_as_many_equations_as_it_has_parameters(extra, solvable, generator):
    """n generic linear equations in P unknowns have a solution iff n ≤ P. Threshold of the iterative solver."""
    fit = degradation.fit_equations(Linear(6, 1), 6 + extra, 5, generator=generator)
    assert (fit.residual < 1e-6).tolist() == [solvable] * 5


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("width", "depth"), [(6, 1), (6, 2), (8, 3)])
def test_the_count_of_equations_is_the_rank_of_the_jacobian(width, depth, residual, generator):
    """Counting symmetries against linear algebra; the best of 8 draws, for a unit shut at all points costs rank."""
    chain = Chain(width, depth, residual)
    ranks = [degradation.jacobian_rank(chain, 2 * chain.parameters, generator=generator) for _ in range(8)]
    assert max(ranks) == chain.equations


@pytest.mark.parametrize("residual", [False, True])
def test_one_equation_more_than_counted_cannot_be_fitted(residual, generator):
    """The image of a map of rank r in more than r dimensions has measure zero."""
    chain = Chain(2, 2, residual)
    fit = degradation.fit_equations(chain, chain.equations + 1, 20, generator=generator)
    assert (fit.residual > 1e-6).all()


def test_a_wide_chain_fits_few_equations(generator):
    """16 features at 4 points are linearly independent: the last layer alone solves it. Threshold of the solver."""
    fit = degradation.fit_equations(Chain(16, 2), 4, 6, generator=generator)
    assert (fit.residual < 1e-6).all()
    assert (fit.inactive == 0).all()


def test_points_behind_a_shut_unit_are_inactive(generator):
    """One unit is shut on one side of 0 and stays so; 100 symmetric points, 4 standard errors of a share of ½."""
    fit = degradation.fit_equations(Chain(1, 1), 100, 8, generator=generator)
    torch.testing.assert_close(fit.inactive, torch.full_like(fit.inactive, 0.5), rtol=0, atol=0.2)


@pytest.mark.parametrize("residual", [False, True])
def test_the_chain_is_the_formula_of_its_docstring(residual, generator):
    """Written out for depth 3 with matrices. Rounding of float64."""
    chain = Chain(3, 3, residual)
    (theta,) = chain.draw(1, generator)
    x = torch.randn(3, generator=generator, dtype=torch.float64)
    first, second, third = theta[:27].view(3, 3, 3)
    z = first @ x
    z = second @ F.relu(z) + residual * z
    z = third @ F.relu(z) + residual * z
    torch.testing.assert_close(chain(theta, x), F.relu(z).dot(theta[27:]))


def test_weights_are_drawn_with_the_deviations_of_he(generator):
    """√(1/m) for the first layer, √(2/m) for the next, that over √L in a residual chain. 4e4 draws: 5 s.e."""
    theta = Chain(200, 3, residual=True).draw(1, generator)[0]
    got = [part.std().item() for part in theta[:-200].split(200 * 200)]
    torch.testing.assert_close(got, [200**-0.5, (1.5 * 200) ** -0.5, (1.5 * 200) ** -0.5], rtol=0.02, atol=0)
    plain = Chain(200, 2).draw(1, generator)[0]
    torch.testing.assert_close(plain[40_000:80_000].std().item(), 0.1, rtol=0.02, atol=0)


def test_impossible_chains_and_fits_are_refused(generator):
    with pytest.raises(ValueError, match="width=0 must be at least 1"):
        Chain(0, 1)
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        Chain(1, 0)
    with pytest.raises(ValueError, match="n=0 and tries=1"):
        degradation.fit_equations(Chain(2, 1), 0, 1, generator=generator)


# ------------------------------------------------------------------------------------------------------------ one step
@pytest.mark.parametrize("bias", [False, True])
def test_the_gram_formula_is_what_a_step_of_sgd_does(bias, generator):
    """torch's optimiser moves one layer; its outputs are computed anew. Rounding of float64."""
    layer = nn.Linear(5, 4, bias=bias, dtype=torch.float64)
    x, y = batch(generator, classes=4)
    before = layer(x)
    gradient = torch.autograd.grad(F.cross_entropy(before, y), before, retain_graph=True)[0]
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.7)
    F.cross_entropy(before, y).backward()
    optimiser.step()
    torch.testing.assert_close(
        layer(x) - before, degradation.achieved_change(x, gradient, 0.7, bias=bias), rtol=1e-10, atol=1e-12
    )


def test_orthonormal_inputs_achieve_what_was_intended(generator):
    """K is the identity, so −ηKG = −ηG."""
    x, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    y = torch.randint(0, 4, (6,), generator=generator)
    cosines = degradation.intended_achieved_cosine(nn.Linear(6, 4, bias=False, dtype=torch.float64), x, y, 0.3)
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(cosines.alone, one)
    torch.testing.assert_close(cosines.together, one)


def test_parallel_inputs_move_together():
    """Inputs a in R¹ give K = a aᵀ, so the change is along a and the cosine |⟨a, G⟩| / (‖a‖‖G‖)."""
    a, y = torch.tensor([[1.0], [2.0], [-1.0]]).double(), torch.tensor([[3.0], [-1.0], [0.5]]).double()
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    gradient = (layer(a) - y).detach()
    got = degradation.intended_achieved_cosine(layer, a, y, 0.1, squared).alone[0]
    torch.testing.assert_close(got, (a * gradient).sum().abs() / (a.norm() * gradient.norm()))


def test_change_of_the_outputs_is_the_tangent_kernel_times_the_gradient(generator):
    """For small η the step moves the outputs by −η J Jᵀ G (eqs 25–26), J from torch.func. Error of first order in η."""
    network, (x, y) = perceptron(generator), batch(generator)
    parameters = dict(network.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(network, p, (x,)).flatten())(parameters)
    j = torch.cat([part.flatten(1) for part in jacobian.values()], 1)
    outputs = network(x)
    gradient = torch.autograd.grad(F.cross_entropy(outputs, y), outputs)[0].flatten()
    moved = j @ (j.T @ gradient)
    want = (moved @ gradient) / (moved.norm() * gradient.norm())
    got = degradation.intended_achieved_cosine(network, x, y, 1e-6).together[-1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_the_first_layer_is_always_alone(generator):
    """Its inputs are the data, which no step changes; later layers differ."""
    alone, together = degradation.intended_achieved_cosine(perceptron(generator), *batch(generator), 0.5)
    torch.testing.assert_close(together[0], alone[0])
    assert ((together - alone)[1:].abs() > 1e-3).all()


@pytest.mark.parametrize("seed", range(5))
def test_cosine_obeys_kantorovich(seed):
    """For K with eigenvalues in [s, t], cos(KG, G) ≥ 2√(st)/(s + t); a last layer has no shut outputs."""
    generator = torch.Generator().manual_seed(seed)
    x, y = batch(generator, n=4)
    layer = nn.Linear(5, 3, dtype=torch.float64)
    s, *_, t = torch.linalg.eigvalsh(x @ x.T + 1).tolist()
    got = degradation.intended_achieved_cosine(layer, x, y, 0.1).alone[0].item()
    assert 2 * math.sqrt(s * t) / (s + t) <= got <= 1 + 1e-12


def test_only_felt_points_of_a_unit_count(generator):
    """A unit open at points 0 and 1 of 3: G is 0 at point 2, and the cosine is that of K restricted to 0 and 1."""
    x = torch.tensor([[1.0, 0.5], [0.3, 2.0], [-1.0, -1.0]]).double()
    y = torch.tensor([[3.0], [-1.0], [7.0]]).double()
    network = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        network[0].weight[:], network[2].weight[:] = 1.0, 0.5
    g = 0.5 * (0.5 * x.sum(1) - y[:, 0])[:2]
    change = x[:2] @ x[:2].T @ g
    want = change @ g / (change.norm() * g.norm())
    got = degradation.intended_achieved_cosine(network, x, y, 0.1, squared).alone[0]
    torch.testing.assert_close(got, want)


def test_the_network_is_left_as_it_was(generator):
    network, (x, y) = perceptron(generator), batch(generator)
    before = [p.detach().clone() for p in network.parameters()]
    degradation.intended_achieved_cosine(network, x, y, 0.5)
    degradation.simultaneous_mismatch(network, x, y, 0.5)
    degradation.step_for_decrease(network, x, y, 0.5)
    for p, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0)
        assert p.grad is None
    assert not any(module._forward_hooks for module in network.modules())


def test_a_network_of_the_book_has_a_cosine_for_each_of_its_layers(generator):
    """Entry, two layers a block, head; float32 stays float32."""
    network = networks.build("resnet", "digits", depth=3, width=8, generator=generator)
    x = torch.randn(6, 1, 8, 8, generator=generator)
    alone, together = degradation.intended_achieved_cosine(network, x, torch.arange(6), 0.1)
    assert alone.shape == together.shape == (8,)
    assert alone.dtype == torch.float32


def test_other_layers_are_refused(generator):
    network = networks.build("plain", "digits", norm="batch", depth=1, width=8, generator=generator)
    x, y = torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6)
    for measure in (degradation.intended_achieved_cosine, degradation.simultaneous_mismatch):
        with pytest.raises(ValueError, match="BatchNorm1d hold parameters"):
            measure(network, x, y, 0.1)


# ----------------------------------------------------------------------------------------------- at once and in turn
def test_one_layer_has_no_mismatch(generator):
    x, y = batch(generator)
    got = degradation.simultaneous_mismatch(nn.Linear(5, 3, dtype=torch.float64), x, y, 0.4)
    assert got.weights == got.outputs == 0
    assert got.loss_at_once == got.loss_in_turn < got.loss


def test_two_scalar_layers_in_closed_form():
    """f = b a x, loss ½(f − y)²: at once both use e = bax − y; in turn b uses the new a. Rounding of float64."""
    a, b, x, y, eta = 0.7, -1.2, 1.5, 0.4, 0.1
    network = nn.Sequential(*(nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2)))
    with torch.no_grad():
        network[0].weight.fill_(a)
        network[1].weight.fill_(b)
    as_input = torch.tensor([[x]]).double(), torch.tensor([[y]]).double()
    got = degradation.simultaneous_mismatch(network, *as_input, eta, squared)
    e = b * a * x - y
    new_a = a - eta * b * x * e
    at_once = b - eta * a * x * e
    in_turn = b - eta * new_a * x * (b * new_a * x - y)
    torch.testing.assert_close(got.weights, abs(at_once - in_turn) / math.hypot(new_a - a, in_turn - b))
    start, first, second = b * a * x, at_once * new_a * x, in_turn * new_a * x
    torch.testing.assert_close(got.outputs, abs(first - second) / abs(second - start))
    torch.testing.assert_close(
        [got.loss, got.loss_at_once, got.loss_in_turn], [0.5 * (f - y) ** 2 for f in (start, first, second)]
    )


def test_mismatch_is_of_first_order_in_the_step(generator):
    """The steps agree to first order, so their relative difference is O(η). Slope over two halvings, band 5 %."""
    network, (x, y) = perceptron(generator), batch(generator)
    steps = [1e-4, 5e-5, 2.5e-5]
    got = [degradation.simultaneous_mismatch(network, x, y, eta).weights for eta in steps]
    slope = math.log(got[0] / got[2]) / math.log(4)
    assert 0.95 < slope < 1.05


def test_step_for_decrease_keeps_its_promise_when_small(generator):
    """loss(θ − η∇) = loss − η‖∇‖² + O(η²). First order in the share."""
    network, (x, y) = perceptron(generator), batch(generator)
    eta = degradation.step_for_decrease(network, x, y, 1e-5)
    got = degradation.simultaneous_mismatch(network, x, y, eta)
    torch.testing.assert_close((got.loss - got.loss_at_once) / got.loss, 1e-5, rtol=1e-3, atol=0)


def test_step_for_decrease_refuses_a_stationary_point():
    layer = nn.Linear(2, 1, dtype=torch.float64)
    x = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="gradient is zero"):
        degradation.step_for_decrease(layer, x, layer(x).detach(), 0.1, squared)
