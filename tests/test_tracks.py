"""Scores of tracks against closed forms and invariances."""

import math

import pytest
import torch
from geodesic import tracks

SCORES = [tracks.line_shape_ratio, tracks.line_shape_score]


def random_track(generator, steps=6, n=40, d=7, dtype=torch.float64):
    return torch.randn(steps, n, d, generator=generator, dtype=dtype).cumsum(0)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_track_scores_one_whatever_its_spacing(score, dtype):
    """A straight line attains the triangle inequality. Rounding of the type."""
    place = torch.tensor([0.0, 1, 3, 3.5, 9], dtype=dtype)
    track = place[:, None, None] * torch.ones(1, 3, 4, dtype=dtype)
    got = score(track)
    assert got.dtype == dtype
    torch.testing.assert_close(got, torch.ones(3, dtype=dtype))


def test_orthogonal_steps_of_any_length_score_root_L():
    """‖Σ u_l‖ = √L for orthonormal u_l, so LSS = L/√L; lengths do not matter."""
    steps = torch.diag(torch.tensor([1.0, 5, 0.1, 2, 3, 7, 0.5, 4], dtype=torch.float64))
    track = torch.cat([torch.zeros(1, 8, dtype=torch.float64), steps.cumsum(0)])[:, None, :]
    torch.testing.assert_close(tracks.line_shape_score(track).item(), math.sqrt(8))


@pytest.mark.parametrize("score", SCORES)
def test_right_angle_zigzag_scores_root_two(score):
    """2k unit steps in turn along two axes end at distance k√2."""
    t = torch.arange(11, dtype=torch.float64)
    track = torch.stack([(t / 2).ceil(), (t / 2).floor()], -1)[:, None, :]
    torch.testing.assert_close(score(track).item(), math.sqrt(2))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("angle", [0.5, 2.0, 3.0])
def test_circle_arc(score, angle):
    """L chords 2 sin(α/2L) over one chord 2 sin(α/2)."""
    steps = 5
    t = torch.linspace(0, angle, steps + 1, dtype=torch.float64)
    track = torch.stack([t.cos(), t.sin()], -1)[:, None, :]
    want = steps * math.sin(angle / (2 * steps)) / math.sin(angle / 2)
    torch.testing.assert_close(score(track).item(), want)


@pytest.mark.parametrize("score", [*SCORES, tracks.segment_shares])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_finite_states_of_any_size(score, dtype, generator):
    """Powers of two over the range of the type, up to near its end: the same bits, though squares leave the range."""
    finfo = torch.finfo(dtype)
    track = random_track(generator, dtype=dtype)
    track /= 1.001 * track.abs().max()  # the largest entry just below 1
    want = score(track)
    for power in range(math.frexp(finfo.tiny)[1] + 30, math.frexp(finfo.max)[1], 7):
        size = torch.tensor(2.0**power, dtype=dtype)
        torch.testing.assert_close(score(track * size), want, rtol=0, atol=8 * finfo.eps)


@pytest.mark.parametrize("size", [3e19, 1e-25, 3e38, 1e-36])
def test_large_and_small_float32_states_are_scored(size, generator):
    """Beside points of usual size; the action, whose square no float32 holds, is that of the same states in float64."""
    track = random_track(generator, dtype=torch.float32)
    track /= track.abs().max()
    track[:, ::2] *= size
    accumulator, double = tracks.Accumulator(), tracks.Accumulator()
    accumulator.update(track)
    double.update(track.double())
    for key, value in double.summary().items():
        assert accumulator.summary()[key] == pytest.approx(value, rel=1e-5), key
    torch.testing.assert_close(tracks.action(track), tracks.action(track.double()), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        tracks.displacement_squared(track), tracks.displacement_squared(track.double()), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("length", [1e-15, 1e-19, 1e-22, 1e-30])
def test_a_very_short_segment_has_its_direction(length):
    """Two segments at a right angle, the second where the coordinate is zero and so holds it exactly: LSS is √2."""
    track = torch.zeros(3, 2, 5)
    track[1:, :, 0] = 1
    track[2, :, 1:] = length
    torch.testing.assert_close(tracks.line_shape_score(track), torch.full((2,), math.sqrt(2)))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 60.0, 1e4])
@pytest.mark.parametrize("d", [1, 1000])
def test_zigzags_of_half_precision_score_three(score, dtype, size, d):
    """Forth, back and forth along one line: the path is three times its chord, whatever its length and direction."""
    place = torch.tensor([0.0, size, 0, size], dtype=dtype)
    track = place[:, None, None] * torch.ones(1, 5, d, dtype=dtype)
    torch.testing.assert_close(score(track), torch.full((5,), 3.0))


def test_rounding_of_half_precision_is_no_motion():
    """States of 1000 that differ by one rounding of float16, half a unit, in one of a hundred coordinates."""
    track = torch.full((3, 4, 100), 1000.0, dtype=torch.float16)
    track[1:, :, 0] += 0.5
    with pytest.raises(ValueError, match="4 of 4 points never move"):
        tracks.line_shape_score(track)


@pytest.mark.parametrize("size", [3e19, 1e-25, 1.0])
def test_distances_of_any_size(size):
    """Two parallel tracks at distance √2; a bound of two equal distances is that over √2."""
    a, b = torch.zeros(3, 2, 2), torch.full((3, 2, 2), size)
    torch.testing.assert_close(tracks.track_distance(a, b) / size, torch.full((2,), math.sqrt(2)))
    distance = torch.full((2,), size)
    torch.testing.assert_close(tracks.theorem1_bound(distance, distance) / size, torch.full((2,), 0.5).sqrt())
    assert (tracks.theorem1_bound(distance, 0 * distance) == 0).all()
    assert (tracks.theorem1_bound(0 * distance, 0 * distance) == 0).all()


def test_there_and_back_is_infinite():
    """Two opposite unit vectors sum to zero."""
    track = torch.tensor([0.0, 1, 0]).double()[:, None, None]
    assert tracks.line_shape_score(track).item() == math.inf


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_at_least_one(score, generator):
    """Triangle inequality. Rounding of float64."""
    assert (score(random_track(generator)) >= 1 - 1e-12).all()


@pytest.mark.parametrize("score", [*SCORES, tracks.segment_shares])
def test_scores_ignore_shift_rotation_and_scale(score, generator):
    """The scores are functions of angles and ratios of lengths. Float64 algebra."""
    track = random_track(generator)
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(score(3.7 * track @ rotation + 2.0), score(track), rtol=1e-10, atol=0)


def test_scores_follow_a_permutation_of_the_points(generator):
    track = random_track(generator)
    order = torch.randperm(40, generator=generator)
    torch.testing.assert_close(tracks.line_shape_score(track[:, order]), tracks.line_shape_score(track)[order])


def test_image_shaped_states_are_flattened(generator):
    """The score of (steps, n, c, h, w) is that of (steps, n, c·h·w), also when not contiguous."""
    track = random_track(generator, d=12).reshape(6, 40, 3, 2, 2)
    flat = track.reshape(6, 40, 12)
    torch.testing.assert_close(tracks.line_shape_score(track), tracks.line_shape_score(flat))
    swapped = track.transpose(2, 4)
    torch.testing.assert_close(tracks.line_shape_ratio(swapped), tracks.line_shape_ratio(flat))


def test_scores_of_images_do_not_depend_on_their_order_in_memory(generator):
    """Channels innermost in all states, in the first alone, or in none; of a distance, in one of the two tracks."""
    states = list(random_track(generator, d=24).reshape(6, 40, 3, 2, 4))
    turned = [state.contiguous(memory_format=torch.channels_last) for state in states]
    found = []
    for given in (states, turned, [turned[0], *states[1:]]):
        accumulator = tracks.Accumulator()
        accumulator.update(given)
        found.append(accumulator.summary())
    assert found[1]["lss_mean"] == pytest.approx(found[0]["lss_mean"], rel=1e-12)
    assert found[2]["action"] == pytest.approx(found[0]["action"], rel=1e-12)
    other, shift = torch.stack(states), torch.stack(states) + 0.5
    inside = shift.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(tracks.track_distance(other, inside), tracks.track_distance(other, shift))


def test_segment_shares_of_known_steps_and_sum():
    """Steps 1, 2, 5 along a line have shares 1/8, 2/8, 5/8."""
    track = torch.tensor([0.0, 1, 3, 8]).double()[:, None, None].expand(4, 2, 3)
    want = torch.tensor([1.0, 2, 5]).double()[:, None].expand(3, 2) / 8
    torch.testing.assert_close(tracks.segment_shares(track), want)


def test_action_equals_squared_displacement_for_equal_straight_steps(generator):
    """Equality in Cauchy–Schwarz: L · L · (|D|/L)² = |D|². Float64 algebra."""
    end = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    track = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None, None] * end
    torch.testing.assert_close(tracks.action(track), tracks.displacement_squared(track), rtol=1e-12, atol=0)


def test_action_bounds_squared_displacement(generator):
    track = random_track(generator)
    assert tracks.action(track) > tracks.displacement_squared(track)


def test_action_of_a_single_jump_is_L_times_its_square():
    """One step of length 1 among 10: A = 10 · 1."""
    track = torch.zeros(11, 1, 2, dtype=torch.float64)
    track[6:, :, 0] = 1
    assert tracks.action(track).item() == 10
    assert tracks.line_shape_score(track).item() == 1  # steps of length zero have no direction


def test_track_distance_is_the_closest_layer():
    """Two points on parallel lines that approach to distance 1 at the middle state."""
    a = torch.zeros(3, 1, 2)
    b = torch.tensor([[[3.0, 0]], [[0, 1]], [[-3, 0]]])
    assert tracks.track_distance(a, b).item() == 1


def test_accumulator_equals_the_whole(generator):
    """Batches of unequal size give the means of the whole cloud. Float64 algebra."""
    track = random_track(generator, n=50)
    accumulator = tracks.Accumulator()
    for batch in track.split([7, 20, 1, 22], dim=1):
        accumulator.update(batch)
    got = accumulator.summary()
    score = tracks.line_shape_score(track)
    assert got["n"] == 50
    assert got["lss_mean"] == pytest.approx(score.mean().item(), rel=1e-12)
    assert got["lss_median"] == pytest.approx(score.median().item(), rel=1e-12)
    assert got["lss_sd"] == pytest.approx(score.std(correction=0).item(), rel=1e-12)
    assert got["lsr_mean"] == pytest.approx(tracks.line_shape_ratio(track).mean().item(), rel=1e-12)
    assert got["action"] == pytest.approx(tracks.action(track).item(), rel=1e-12)
    assert got["displacement_squared"] == pytest.approx(tracks.displacement_squared(track).item(), rel=1e-12)
    assert got["segment_shares"] == pytest.approx(tracks.segment_shares(track).mean(1).tolist(), rel=1e-12)
    assert got["state_squared"] == pytest.approx(track.square().sum(-1).mean(1).tolist(), rel=1e-12)


def test_accumulator_leaves_out_points_that_stand_still(generator):
    """A point that moves by rounding only has no direction: it is counted, not scored."""
    track = random_track(generator, n=4, dtype=torch.float32)
    track[:, 0] = 1e3 * track[0, 0]
    track[3, 0] *= 1 + 1e-7
    accumulator = tracks.Accumulator()
    accumulator.update(track)
    got = accumulator.summary()
    assert got["still_share"] == 0.25
    assert got["lss_mean"] == pytest.approx(tracks.line_shape_score(track[:, 1:]).mean().item(), rel=1e-6)


def test_accumulator_of_a_frozen_network_has_no_score():
    accumulator = tracks.Accumulator()
    accumulator.update(torch.ones(3, 5, 2))
    got = accumulator.summary()
    assert got["still_share"] == 1
    assert got["lss_mean"] is None
    assert got["segment_shares"] is None


@pytest.mark.parametrize("score", [*SCORES, tracks.segment_shares])
def test_refuses_a_point_that_never_moves(score, generator):
    track = random_track(generator, n=3)
    track[:, 1] = track[0, 1]
    with pytest.raises(ValueError, match="1 of 3 points never move"):
        score(track)


@pytest.mark.parametrize("score", [*SCORES, tracks.segment_shares, tracks.action])
def test_refuses_a_single_state(score):
    with pytest.raises(ValueError, match=r"at least 2 states on axis 0, got shape \(1, 4, 2\)"):
        score(torch.zeros(1, 4, 2))


@pytest.mark.parametrize("score", [*SCORES, tracks.action])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_non_finite_states(score, bad, generator):
    track = random_track(generator, n=5)
    track[2, 3, 0] = bad
    with pytest.raises(ValueError, match="1 of 5 tracks hold non-finite values"):
        score(track)


def test_accumulator_refuses_to_summarise_nothing():
    with pytest.raises(ValueError, match="no track was added"):
        tracks.Accumulator().summary()


def straight_track(generator, steps=6, n=200, units=60):
    """Gaussian points that move along independent Gaussian directions in even steps."""
    start, way = torch.randn(2, n, units, generator=generator, dtype=torch.float64)
    return start + torch.linspace(0, 1, steps, dtype=torch.float64)[:, None, None] * way


def shuffled(generator, track, scaled=False):
    """The track in a random gauge."""
    units = track.shape[2]
    orders = torch.stack([torch.randperm(units, generator=generator) for _ in track])
    scales = torch.rand(len(track), units, generator=generator, dtype=torch.float64) * 3 + 0.2
    return tracks.Gauge(orders, scales if scaled else torch.ones_like(scales)).apply(track)


def test_straight_track_with_shuffled_units_comes_back(generator):
    """LSS 1 before; at norm 1 a straight track bends by a few per cent, no more."""
    track = straight_track(generator)
    hidden = shuffled(generator, track)
    assert tracks.line_shape_score(hidden).mean() > 2
    found = tracks.align(hidden).track
    assert tracks.line_shape_score(found).mean() < 1.1


def test_straight_track_with_scaled_units_comes_back(generator):
    """Random positive factors as well: order alone is not enough, order and factors are."""
    hidden = shuffled(generator, straight_track(generator), scaled=True)
    assert tracks.line_shape_score(hidden).mean() > 2
    assert tracks.line_shape_score(tracks.align(hidden).track).mean() > 1.2
    assert tracks.line_shape_score(tracks.align(hidden, unit_scales=True).track).mean() < 1.15


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("space", [(), (3, 4)])
def test_one_state_in_many_gauges_is_one_state_again(space, scaled, generator):
    """All x_l = D_l P_l x: aligned, every state is the first at mean norm 1, in its own order."""
    x = torch.randn(30, 9, *space, generator=generator, dtype=torch.float64)
    found = tracks.align(shuffled(generator, x.expand(4, *x.shape), scaled), unit_scales=scaled)
    torch.testing.assert_close(found.track, found.track[:1].expand_as(found.track), rtol=1e-9, atol=1e-12)
    assert found.track.flatten(2).norm(dim=-1).mean(1).tolist() == pytest.approx([1.0] * 4, rel=1e-12)
    assert found.permutations[0].tolist() == list(range(9))


def test_aligned_track_does_not_depend_on_the_gauge_it_came_in(generator):
    """Another order of the units of x_1, x_2, … and another size of each state: the same aligned track."""
    track = random_track(generator, n=60, d=8)
    turned = shuffled(generator, track) * torch.tensor([3.0, 1, 7, 0.1, 2, 5]).double()[:, None, None]
    turned[0] = 3 * track[0]  # x_0 names the units
    torch.testing.assert_close(tracks.align(turned).track, tracks.align(track).track, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unit_scales", [False, True])
def test_assignment_is_the_best_of_all(unit_scales, generator):
    """Two states of five units: all 120 orders, each with its best positive factors."""
    from itertools import permutations

    track = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
    a, b = tracks.find_gauge(track, permute=False).apply(track)

    def cost(order):
        c = b[:, list(order)]
        factor = ((a * c).sum(0) / c.square().sum(0)).clamp_min(0) if unit_scales else 1
        return (factor * c - a).square().sum().item()

    best = min(permutations(range(5)), key=cost)
    assert tuple(tracks.align(track, unit_scales=unit_scales).permutations[1].tolist()) == best


def test_gauge_is_fitted_on_the_rows_asked_for_and_applied_to_all(generator):
    """Slice, index and mask agree; the rows left out do not enter, and change it if they do."""
    track = random_track(generator, n=20, d=8)
    mask = torch.arange(20) < 12
    found = [tracks.align(track, fit) for fit in (slice(12), torch.arange(12), mask, list(range(12)))]
    for other in found[1:]:
        torch.testing.assert_close(other.track, found[0].track)
    alone = tracks.align(track[:, :12])
    torch.testing.assert_close(found[0].track[:, :12], alone.track)
    torch.testing.assert_close(alone.apply(track), found[0].track)
    assert not torch.equal(tracks.align(track).scales, alone.scales)


def test_factors_stay_positive(generator):
    """A unit that runs against its only partner, and one that is 0 everywhere."""
    x = torch.randn(10, 2, generator=generator, dtype=torch.float64)
    against = torch.stack([x, torch.stack([-x[:, 0], 0 * x[:, 1]], 1)])
    assert (tracks.align(against, unit_scales=True).scales > 0).all()
    assert tracks.align(against, unit_scales=True).track.isfinite().all()


def test_scores_in_gauges_are_those_of_the_aligned_tracks(generator):
    """Fitted on one cloud, scored on another; "raw" is the track itself. Lists of states do as well as a tensor."""
    fit, track = shuffled(generator, random_track(generator, n=50)).split([30, 20], dim=1)
    got = tracks.scores_in_gauges(list(fit), list(track))
    assert list(got) == ["raw", *tracks.GAUGES]

    def mean(states):
        return tracks.line_shape_score(states).mean().item()

    both = torch.cat([fit, track], 1)
    assert got["raw"]["lss_mean"] == pytest.approx(mean(track))
    size = fit.norm(dim=-1).mean(1)[:, None, None]
    assert got["norm1"]["lss_mean"] == pytest.approx(mean(track / size))
    assert got["permuted"]["lss_mean"] == pytest.approx(mean(tracks.align(both, slice(30)).track[:, 30:]))
    assert got["scaled"]["lss_mean"] == pytest.approx(mean(tracks.align(both, slice(30), True).track[:, 30:]))
    assert len({round(one["lss_mean"], 6) for one in got.values()}) == 4


def test_growth_of_a_stream_that_triples():
    """x_L = 3 x_0: moved by twice its size, whatever lies between."""
    x = torch.tensor([[3.0, 4], [1, 0]])
    assert tracks.growth(torch.stack([x, 100 * x, 3 * x])).item() == pytest.approx(2)


def test_unit_channels_bring_every_channel_to_mean_square_one(generator):
    """Over points and places; a channel that is 0 is left."""
    x = torch.randn(8, 3, 4, 4, generator=generator) * torch.tensor([0.1, 5, 0])[:, None, None]
    scale = tracks.unit_channels(x)
    squares = (x * scale[:, None, None]).square().mean((0, 2, 3))
    assert squares.tolist() == pytest.approx([1, 1, 0], rel=1e-5)
    assert scale[2] == 1


def test_align_refuses_what_has_no_gauge(generator):
    track = random_track(generator, n=5)
    with pytest.raises(ValueError, match=r"at least 2 states of at least 1 point.*got \(1, 5, 7\)"):
        tracks.align(track[:1])
    with pytest.raises(ValueError, match=r"got \(6, 0, 7\)"):
        tracks.align(track, slice(0))
    with pytest.raises(ValueError, match=r"\(states, units\) = \(5, 7\) in a gauge of \(6, 7\)"):
        tracks.align(track).apply(track[1:])
    track[2, 3, 0] = math.nan
    with pytest.raises(ValueError, match="non-finite values"):
        tracks.align(track)
