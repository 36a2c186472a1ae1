"""Theorem 1 on pairs, weight norms and the plane of the tracks, against closed forms and a loop over pairs."""

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
