"""Theorem 1 on pairs, pace, one big step, Jacobians, weight norms and planes, against closed forms and loops."""

import math
from itertools import combinations

import pytest
import torch
from geodesic import networks, probes, tracks, transport
from torch import nn


def straight_distances(first, last, steps=2001):
    """‖(1 − t) d + t e‖ on a fine grid of t, for pairs whose differences go from d to e: (steps, pairs)."""
    t = torch.linspace(0, 1, steps, dtype=first.dtype)[:, None, None]
    return ((1 - t) * first + t * last).norm(dim=-1)


def random_convex_gradient(generator, d, terms=20):
    """∇φ of φ(x) = ½ ε‖x‖² + Σ_k c_k softplus(⟨w_k, x⟩ + β_k), c_k > 0: an optimal map by Brenier's theorem."""
    w = torch.randn(terms, d, generator=generator, dtype=torch.float64)
    bias = torch.randn(terms, generator=generator, dtype=torch.float64)
    c = torch.rand(terms, generator=generator, dtype=torch.float64)
    return lambda x: 0.01 * x + (c * torch.sigmoid(x @ w.T + bias)) @ w


def pairs_of(x):
    first, second = torch.triu_indices(len(x), len(x), 1)
    return x[first] - x[second]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_of_the_three_four_five_triangle(dtype):
    """a·b/√(a² + b²) is the height on the hypotenuse: 12/5. It keeps the type."""
    got = tracks.theorem1_bound(torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([4.0, 3.0], dtype=dtype))
    torch.testing.assert_close(got, torch.tensor([2.4, 2.4], dtype=dtype))


def test_bound_is_attained_by_orthogonal_differences():
    """⟨d, e⟩ = 0: the distance is least at t = a²/(a² + b²). A grid of 2001 times misses it by O(10⁻⁷)."""
    d, e = torch.tensor([[3.0, 0, 0]]).double(), torch.tensor([[0, 1.0, 1]]).double()
    least = straight_distances(d, e).amin(0)
    torch.testing.assert_close(least, tracks.theorem1_bound(d.norm(dim=-1), e.norm(dim=-1)), rtol=1e-6, atol=0)


def test_bound_is_zero_for_points_that_meet():
    """0·b and 0·0: no distance is promised, and no nan."""
    got = tracks.theorem1_bound(torch.zeros(2), torch.tensor([5.0, 0.0]))
    assert got.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("d", [1, 2, 10])
def test_gradients_of_convex_functions_keep_the_bound(d, generator):
    """Theorem 1 on 200 random optimal maps of 190 pairs each. Rounding: 1e-12 of the bound."""
    for _ in range(200):
        x = torch.randn(20, d, generator=generator, dtype=torch.float64)
        before, after = pairs_of(x), pairs_of(random_convex_gradient(generator, d)(x))
        bound = tracks.theorem1_bound(before.norm(dim=-1), after.norm(dim=-1))
        assert (straight_distances(before, after, 101).amin(0) >= bound * (1 - 1e-12)).all()


def test_optimal_assignments_keep_the_bound(generator):
    """Theorem 1 on 100 pairs of random clouds, matched optimally. Rounding: 1e-12 of the bound."""
    for _ in range(100):
        x, y = torch.randn(2, 12, 2, generator=generator, dtype=torch.float64)
        before, after = pairs_of(x), pairs_of(y[transport.assign(x, y).permutation])
        bound = tracks.theorem1_bound(before.norm(dim=-1), after.norm(dim=-1))
        assert (straight_distances(before, after, 101).amin(0) >= bound * (1 - 1e-12)).all()


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_bound_refuses_what_is_no_distance(bad):
    with pytest.raises(ValueError, match="1 of 2 pairs have a negative or undefined distance; pass norms"):
        tracks.theorem1_bound(torch.tensor([1.0, bad]), torch.ones(2))


def test_rotation_by_pi_breaks_every_pair(generator):
    """x ↦ −x sends all straight tracks through the origin at t = ½."""
    x = torch.randn(15, 2, generator=generator)
    track = torch.stack([x, 0 * x, -x])
    got = probes.theorem1_violations(track, torch.zeros(15, dtype=torch.int64), 1)
    assert got["violated"] == 1.0
    assert got["margin"] == [0.0, 0.0, 0.0]


def test_translation_has_margin_root_two(generator):
    """All distances stay a, and the bound is a/√2. float32 distances."""
    x = torch.randn(15, 4, generator=generator)
    track = torch.stack([x, x + 1, x + 5])
    got = probes.theorem1_violations(track, torch.zeros(15, dtype=torch.int64), 1)
    assert got["violated"] == 0.0
    assert got["margin"] == pytest.approx([math.sqrt(2)] * 3, rel=1e-4)


def test_violations_agree_with_a_loop_over_pairs(generator):
    """The definition, one pair at a time, without `theorem1_bound`."""
    n, classes = 25, 3
    track = torch.randn(5, n, 3, generator=generator, dtype=torch.float64)
    labels = torch.arange(n) % classes
    hits, counts = torch.zeros(2, classes, classes)
    for i, j in combinations(range(n), 2):
        gaps = [math.dist(state[i].tolist(), state[j].tolist()) for state in track]
        broken = min(gaps) < (1 - 1e-5) / math.sqrt(1 / gaps[0] ** 2 + 1 / gaps[-1] ** 2)
        for row, column in {(i % classes, j % classes), (j % classes, i % classes)}:  # the diagonal once
            hits[row, column] += broken
            counts[row, column] += 1
    got = probes.theorem1_violations(track, labels, classes)
    torch.testing.assert_close(torch.tensor(got["by_class"]), hits / counts)
    assert got["violated"] == pytest.approx((hits.triu().sum() / counts.triu().sum()).item())
    assert got["within"] == pytest.approx((hits.trace() / counts.trace()).item())
    assert 0 < got["violated"] < 1


def test_a_class_without_a_pair_is_none(generator):
    """One point of class 1, none of class 2: only (0, 0) and (0, 1) have pairs."""
    track = torch.randn(3, 4, 2, generator=generator)
    table = probes.theorem1_violations(track, torch.tensor([0, 0, 0, 1]), 3)["by_class"]
    assert [[cell is None for cell in row] for row in table] == [
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]


def test_pairs_of_one_class_only_leave_between_empty(generator):
    track = torch.randn(3, 4, 2, generator=generator)
    got = probes.theorem1_violations(track, torch.zeros(4, dtype=torch.int64), 1)
    assert got["between"] is None
    assert got["within"] == got["violated"]


def test_collapse_of_two_pairs_on_a_line():
    """Classes {−3, −1} and {1, 3}: variance 1 within, means ±2 give 4 between."""
    x = torch.tensor([[-3.0], [-1], [1], [3]])
    assert probes.collapse(x, torch.tensor([0, 0, 1, 1]), 2) == pytest.approx(1 / 4)


def test_pace_of_a_straight_track_with_uneven_steps():
    """Steps 1 and 3 on a line: straight 1, even 16/(2·10) = 0.8, spread 1/2."""
    track = torch.tensor([0.0, 1, 4]).double()[:, None, None] * torch.ones(1, 3, 2).double()
    assert probes.pace(track) == pytest.approx({"straight": 1.0, "even": 0.8, "step_spread": 0.5})


def test_pace_of_a_right_angle():
    """Equal steps that turn by a right angle: chord² 2 over length² 4, and even."""
    track = torch.tensor([[0.0, 0], [1, 0], [1, 1]]).double()[:, None]
    assert probes.pace(track) == pytest.approx({"straight": 0.5, "even": 1.0, "step_spread": 0.0})


def test_pace_splits_the_first_gap_of_the_action(generator):
    """straight · even = E‖x_L − x_0‖² / A, computed by `tracks`."""
    track = torch.randn(6, 40, 3, generator=generator, dtype=torch.float64)
    got = probes.pace(track)
    ratio = (tracks.displacement_squared(track) / tracks.action(track)).item()
    assert got["straight"] * got["even"] == pytest.approx(ratio, rel=1e-12)


def test_pace_leaves_out_points_at_rest(generator):
    """Of a network that moves nothing there is no pace; points at rest do not enter the spread."""
    still = torch.randn(1, 5, 3, generator=generator).expand(4, 5, 3)
    assert probes.pace(still) == {"straight": None, "even": None, "step_spread": None}
    moving = torch.arange(4.0)[:, None, None] * torch.tensor([1.0, 0])[:, None]
    assert probes.pace(moving)["step_spread"] == pytest.approx(0)


def test_one_step_of_the_radial_scaler(generator):
    """L blocks x ↦ (1 + 1/L) x: one step gives 2 x_0, the chain c^L x_0. Its direction, so its class, is the same."""
    network = networks.build("radial", "digits", width=8, generator=generator)
    x = torch.randn(30, 1, 8, 8, generator=generator)
    y = network(x).argmax(1)
    (error,), accuracy = probes.one_step(network, x, y)
    assert error == pytest.approx((1.2**5 - 2) / (1.2**5 - 1), rel=1e-5)
    assert accuracy == 1.0


def test_one_step_is_exact_where_blocks_translate(generator):
    """Blocks with W = 0 add their bias: the velocity is constant. float32."""
    network = networks.build("resnet", "digits", width=8, generator=generator)
    with torch.no_grad():
        for block in network.stages[0].blocks:
            block.layer2.weight.zero_()
            block.layer2.bias.normal_(generator=generator)
    (error,), _ = probes.one_step(
        network, torch.randn(9, 1, 8, 8, generator=generator), torch.zeros(9, dtype=torch.long)
    )
    assert error == pytest.approx(0, abs=1e-6)


def test_one_step_takes_stages_one_by_one(generator):
    """Four stages: four errors; the last state alone is replaced before the head reads it."""
    network = networks.build("radial", "cifar10", 4, width=2, depth=1, generator=generator)
    x = torch.randn(4, 3, 32, 32, generator=generator)
    errors, accuracy = probes.one_step(network, x, network(x).argmax(1))
    assert errors == pytest.approx([0.0] * 4, abs=1e-6)  # one block: the step is the block
    assert accuracy == 1.0


def linear_resnet(matrices, d):
    """A residual network without ReLU before W₁ and with W₁ ≥ 0 on positive states, so that J_l = W₂ W₁ there."""
    arch = networks.Architecture((d,), ((d,),), len(matrices), 2, embed=False, activate=False)
    network = networks.Network(arch, "resnet", "none")
    with torch.no_grad():
        for block, matrix in zip(network.stages[0].blocks, matrices, strict=True):
            block.layer1.weight.copy_(torch.eye(d))
            block.layer2.weight.copy_(matrix)
            block.layer1.bias.fill_(100.0)  # keeps every unit active
    return network


def test_alignment_of_equal_symmetric_blocks(generator):
    """J_l = diag(5, 4, 1, 0.5, …) for all l: the top two directions are e_1, e_2 on both sides. float32."""
    matrix = torch.diag(torch.tensor([5.0, 4, 1, 0.5, 0.5, 0.5]))
    (got,) = probes.residual_alignment(linear_resnet([matrix] * 3, 6), torch.rand(3, 6, generator=generator), rank=2)
    assert (got["across"], got["sides"]) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert got["chance"] == pytest.approx(2 / 6)
    assert got["singular"] == pytest.approx([5.0] * 3, rel=1e-4)


def test_alignment_of_blocks_with_orthogonal_ranges(generator):
    """J_1 maps e_1, e_2 to e_3, e_4 and J_2 maps e_1, e_2 to e_5, e_6: nothing is shared, between blocks or sides."""
    first, second = torch.zeros(2, 6, 6)
    first[2, 0], first[3, 1], second[4, 0], second[5, 1] = 3.0, 2.0, 3.0, 2.0
    x = torch.rand(3, 6, generator=generator)
    (got,) = probes.residual_alignment(linear_resnet([first, second], 6), x, rank=2)
    assert (got["across"], got["sides"]) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_alignment_agrees_with_the_jacobian_of_autograd(generator):
    """One convolutional block at one point: singular value and overlap from the dense Jacobian."""
    network = networks.build("resnet", "cifar10", width=2, depth=1, generator=generator)
    block = network.stages[0].blocks[0]
    with torch.no_grad():
        x = network.stages[0].entry(torch.randn(1, 3, 32, 32, generator=generator))
    jacobian = torch.autograd.functional.jacobian(lambda z: block(z) - z, x).reshape(512, 512)
    u, values, vh = torch.linalg.svd(jacobian)
    left, top, right = probes._top_singular(block, x, 1, 400, generator)
    assert top.item() == pytest.approx(values[0].item(), rel=1e-3)  # a gap of per cents converges slowly
    assert abs(left[0, :, 0] @ u[:, 0]).item() == pytest.approx(1, abs=1e-2)
    assert abs(right[0, :, 0] @ vh[0]).item() == pytest.approx(1, abs=1e-2)


def test_singular_vectors_come_in_pairs(generator):
    """J V = U S after any number of sweeps, and S is right after many; J is W₂ itself. float32."""
    turn = nn.init.orthogonal_(torch.empty(6, 6), generator=generator)
    matrix = torch.diag(torch.tensor([5.0, 3, 2, 0.1, 0.1, 0.1])) @ turn
    (block,) = linear_resnet([matrix], 6).stages[0].blocks
    x = torch.rand(2, 6, generator=generator)
    for sweeps in (0, 1, 20):
        u, values, v = probes._top_singular(block, x, 3, sweeps, generator)
        torch.testing.assert_close(matrix @ v, u * values[:, None], rtol=0, atol=1e-4)
    torch.testing.assert_close(values, torch.tensor([[5.0, 3, 2]] * 2), rtol=1e-4, atol=0)


def test_curl_share_of_a_linear_network_is_that_of_its_matrix(generator):
    """Five blocks I + W_l on states that keep every unit active: F is their product. 8 probes of 30, float32."""

    def curl(jacobian, step):
        return ((jacobian - jacobian.T).square().sum() / (4 * step.square().sum())).item()

    matrices = [(m + 0.6 * m.T) / 50 for m in torch.randn(5, 30, 30, generator=generator)]
    product = torch.linalg.multi_dot([torch.eye(30) + m for m in reversed(matrices)])
    (got,) = probes.curl_of_stages(linear_resnet(matrices, 30), torch.rand(100, 30, generator=generator), 8, generator)
    one = got["map"]["isotropic"]
    assert abs(one["share"] - curl(product, product - torch.eye(30))) < 4 * one["standard_error"]
    assert one["standard_error"] < 0.01
    for share, error, matrix in zip(
        *(got["blocks"]["isotropic"][k] for k in ("share", "standard_error")), matrices, strict=True
    ):
        assert abs(share - curl(matrix, matrix)) < 4 * error


def test_alignment_of_the_scaler_is_not_defined():
    network = networks.build("radial", "digits", width=4)
    assert probes.residual_alignment(network, torch.ones(2, 1, 8, 8)) == [None]


def test_weight_norms_of_a_known_matrix():
    """Five times a rotation: both singular values are 5, so Frobenius is 5√2; biases have no entry."""
    network = networks.build("plain", "digits", width=2, depth=1)
    with torch.no_grad():
        network.stages[0].blocks[0].layer1.weight.copy_(torch.tensor([[3.0, 4.0], [-4.0, 3.0]]))
    norms = {entry["name"]: entry for entry in probes.weight_norms(network)}
    assert not any("bias" in name for name in norms)
    entry = norms["stages.0.blocks.0.layer1.weight"]
    assert entry["shape"] == [2, 2]
    assert (entry["frobenius"], entry["spectral"]) == pytest.approx((5 * math.sqrt(2), 5.0))


def test_kernels_have_no_spectral_norm():
    """The norm of the unfolded kernel is not that of the convolution."""
    network = networks.build("plain", "cifar10", width=2, depth=1)
    kernels = [entry for entry in probes.weight_norms(network) if len(entry["shape"]) == 4]
    assert kernels
    assert all(entry["spectral"] is None for entry in kernels)


def test_plane_shows_all_of_a_planar_cloud(generator):
    """Points in a plane of R⁵ are recovered from their two coordinates. float32."""
    basis = nn.init.orthogonal_(torch.empty(5, 2), generator=generator)
    points = torch.randn(40, 2, generator=generator) @ basis.T + 3
    centre, axes, share = probes.plane(points)
    assert share == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close((points - centre) @ axes @ axes.T + centre, points, rtol=0, atol=1e-5)


def test_plane_axes_point_to_their_largest_entry(generator):
    """An axis has no sign of its own; this one repeats when the cloud is mirrored."""
    points = torch.randn(40, 5, generator=generator)
    _, axes, _ = probes.plane(points)
    _, mirrored, _ = probes.plane(-points)
    torch.testing.assert_close(axes, mirrored, rtol=0, atol=1e-5)
    assert (axes.amax(0) >= -axes.amin(0)).all()
