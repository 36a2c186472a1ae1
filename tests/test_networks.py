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


def test_resume_goes_on_to_the_same_logits(generator):
    """From the middle of a stage, through entries and later stages; from another state it does not."""
    network = networks.build("resnet", "cifar10", 4, width=2, depth=2, generator=generator).eval()
    x = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.no_grad():
        states, logits = network.tracks(x), network(x)
        for k, l in ((0, 0), (1, 1), (3, 2)):
            assert torch.equal(network.resume(k, l, states[k][l]), logits)
        assert not torch.equal(network.resume(1, 1, 0 * states[1][1]), logits)
