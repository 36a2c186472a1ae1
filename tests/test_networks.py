"""Networks of Table 1 and their tracks."""

import pytest
import torch
from geodesic import networks, tracks


@pytest.mark.parametrize(
    ("dataset", "stages", "shapes", "depth"),
    [
        ("mnist", 1, [(1000,)], 5),
        ("cifar10", 1, [(32, 16, 16)], 10),
        ("cifar100", 4, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)], 5),
    ],
)
@pytest.mark.parametrize("network", ["resnet", "plain"])
def test_stage_shapes_are_those_of_table_1(dataset, stages, shapes, depth, network):
    """Paper, Table 1: every state of a stage has its shape, L + 1 states a stage."""
    net = networks.build(network, dataset, stages).eval()
    x = torch.randn(2, *net.arch.in_shape)
    got = net.tracks(x)
    assert [tuple(track.shape) for track in got] == [(depth + 1, 2, *shape) for shape in shapes]


@pytest.mark.parametrize("norm", networks.NORMS)
@pytest.mark.parametrize("network", networks.NETWORKS)
@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_head_of_the_last_state_is_the_forward_pass(dataset, network, norm):
    net = networks.build(network, dataset, norm=norm).eval()
    x = torch.randn(3, *net.arch.in_shape)
    torch.testing.assert_close(net.head(net.tracks(x)[-1][-1]), net(x))


@pytest.mark.parametrize("network", ["resnet", "plain"])
def test_channels_are_innermost_in_memory_and_change_no_number(network):
    net = networks.build(network, "cifar10", 4, width=8).double().eval()
    x = torch.randn(2, 3, 32, 32).double()
    got = net.states(x)
    assert all(state.is_contiguous(memory_format=torch.channels_last) for stage in got for state in stage)
    want = net.to(memory_format=torch.contiguous_format).states(x)
    assert all(state.is_contiguous() for stage in want for state in stage)
    torch.testing.assert_close(got, want)


def test_plain_is_the_resnet_without_the_identity():
    """Same weights: a residual step minus its input is the plain step."""
    plain, resnet = networks.build("plain", "digits"), networks.build("resnet", "digits")
    resnet.load_state_dict(plain.state_dict())
    x = torch.randn(4, 100)
    torch.testing.assert_close(resnet.stages[0].blocks[2](x) - x, plain.stages[0].blocks[2](x))


def test_zero_residual_branches_leave_every_point_where_it_is():
    net = networks.build("resnet", "digits")
    with torch.no_grad():
        for block in net.stages[0].blocks:
            block.layer2.weight.zero_()
    (track,) = net.tracks(torch.randn(3, 1, 8, 8))
    assert (track == track[0]).all()


def test_radial_control_is_a_perfect_and_useless_geodesic():
    """x ↦ (1 + 1/L) x: straight tracks, LSS = 1. Rounding of float32."""
    net = networks.build("radial", "digits")
    (track,) = net.tracks(torch.randn(5, 1, 8, 8))
    torch.testing.assert_close(tracks.line_shape_score(track), torch.ones(5))
    assert len(net.weights()) == 2  # embedding and head only


def test_weights_are_what_decays():
    """Matrices and kernels: two a block, the entry and the head; no bias, no normalisation."""
    net = networks.build("plain", "cifar10", norm="batch")
    assert len(net.weights()) == 2 * 10 + 2
    assert all(p.ndim > 1 for p in net.weights())


@pytest.mark.parametrize("network", ["plain", "resnet"])
def test_states_keep_their_scale_at_initialisation(network):
    """He initialisation keeps the mean square of a state within a factor of a few over the depth."""
    net = networks.build(network, "mnist", generator=torch.Generator().manual_seed(0))
    (track,) = net.tracks(torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(1)))
    scale = track.square().mean((1, 2)).sqrt()
    assert scale.max() / scale.min() < 4


def test_same_generator_same_network():
    a, b = (networks.build("resnet", "digits", generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all((p == q).all() for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_depth_and_width_are_settings():
    net = networks.build("resnet", "cifar10", 4, depth=2, width=8)
    assert net.arch.stage_shapes == ((8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4))
    assert [len(stage.blocks) for stage in net.stages] == [2, 2, 2, 2]


def test_image_folders_take_their_own_resolution():
    net = networks.build("plain", "folder:/x", in_shape=(3, 20, 20), classes=3)
    assert net.arch.stage_shapes == ((32, 10, 10),)
    assert net(torch.randn(2, 3, 20, 20)).shape == (2, 3)


def test_planar_clouds_start_from_the_input():
    net = networks.build("resnet", "moons")
    x = torch.randn(6, 2)
    assert (net.tracks(x)[0][0] == x).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "vgg"}, "network='vgg' is unknown; choose one of resnet, plain, radial"),
        ({"norm": "layer"}, "norm='layer' is unknown; choose one of none, batch"),
        ({"dataset": "imagenet"}, "no network for dataset='imagenet'"),
        ({"stages": 4}, "no network for dataset='mnist' with stages=4"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"width": -3}, "width=-3 must be at least 1"),
        ({"dataset": "folder:/x"}, "needs in_shape and classes"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        networks.build(**({"network": "resnet"} | arguments))


def disturbed(network, dataset, stages=1, norm="none", **sizes):
    """A network in float64 whose biases, and running statistics where it has them, are those of no fresh one."""
    generator = torch.Generator().manual_seed(0)
    net = networks.build(network, dataset, stages, norm=norm, generator=generator, **sizes).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape, generator=generator)
        for module in net.modules():
            if hasattr(module, "running_var"):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.3, 2, generator=generator)
    return net, torch.randn(12, *net.arch.in_shape, generator=generator).double()


def random_gauges(net, generator):
    """A random order, and factors over two decades, for every state."""
    shapes = [(len(stage.blocks) + 1, shape[0]) for stage, shape in zip(net.stages, net.arch.stage_shapes, strict=True)]
    orders = [torch.stack([torch.randperm(units, generator=generator) for _ in range(n)]) for n, units in shapes]
    return orders, [10 ** (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) for shape in shapes]


@pytest.mark.parametrize("norm", networks.NORMS)
@pytest.mark.parametrize(
    ("dataset", "stages", "sizes"),
    [("digits", 1, {"width": 20}), ("cifar10", 1, {"width": 6, "depth": 3}), ("cifar10", 4, {"width": 4, "depth": 2})],
)
def test_a_plain_network_has_one_function_in_all_gauges(dataset, stages, sizes, norm, generator):
    """Every logit stays, every state is D P x, and the line shape score moves: it is no property of the function."""
    net, x = disturbed("plain", dataset, stages, norm, **sizes)
    orders, scales = random_gauges(net, generator)
    other = networks.regauge(net, orders, scales)
    torch.testing.assert_close(other(x), net(x), rtol=1e-10, atol=1e-10)
    for before, after, order, scale in zip(net.tracks(x), other.tracks(x), orders, scales, strict=True):
        torch.testing.assert_close(after, tracks.Gauge(order, scale).apply(before), rtol=1e-9, atol=1e-9)
        raw, moved = (tracks.line_shape_score(track) for track in (before, after))
        assert (moved / raw - 1).abs().mean() > 1e-3  # a small net in one random gauge and another
    assert not torch.equal(other.stages[0].blocks[0].layer1.weight, net.stages[0].blocks[0].layer1.weight)


@pytest.mark.parametrize("norm", networks.NORMS)
def test_an_aligned_network_has_the_aligned_track(norm):
    """What `tracks.align` does to states, `regauge` does to weights: float64, through the gauge found."""
    net, x = disturbed("plain", "digits", norm=norm, width=20)
    (track,) = net.tracks(x)
    found = tracks.align(track, unit_scales=True)
    other = networks.regauge(net, [found.permutations], [found.scales])
    torch.testing.assert_close(other(x), net(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other.tracks(x)[0], found.track, rtol=1e-9, atol=1e-9)


def test_scales_alone_take_the_scores_from_one_end_to_the_other():
    """c_l = M^l: LSR -> 1 and LSS -> L / ‖Σ u_l‖ with u_l = x_l/‖x_l‖; alternating c_l: LSR without bound."""
    net, x = disturbed("plain", "digits", width=20)
    (track,) = net.tracks(x)
    order = torch.arange(20).expand(6, 20)

    def scored(factors):
        scales = torch.tensor(factors).double()[:, None].expand(6, 20)
        (turned,) = networks.regauge(net, [order], [scales]).tracks(x)
        return tracks.line_shape_ratio(turned), tracks.line_shape_score(turned)

    growing, shape = scored([1e4**l for l in range(6)])
    torch.testing.assert_close(growing, torch.ones(12).double(), rtol=1e-3, atol=0)
    units = track[1:] / track[1:].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(shape, 5 / units.sum(0).norm(dim=-1), rtol=1e-3, atol=0)
    alternating, _ = scored([1.0, 1e4, 1.0, 1e4, 1.0, 1.0])
    assert alternating.min() > 1e3


@pytest.mark.parametrize("network", ["resnet", "radial"])
def test_identity_maps_leave_one_gauge_a_stage(network, generator):
    """The same order and factors at every state are another metric, and no more: logits stay. Others are refused."""
    net, x = disturbed(network, "digits", width=20, norm="batch")
    (orders,), (scales,) = random_gauges(net, generator)
    common = [orders[:1].expand(6, 20)], [scales[:1].expand(6, 20)]
    torch.testing.assert_close(networks.regauge(net, *common)(x), net(x), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="tie the units of all states of a stage together"):
        networks.regauge(net, [orders], common[1])
    with pytest.raises(ValueError, match="tie the units of all states of a stage together"):
        networks.regauge(net, common[0], [scales])


def test_regauge_refuses_what_is_no_gauge():
    net = networks.build("plain", "digits", width=4)
    order = torch.arange(4).expand(6, 4)
    with pytest.raises(ValueError, match=r"permutations of shapes \[\(5, 4\)\] for stages of .* \[\(6, 4\)\]"):
        networks.regauge(net, [order[1:]])
    with pytest.raises(ValueError, match="does not hold every unit once"):
        networks.regauge(net, [torch.zeros_like(order)])
    with pytest.raises(ValueError, match="scales from 0 to 0 must be positive and finite"):
        networks.regauge(net, [order], [torch.zeros(6, 4)])
    toy = networks.build("plain", "moons")
    with pytest.raises(ValueError, match="starts from the input itself"):
        networks.regauge(toy, [torch.tensor([[1, 0]] * 11)])


def test_resume_goes_on_to_the_same_logits(generator):
    """From the middle of a stage, through entries and later stages; from another state it does not."""
    network = networks.build("resnet", "cifar10", 4, width=2, depth=2, generator=generator).eval()
    x = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        states, logits = network.tracks(x), network(x)
        for k, l in ((0, 0), (1, 1), (3, 2)):
            assert torch.equal(network.resume(k, l, states[k][l]), logits)
        assert not torch.equal(network.resume(1, 1, 0 * states[1][1]), logits)
