"""Properties of `assign` on clouds that a search makes up, judged in exact rational arithmetic by other means."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from geodesic import transport
from hypothesis import given, settings
from hypothesis import strategies as st

SPARSE = {"_dense_below": 0}
EVERY = {n: np.array(list(itertools.permutations(range(n)))) for n in range(1, 8)}


def fractions(z):
    return [[Fraction(k) for k in point] for point in z.double().reshape(len(z), -1).tolist()]


def exact_costs(x, y, shift=None):
    """All |x_i − y_j − shift|² as fractions."""
    x, y = fractions(x), fractions(y)
    t = [Fraction(0)] * len(x[0]) if shift is None else [Fraction(z) for z in shift.tolist()]
    return [[sum((a - b - c) ** 2 for a, b, c in zip(p, q, t, strict=True)) for q in y] for p in x]


def common(x, y):
    """|x̄ − ȳ|², exactly."""
    n = len(x)
    x, y = fractions(x), fractions(y)
    return sum((sum(p[k] for p in x) - sum(q[k] for q in y)) ** 2 for k in range(len(x[0]))) / n**2


def cheapest(costs):
    """All optimal permutations, by enumeration in whole numbers."""
    n = len(costs)
    unit = math.lcm(*(z.denominator for row in costs for z in row))
    whole = np.array([[int(z * unit) for z in row] for row in costs], dtype=object).reshape(n, n)
    priced = whole[np.arange(n), EVERY[n]].sum(1)
    return EVERY[n][priced == priced.min()]


def assert_proved(result, x, y):
    """The potentials of the proof are feasible, and it proves what is said; all in exact arithmetic."""
    n, proof = len(x), result.proof
    u = [Fraction(a) + Fraction(b) for a, b in zip(proof.u.tolist(), proof.u_low.tolist(), strict=True)]
    v = [Fraction(a) + Fraction(b) for a, b in zip(proof.v.tolist(), proof.v_low.tolist(), strict=True)]
    shifted = exact_costs(x, y, proof.shift)
    assert all(u[i] + v[j] <= shifted[i][j] for i in range(n) for j in range(n))
    sigma = result.permutation.tolist()
    assert sorted(sigma) == list(range(n))
    primal, dual = sum(shifted[i][j] for i, j in enumerate(sigma)), max(sum(u) + sum(v), Fraction(0))
    assert primal - dual <= Fraction(result.excess) * n
    costs = exact_costs(x, y)
    plain_u, plain_v = ([Fraction(a) for a in z.tolist()] for z in (result.u, result.v))
    assert all(plain_u[i] + plain_v[j] <= costs[i][j] for i in range(n) for j in range(n))
    mean = sum(costs[i][j] for i, j in enumerate(sigma)) / n
    assert result.cost == pytest.approx(float(mean), rel=1e-13, abs=0)
    assert Fraction(result.spread) <= mean - common(x, y)
    assert result.certified
    return costs


@st.composite
def clouds(draw, most):
    """Clusters, ties, outliers on one side and on both, offsets, all sizes, either precision, any order."""
    n, d = draw(st.integers(1, most)), draw(st.integers(1, 3))
    g = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x, y = g.normal(size=(2, n, d))
    if draw(st.booleans()):
        x, y = g.integers(-2, 3, size=(2, n, d)).astype(float)
    if draw(st.booleans()):
        clusters = draw(st.integers(1, 3))
        centres, spread = g.normal(size=(clusters, d)), 10.0 ** draw(st.integers(-9, 1))
        x, y = (spread * z + centres[np.arange(n) % clusters] for z in (x, y))
    if draw(st.booleans()):
        y = x[g.permutation(n)] + draw(st.sampled_from([0.0, 1e-8, 1e-2])) * g.normal(size=(n, d))
    outlier = draw(st.sampled_from(["none", "x", "both"]))
    far = 10.0 ** draw(st.integers(0, 12))
    if outlier != "none":
        x[0] = far
    if outlier == "both":
        y[draw(st.integers(0, n - 1))] = far
    y = y + draw(st.sampled_from([0.0, 1.0, 1e4, 1e8]))
    offset, scale = (
        draw(st.sampled_from([0.0, 3.0, 1e6])),
        10.0 ** draw(st.integers(-30, 30 if dtype == torch.float64 else 14)),
    )
    x, y = (torch.from_numpy(scale * (z[g.permutation(n)] + offset)).to(dtype) for z in (x, y))
    return x, y


@settings(max_examples=100, deadline=None, derandomize=True)
@given(clouds(7), st.sampled_from([{}, SPARSE]))
def test_few_points_are_solved_truly(pair, options):
    """The certificate, and cost, ties and shares by enumeration of all permutations; no tolerance."""
    x, y = pair
    n = len(x)
    result = transport.assign(x, y, **options)
    costs = assert_proved(result, x, y)
    optimal = cheapest(costs)
    primal = sum(costs[i][j] for i, j in enumerate(result.permutation.tolist()))
    least = sum(costs[i][j] for i, j in enumerate(optimal[0]))
    assert primal == least
    fixed = optimal == np.arange(n)
    score = transport.optimal_transport_score(x, y, assignment=result)
    want = fixed.sum(1).max() / n, fixed.all(0).mean(), fixed.any(0).mean()
    assert (score.share, score.share_lower, score.share_upper) == pytest.approx(want)
    assert result.tied_arcs == len({(i, s[i]) for s in optimal for i in range(n)}) - n


@settings(max_examples=40, deadline=None, derandomize=True)
@given(clouds(16), st.sampled_from([{}, SPARSE]), st.integers(0, 2**32))
def test_more_points_are_proved_in_any_order(pair, options, seed):
    """The certificate; and the points in another order have the same cost and the same share."""
    x, y = pair
    result = transport.assign(x, y, **options)
    assert_proved(result, x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, second = (transport.optimal_transport_score(x[o], y[o]) for o in (torch.arange(len(x)), order))
    assert second.w2_squared == pytest.approx(result.cost, rel=1e-9)
    assert second.share_lower <= first.share <= second.share_upper


def test_lattices_by_enumeration():
    """Small whole numbers, with offsets that the precision holds: full of ties, and every share is the truth."""
    g = np.random.default_rng(0)
    for k in range(500):
        n, d, r = g.integers(1, 8), g.integers(1, 4), g.integers(1, 5)
        dtype, most = [(torch.float32, 2**20), (torch.float64, 2**48)][k % 2]
        offset = g.integers(-most, most, size=d) * (k % 3 > 0)
        x, y = (g.integers(-r, r + 1, size=(n, d)) for _ in "xy")
        costs = ((x[:, None] - y) ** 2).sum(2)[np.arange(n), EVERY[n]].sum(1)
        fixed = EVERY[n][costs == costs.min()] == np.arange(n)
        score = transport.optimal_transport_score(*(torch.from_numpy(z + offset).to(dtype) for z in (x, y)))
        want = fixed.sum(1).max() / n, fixed.all(0).mean(), fixed.any(0).mean()
        assert (score.share, score.share_lower, score.share_upper) == pytest.approx(want), (x, y, offset, dtype)
