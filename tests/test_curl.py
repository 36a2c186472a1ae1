"""The curl share against maps whose share is known, dense Jacobians, and its own error bar."""

import json
import math

import pytest
import torch
from geodesic import networks, probes
from torch import nn


def random(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonal(generator, k):
    return nn.init.orthogonal_(torch.empty(k, k, dtype=torch.float64), generator=generator)


def dense(function, x):
    """Jacobian at each point, (n, k, k), by autograd."""
    k = x[0].numel()
    with torch.no_grad():
        rows = [torch.autograd.functional.jacobian(lambda z: function(z[None])[0], point) for point in x]
    return torch.stack(rows).reshape(len(x), k, k)


def share_of(jacobians, still):
    """The definition, with `still` in the place of I."""
    skew = (jacobians - jacobians.mT) / 2
    return (skew.square().sum() / (jacobians - still).square().sum()).item()


@pytest.fixture
def layer(generator):
    """A smooth map of R^7 that is no gradient: x + W₂ tanh(W₁ x)."""
    w1, w2 = random(generator, 5, 7), random(generator, 7, 5)
    return lambda x: x + torch.tanh(x @ w1.T) @ w2.T


def test_symmetric_matrix_has_no_curl(generator):
    """float64; its negative eigenvalue is found."""
    root = random(generator, 6, 6)
    x = random(generator, 3, 6)
    got = probes.curl_share(lambda z: z @ (root @ root.T), x)
    assert got.share == pytest.approx(0, abs=1e-20)
    assert got.psd_share == 1
    assert probes.curl_share(lambda z: -z @ (root @ root.T), x).psd_share == 0


@pytest.mark.parametrize("angle", [0.1, 1.0, 2.0, 3.0])
def test_rotation_of_the_plane(angle, generator):
    """J − I = [[c − 1, −s], [s, c − 1]]: κ = s²/((c−1)² + s²) = cos²(θ/2), ‖J − I‖/‖I‖ = 2 sin(θ/2); sym J = c I."""
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    got = probes.curl_share(lambda z: z @ turn.T, random(generator, 4, 2))
    assert got.share == pytest.approx(math.cos(angle / 2) ** 2, rel=1e-6)
    assert got.size == pytest.approx(2 * math.sin(angle / 2), rel=1e-6)
    assert got.chance == 1 / 4
    assert got.psd_share == (math.cos(angle) >= 0)
    free = probes.curl_share(lambda z: z @ turn.T, random(generator, 4, 2), trace_free=True)
    assert (free.share, free.scale) == pytest.approx((1, math.cos(angle)), rel=1e-6)


def test_random_matrix_is_at_chance(generator):
    """E‖skew G‖² = k(k−1)/2 of E‖G‖² = k²; one matrix of 200² entries is there to 1 %."""
    k = 200
    step = random(generator, k, k)
    got = probes.curl_share(lambda z: z + z @ step.T, random(generator, 1, k), probes=k)
    assert got.chance == (k - 1) / (2 * k)
    assert got.share == pytest.approx(got.chance, rel=0.02)
    assert got.standard_error == 0  # all axes of one point


@pytest.mark.parametrize("scale", [0.5, 1.2, 7.0])
def test_radial_scaler_has_no_curl(scale, generator):
    got = probes.curl_share(lambda z: scale * z, torch.randn(5, 300, generator=generator))
    assert got.share == pytest.approx(0, abs=1e-12)
    assert got.size == pytest.approx(abs(scale - 1), rel=1e-5)


def test_gradients_have_no_curl_anywhere(generator):
    """∇ of a sum of softplus: another symmetric Jacobian at every point."""
    w = random(generator, 20, 6)
    got = probes.curl_share(lambda z: torch.sigmoid(z @ w.T) @ w, random(generator, 9, 6))
    assert got.share == pytest.approx(0, abs=1e-20)
    assert got.psd_share == 1


def test_where_nothing_moves_there_is_no_share(generator):
    """J = I, and J = τI once the trace part is taken off. float32."""
    x = torch.randn(4, 5, generator=generator)
    still = probes.curl_share(lambda z: z.clone(), x)
    assert math.isnan(still.share)
    assert still.size < 1e-6
    assert math.isnan(probes.curl_share(lambda z: 3 * z, x, trace_free=True).share)


def test_share_ignores_translations_and_orthogonal_coordinates(layer, generator):
    """x ↦ Qᵀ F(Q x + b) + c has the Jacobian Qᵀ J(Qx + b) Q. float64 algebra."""
    x, turn, b, c = random(generator, 5, 7), orthogonal(generator, 7), random(generator, 7), random(generator, 7)
    want = probes.curl_share(layer, x)
    got = probes.curl_share(lambda z: layer(z @ turn.T + b) @ turn + c, (x - b) @ turn)
    assert (got.share, got.size) == pytest.approx((want.share, want.size), rel=1e-10)


def test_trace_free_share_ignores_a_factor_of_the_map(layer, generator):
    x = random(generator, 5, 7)
    one, three = (probes.curl_share(lambda z, c=c: c * layer(z), x, trace_free=True) for c in (1.0, 3.0))
    assert three.share == pytest.approx(one.share, rel=1e-10)
    assert three.scale == pytest.approx(3 * one.scale, rel=1e-10)


@pytest.mark.parametrize("trace_free", [False, True])
def test_agrees_with_dense_jacobians(layer, trace_free, generator):
    """As many probes as dimensions: the definition itself; τ = mean trace / k. psd too."""
    x = random(generator, 6, 7)
    jacobians = dense(layer, x)
    tau = jacobians.diagonal(dim1=1, dim2=2).mean().item() if trace_free else 1.0
    still = tau * torch.eye(7)
    got = probes.curl_share(layer, x, probes=7, trace_free=trace_free, psd_points=6)
    assert got.share == pytest.approx(share_of(jacobians, still), rel=1e-10)
    assert got.size == pytest.approx(((jacobians - still).square().sum() / 42).sqrt().item(), rel=1e-10)
    assert got.scale == pytest.approx(tau, rel=1e-10)
    least = torch.linalg.eigvalsh((jacobians + jacobians.mT) / 2)[:, 0]
    assert got.psd_share == (least >= 0).double().mean().item()


def test_share_on_directions_is_that_of_the_form(layer, generator):
    """A = B J Bᵀ for B with rows of all lengths and angles; a rotation and a scale of the rows change nothing."""
    x, rows = random(generator, 6, 7), random(generator, 4, 7)
    form = rows @ dense(layer, x) @ rows.T
    want = share_of(form, rows @ rows.T)
    got = probes.curl_share(layer, x, directions=rows)
    assert got.share == pytest.approx(want, rel=1e-10)
    turned = probes.curl_share(layer, x, directions=5 * orthogonal(generator, 4) @ rows)
    assert (turned.share, turned.size, turned.chance) == pytest.approx((got.share, got.size, got.chance), rel=1e-10)


def test_orthonormal_directions_see_their_span_alone(generator):
    """Curl in the plane of e_1, e_2 only: on e_3, e_4, e_5 there is none, on e_1, e_2 that of the rotation."""
    matrix = torch.diag(torch.tensor([0.0, 0, 2, 3, 4])).double()
    matrix[0, 1], matrix[1, 0] = -1, 1
    x, axes = random(generator, 3, 5), torch.eye(5).double()
    got = probes.curl_share(lambda z: z @ matrix.T, x, directions=axes[2:])
    assert (got.share, got.chance) == pytest.approx((0, 1 / 3), abs=1e-12)
    assert probes.curl_share(lambda z: z @ matrix.T, x, directions=axes[:2]).share == pytest.approx(0.5)  # θ = π/2


def test_chance_of_weighed_directions(generator):
    """Mean over 4000 random matrices of both parts of κ, in a cloud whose variances fall off."""
    rows = torch.diag(torch.tensor([3.0, 2, 1, 0.5, 0.1, 0.1])).double()
    form = rows @ random(generator, 4000, 6, 6) @ rows.T
    got = probes.curl_share(lambda z: 2 * z, random(generator, 2, 6), directions=rows)
    assert got.chance == pytest.approx(share_of(form, 0), rel=0.02)


def test_standard_error_is_the_spread_over_draws(generator):
    """200 estimates of a fixed map from 12 points × 2 probes; their spread is known to 5 %, the error to some 20 %."""
    step = random(generator, 40, 40)
    x = random(generator, 12, 40)
    got = [probes.curl_share(lambda z: z + z @ step.T, x, 2, generator, psd_points=0) for _ in range(200)]
    shares, errors = (torch.tensor([getattr(one, name) for one in got]) for name in ("share", "standard_error"))
    assert errors.mean().item() == pytest.approx(shares.std().item(), rel=0.25)
    want = share_of((torch.eye(40) + step)[None], torch.eye(40))
    assert shares.mean().item() == pytest.approx(want, abs=4 * shares.std().item() / 200**0.5)


@pytest.mark.parametrize("norm", networks.NORMS)
@pytest.mark.parametrize("network", ["resnet", "plain"])
def test_convolutional_states_with_channels_innermost(network, norm, generator):
    """A small CIFAR network: the whole map and a block, on R^k and on the span of the data, by dense Jacobians."""
    net = networks.build(network, "cifar10", norm=norm, width=2, depth=2, in_shape=(3, 8, 8), classes=3).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    net.eval()
    inputs = random(generator, 4, 3, 8, 8)
    (stage,) = net.stages
    with torch.no_grad():
        x = stage.entry(inputs)
    assert not x.is_contiguous()  # channels innermost
    (got,) = probes.curl_of_stages(net, inputs, probes=32)
    whole = dense(lambda z: stage.blocks[1](stage.blocks[0](z)), x)
    assert got["map"]["isotropic"]["share"] == pytest.approx(share_of(whole, torch.eye(32)), rel=1e-3)
    block = dense(stage.blocks[0], x)
    assert got["blocks"]["isotropic"]["share"][0] == pytest.approx(share_of(block, torch.eye(32)), rel=1e-3)
    centred = (x - x.mean(0)).reshape(4, 32)
    axes = torch.linalg.svd(centred)[2][:3]  # four points span three dimensions
    want = share_of(axes @ whole @ axes.T, torch.eye(3))
    assert got["map"]["span"]["share"] == pytest.approx(want, rel=1e-3)
    assert got["map"]["span"]["chance"] == pytest.approx(1 / 3, rel=1e-3)
    want = share_of(centred @ whole @ centred.T, centred @ centred.T)
    assert got["map"]["covariance"]["share"] == pytest.approx(want, rel=1e-3)
    direct = probes.curl_share(lambda z: stage.blocks[1](stage.blocks[0](z)), x, directions=x - x.mean(0))
    assert direct.share == pytest.approx(want, rel=1e-10)


def test_one_direction_of_descent_among_many_is_found(generator):
    """sym J = I but for one eigenvalue −0.5 among 400, which 16 steps find."""
    axis = nn.functional.normalize(random(generator, 400), dim=0)
    x = random(generator, 3, 400)
    assert probes.curl_share(lambda z: z - 1.5 * (z @ axis)[:, None] * axis, x, 1, generator).psd_share == 0
    assert probes.curl_share(lambda z: z - 0.5 * (z @ axis)[:, None] * axis, x, 1, generator).psd_share == 1


def test_points_are_taken_in_batches_that_fit(layer, generator, monkeypatch):
    """The same answer point by point as at once."""
    from geodesic import _curl

    x = random(generator, 6, 7)
    want = probes.curl_share(layer, x)
    monkeypatch.setitem(_curl._NUMBERS, "cpu", 1)
    assert probes.curl_share(layer, x).share == pytest.approx(want.share, rel=1e-12)


def test_same_generator_same_share_in_inference_mode_too(generator):
    """States made in inference mode cannot be differentiated; the probe copies them."""
    net = networks.build("resnet", "digits", generator=generator)
    x = torch.randn(5, 1, 8, 8, generator=generator)
    want = probes.curl_of_stages(net, x, 2, torch.Generator().manual_seed(3))
    with torch.inference_mode():
        got = probes.curl_of_stages(net, x.clone(), 2, torch.Generator().manual_seed(3))
    assert got == want
    assert net.training  # as it was


def test_record_of_the_radial_control_is_plain_json(generator):
    """Four stages, none with curl; off its trace part nothing is left of it."""
    net = networks.build("radial", "cifar10", 4, width=4, depth=2, generator=generator)
    got = probes.curl_of_stages(net, torch.randn(3, 3, 32, 32, generator=generator), 2, generator)
    assert len(got) == 4
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    for stage in got:
        assert stage["map"]["isotropic"]["share"] == pytest.approx(0, abs=1e-10)
        assert stage["map"]["isotropic"]["psd_share"] == 1
        assert stage["map"]["isotropic"]["trace_free_share"] is None
        assert stage["blocks"]["span"]["size"] == pytest.approx([0.5, 0.5], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(0, 3)}, "0 points"),
        ({"probes": 0}, "probes=0"),
        ({"directions": torch.ones(2, 4)}, r"directions of shape \(4,\) for states of \(3,\)"),
        ({"directions": torch.zeros(2, 3)}, "2 directions that are all 0 span nothing"),
        ({"map": lambda z: z[:, :2]}, r"takes states \(3,\) to \(2,\)"),
        ({"map": lambda z: z * torch.tensor([1, 1, math.inf])}, "2 of 2 points have non-finite Jacobian products"),
    ],
)
def test_refuses_what_has_no_share(arguments, message):
    with pytest.raises(ValueError, match=message):
        probes.curl_share(**({"map": lambda z: 2 * z, "x": torch.ones(2, 3)} | arguments))


def test_jacobians_of_some_points_in_the_span_of_all(layer, generator):
    """Directions come from the cloud of 9, Jacobians are taken at the first 2."""
    x = random(generator, 9, 7)
    x[:, 5:] = 1  # the cloud fills five dimensions
    got = probes.curl_of_stage([layer], x, 7, points=2, psd_points=0)
    axes = torch.eye(7)[:5].double()
    want = probes.curl_share(layer, x[:2], directions=axes)
    assert got["map"]["span"]["share"] == pytest.approx(want.share, rel=1e-3)
    assert got["map"]["span"]["chance"] == pytest.approx(4 / 10, rel=1e-3)
    assert (got["cloud"], got["points"], got["map"]["span"]["psd_share"]) == (9, 2, None)
    assert got["blocks"]["span"]["share"][0] == got["map"]["span"]["share"]  # one block is the map


def test_refuses_an_unknown_space(generator):
    with pytest.raises(ValueError, match="space sphere is unknown; there are: isotropic, span, covariance"):
        probes.curl_of_stage([lambda z: 2 * z], torch.ones(2, 3), spaces=("sphere",))
