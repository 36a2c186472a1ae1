"""The proof that an assignment is optimal, and which others are: from good potentials and the arcs that matter.

The last steps of `_assignment.solve`. All bounds here are rigorous: whatever the solvers before did, a permutation and
potentials leave this module with a number `excess` that the true difference between the permutation's cost and the
optimum does not exceed. The *slack* of an arc is s_ij = c_ij − u_i − v_j.

    match         exact assignment restricted to given arcs
    potentials    its dual, by Bellman–Ford on the residual graph
    refine        both again and again on what slack is left, with u lowered until no arc can have a negative slack
    certify       the near-tight arcs of a matrix product, their distances in float64 or, where that does not suffice,
                  in two parts; a bound for all other arcs
    read_ties     which arcs other optimal assignments can use, and the assignment that fixes most points

| symbol | identifier     | shape  | meaning                                                          |
|--------|----------------|--------|------------------------------------------------------------------|
| σ      | sigma          | (n,)   | x_i is sent to y_σ(i)                                            |
|        | arcs           | (k,)   | sorted keys i·n + j                                              |
| w      | weights        | (k,)   | slack of the arcs under the current potentials                   |
| a, b   | a, b           | (n,)   | what the potentials of the restricted problem add to u and v     |
| G      | excess         | scalar | bound of Σ_i s_{i,σ(i)} ≥ Σ_i c_{i,σ(i)} − the least such sum    |

Sources: Jonker & Volgenant, Computing 38 (1987), and Volgenant, Computers & Operations Research 23 (1996) (LAPMOD);
Ahuja, Magnanti & Orlin, Network Flows, chs. 5 and 9 (residual graphs, reduced costs); the bounds: book/setup.md.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from geodesic.transport._arcs import MOST_ARCS, Crowded, near_arcs, union
from geodesic.transport._cost import SplitCost
from geodesic.transport._exact import (
    Clouds,
    Costs,
    add,
    double_double_costs,
    float64_costs,
    rational_costs,
    slack,
    two_sum,
)

GAP = 1e-9  # largest excess over spread that counts as proved
CROWD = 64  # arcs a row; more near-tight arcs than this mean ties, or a precision too low to tell
_DENSE_FALLBACK = 5000  # largest n solved without lapx
_LARGEST_WEIGHT = 1e3  # lapmod refuses costs of a million and more
_REFINEMENTS = 8
_FEW = 7  # points of a tie group whose assignments are enumerated in whole numbers
_MOST_WORK = 2**27  # coordinates that are looked at in two parts for ties alone, some seconds
_UP = 1 + 2.0**-40  # more than the roundings of a sum of positive numbers, divided by their number


def match(n: int, arcs: Int64[np.ndarray, " k"], weights: Float64[np.ndarray, " k"]) -> Int64[np.ndarray, " n"]:
    """The cheapest permutation on the given arcs, which must contain one.

    Complete graphs, and machines without lapx, take SciPy's dense solver. SciPy's sparse one is never used: on
    near-ties it does not return.

    Raises: ModuleNotFoundError beyond 5000 points without lapx.
    """
    try:
        from lap import lapmod
    except ImportError:
        lapmod = None
    if len(arcs) == n * n or (lapmod is None and n <= _DENSE_FALLBACK):
        dense = np.full(n * n, np.inf)
        dense[arcs] = weights
        return linear_sum_assignment(dense.reshape(n, n))[1].astype(np.int64)
    if lapmod is None:
        raise ModuleNotFoundError(
            f"{n} points need the sparse solver of lapx (pip install lapx); up to {_DENSE_FALLBACK} can do without"
        )
    positive = weights - weights.min()
    if positive.any():
        positive *= _LARGEST_WEIGHT / positive.max()
    row, column = np.divmod(arcs, n)
    starts = np.searchsorted(row, np.arange(n + 1))
    return lapmod(n, positive, starts.astype(np.int32), column.astype(np.int32), return_cost=False)[0].astype(np.int64)


def potentials(
    n: int, arcs: Int64[np.ndarray, " k"], weights: Float64[np.ndarray, " k"], sigma: Int64[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"], bool]:
    """a, b with a_i + b_j ≤ w_ij on every arc, equality on the optimal σ, and b ≤ 0. Bellman–Ford, arcs at once.

    In the residual graph arc (i, j) leads from column σ(i) to column j and costs w_ij − w_{i,σ(i)}; b_j is the cheapest
    walk to j from anywhere. A sweep follows the arcs out of the columns that have fallen since they were last told on.
    Invariant: b_j ≤ the cheapest walk of at most so many steps.

    Returns:
        a, b and whether they are done: after n + 1 sweeps the graph has a negative cycle, i.e. σ is not optimal.
    """
    row, column = np.divmod(arcs, n)
    starts = np.searchsorted(row, np.arange(n + 1))
    matched = weights[np.searchsorted(arcs, np.arange(n) * n + sigma)]
    owner, length = np.argsort(sigma), weights - matched[row]
    rounding = 2.0**-48 * np.abs(weights).max()
    b, told = np.zeros(n), np.zeros(n)
    downhill = length < -rounding
    np.minimum.at(b, column[downhill], length[downhill])
    for _ in range(n + 1):
        fallen = np.flatnonzero(b < told - rounding)
        if not len(fallen):
            return matched - b[sigma], b, True
        told[fallen] = b[fallen]
        rows = owner[fallen]
        count = starts[rows + 1] - starts[rows]
        out = np.repeat(starts[rows] - count.cumsum() + count, count) + np.arange(count.sum())  # their arcs
        np.minimum.at(b, column[out], np.repeat(told[fallen], count) + length[out])
    return matched - b[sigma], b, False


@dataclass(frozen=True)
class Refined:
    """A permutation and potentials in two parts that no arc of the restricted problem can contradict."""

    sigma: Int64[np.ndarray, " n"]
    u: Float64[np.ndarray, "2 n"]
    v: Float64[np.ndarray, "2 n"]
    matched: Float64[np.ndarray, " n"]  # upper bounds of the slacks s_{i,σ(i)}
    room: Float64[np.ndarray, " n"]  # by how much u may still rise before arcs that were left out must be looked at

    @property
    def excess(self) -> float:
        """G: what the cost of σ exceeds the least by at most, summed over the points."""
        return float(self.matched.sum()) * _UP

    def excess_of(self, costs: Costs) -> float:
        """The same, with the costs of the pairs (i, σ(i)) at hand: potentials of zero are feasible, too."""
        return min(self.excess, float((costs.high + costs.error).sum()) * _UP)


def refine(
    n: int,
    arcs: Int64[np.ndarray, " k"],
    costs: Costs,
    u: Float64[np.ndarray, "2 n"],
    v: Float64[np.ndarray, "2 n"],
    room: float,
    enough: float,
    single: bool = False,
) -> Refined:
    """Solve on the arcs, subtract the potentials, solve again on what is left, until the excess is small or stands.

    A solver in float64 errs by a fraction of its largest weight. What it leaves is small, and solving on that errs by a
    fraction of that: after the first time weights are cut off at twice the excess, since an arc of more slack than the
    excess belongs to no optimal assignment. After each time v stands and u_i becomes the minimum of c_ij − v_j less all
    errors, so that (u, v) is feasible in exact arithmetic. Bellman–Ford lowers v only; so an arc left out, of slack ≥
    room before, stays feasible as long as u_i has risen by no more than that.

    Args:
        n: number of points.
        arcs: the arcs of the restricted problem; every row has one, and there is a permutation among them.
        costs: their costs.
        u: potentials to start from.
        v: potentials to start from.
        room: by how much u may rise; negative where it must fall.
        enough: excess to stop at.
        single: keep potentials in one float64.
    """
    row, column = np.divmod(arcs, n)
    starts = np.searchsorted(row, np.arange(n))
    left, best, turn = np.full(n, room), None, 0
    while True:
        turn += 1
        weights, rounding = slack(costs, u[:, row], v[:, column])
        if best is not None:
            weights = np.minimum(weights, 2 * best.excess)
        sigma = match(n, arcs, weights)
        before, v = v, add(v, potentials(n, arcs, weights, sigma)[1])
        if single:
            v[1] = 0.0
        risen = (v[0] - before[0]) + (v[1] - before[1])  # by rounding alone
        left = left - max(risen.max() * _UP, 0.0) - 2.0**-98 * np.abs(v[0]).max()
        weights, rounding = slack(costs, u[:, row], v[:, column])
        step = np.minimum.reduceat(weights - costs.error - rounding, starts)
        step = np.minimum(step - 2.0**-50 * np.abs(step), left)
        before, u = u, add(u, step - 2.0**-100 * (np.abs(u[0]) + np.abs(step)))
        if single:
            u = np.stack([np.where(u[1] < 0, np.nextafter(u[0], -np.inf), u[0]), np.zeros(n)])
        risen = (u[0] - before[0]) + (u[1] - before[1])
        left = left - risen - 2.0**-50 * np.abs(risen)
        used = np.searchsorted(arcs, np.arange(n) * n + sigma)
        weights, rounding = slack(costs[used], u, v[:, sigma])
        found = Refined(sigma, u, v, np.maximum(weights + costs.error[used] + rounding, 0.0), left)
        stuck = best is not None and found.excess > best.excess / 2
        if best is None or found.excess < best.excess:
            best = found
        if stuck or best.excess <= enough or turn == _REFINEMENTS:
            return best


@dataclass(frozen=True)
class Ties:
    """What may be exchanged at no cost."""

    sigma: Int64[np.ndarray, " n"]
    arcs: int
    group: Int64[np.ndarray, " n"]
    fixable: Bool[np.ndarray, " n"]
    settled: bool = False  # whether no permutation costs less than σ, as a matter of fact and not but for rounding


@dataclass(frozen=True)
class Certified:
    """An assignment with a dual that is feasible for all arcs, in the unit of the scaled clouds and their order."""

    ties: Ties
    cost: float  # mean of c_{i,σ(i)}
    excess: float  # mean; proved
    spread: float  # mean cost less the squared distance of the means, from below
    u: Float64[np.ndarray, " n"]  # feasible without the low parts
    v: Float64[np.ndarray, " n"]
    shift: Float64[np.ndarray, " d"]  # of y in the proof
    proof_u: Float64[np.ndarray, "2 n"]
    proof_v: Float64[np.ndarray, "2 n"]
    tolerance: float = 0.0  # slack up to which an arc was not looked at

    @property
    def sigma(self) -> Int64[np.ndarray, " n"]:
        """The permutation."""
        return self.ties.sigma

    @property
    def certified(self) -> bool:
        """Whether σ is proved optimal, or its excess to be small."""
        return self.ties.settled or self.excess <= GAP * self.spread


def _steps(
    clouds: Clouds, sigma: Int64[np.ndarray, " n"], shift: Float64[Tensor, " d"]
) -> tuple[Float64[Tensor, " d"], float, float]:
    """Mean of r_i = x_i − y_σ(i) − shift, a lower bound of mean |r_i − r̄|², and mean |r_i|²."""
    n, device = clouds.n, clouds.x.device
    column, size = torch.from_numpy(sigma).to(device), max(1, 2**22 // clouds.x.shape[1])
    rows = [torch.arange(k, min(k + size, n), device=device) for k in range(0, n, size)]

    def step(row: Int64[Tensor, " k"]) -> Float64[Tensor, "k d"]:
        x, y = clouds.pairs(row, column[row])
        high, low = two_sum(x, -y)
        return (high - shift) + low  # the low part last: what cancels, cancels exactly

    mean = sum((step(row).sum(0) for row in rows), start=torch.zeros_like(shift)) / n
    about = sum(float((step(row) - mean).square().sum()) for row in rows) / n
    square = about + float(mean @ mean)
    return mean, max(about * (1 - 1e-6) - 2.0**-48 * square, 0.0), square


def _shift(clouds: Clouds, sigma: Int64[np.ndarray, " n"]) -> Float64[Tensor, " d"]:
    """A shift of y under which the means of the clouds nearly meet, where that takes away most of the cost; else zero.

    It is exact where the clouds are translates of each other: the first pair's difference, and the mean of what the
    others add to it.
    """
    first = torch.zeros(1, dtype=torch.int64, device=clouds.x.device)
    x, y = clouds.pairs(first, torch.from_numpy(sigma[:1]).to(first))
    start = (x - y)[0]
    shift, zero = start + _steps(clouds, sigma, start)[0], torch.zeros_like(start)
    _, spread, square = _steps(clouds, sigma, zero)
    return shift if spread < square / 4 else zero


def _translates(clouds: Clouds, sigma: Int64[np.ndarray, " n"]) -> bool:
    """Whether all x_i − y_σ(i) are the same. Then the cost is |x̄ − ȳ|², and by convexity no permutation costs less."""
    n, device = clouds.n, clouds.x.device
    column, first = torch.from_numpy(sigma).to(device), None
    for row in torch.arange(n, device=device).split(max(1, 2**22 // clouds.x.shape[1])):
        x, y = clouds.pairs(row, column[row])
        both = torch.stack(two_sum(x, -y))
        first = both[:, :1] if first is None else first
        if (both != first).any():
            return False
    return True


def _carry(
    clouds: Clouds, shift: Float64[Tensor, " d"], u: Float64[np.ndarray, "2 n"], v: Float64[np.ndarray, "2 n"]
) -> tuple[Float64[np.ndarray, "2 n"], Float64[np.ndarray, "2 n"], float]:
    """Potentials of the shifted costs with the same slacks, and a bound of what each slack errs by.

    With any point z, |x − y − t|² = |x − y|² − 2⟨x − z, t⟩ + 2⟨y − z, t⟩ + |t|², and 4⟨x − z, t⟩ = |x − z + t|² −
    |x − z − t|². One of the points as z takes a common offset out of it.
    """
    if not shift.any():
        return u, v, 0.0
    n, error, middle = clouds.n, 0.0, clouds.x[clouds.order[clouds.n // 2]]

    def plus(
        old: Float64[np.ndarray, "2 n"],
        points: Float[Tensor, "n d"],
        far: Float[Tensor, " d"],
        way: Float64[Tensor, " d"],
        factor: float,
    ) -> Float64[np.ndarray, "2 n"]:
        """Add factor · |points − far − way|²; the factor is a power of two."""
        nonlocal error
        pairs = Clouds(points, far.expand(n, -1), clouds.order, clouds.scale)
        costs = double_double_costs(pairs, np.arange(n) * (n + 1), way, 0.0)
        error += float(costs.error.max() + 2.0**-98 * (costs.high.max() + np.abs(old[0]).max()))
        return add(add(old, factor * costs.high), factor * costs.low)

    u = plus(plus(u, clouds.x, middle, -shift, -0.5), clouds.x, middle, shift, 0.5)
    u = plus(u, middle.expand(n, -1), middle, shift, 1.0)
    return u, plus(plus(v, clouds.y, middle, -shift, 0.5), clouds.y, middle, shift, -0.5), error


def _finish(
    clouds: Clouds, arcs: Int64[np.ndarray, " k"], costs: Costs, found: Refined, spread: float, floor: float
) -> Certified:
    """Measure the excess; where it is not small enough, refine with the arcs that could matter in two parts.

    All arcs but these are known to exceed the room that is left.
    """
    n, d = clouds.x.shape
    u, v = found.u[0], found.v[0]
    shift = torch.zeros(d, dtype=torch.float64, device=clouds.x.device)
    used = np.searchsorted(arcs, np.arange(n) * n + found.sigma)
    fine = found.excess_of(costs[used]) > GAP * spread * n
    if fine:
        row, column = np.divmod(arcs, n)
        weights, rounding = slack(costs, found.u[:, row], found.v[:, column])
        shift = _shift(clouds, found.sigma)
        new_u, new_v, error = _carry(clouds, shift, found.u, found.v)
        margin = 4 * (found.excess + error)
        keep = weights - costs.error - rounding <= margin
        keep[used] = True
        arcs = arcs[keep]
        room = min(margin, float(found.room.min())) - error
        costs = double_double_costs(clouds, arcs, shift, floor)
        spread = _steps(clouds, found.sigma, shift)[1]
        found = refine(n, arcs, costs, new_u, new_v, room, GAP * spread * n / 4)
        spread = _steps(clouds, found.sigma, shift)[1]
    ties = read_ties(clouds, arcs, costs, found, shift, fine, floor)
    used = np.searchsorted(arcs, np.arange(n) * n + ties.sigma)
    weights, rounding = slack(costs[used], found.u, found.v[:, ties.sigma])
    other = replace(found, sigma=ties.sigma, matched=np.maximum(weights + costs.error[used] + rounding, 0.0))
    if ties.settled or other.excess_of(costs[used]) <= max(found.excess, GAP * spread * n):
        found = other
    else:
        ties = replace(ties, sigma=found.sigma)
    if fine and not ties.settled and _translates(clouds, found.sigma):
        ties = replace(ties, settled=True)
    cost = float(float64_costs(clouds, np.arange(n) * n + found.sigma, 0.0).high.mean())
    used = np.searchsorted(arcs, np.arange(n) * n + found.sigma)
    excess = found.excess_of(costs[used]) / n
    return Certified(ties, cost, excess, spread, u, v, shift.cpu().numpy(), found.u, found.v)


def _components(
    n: int, row: np.ndarray, owner: np.ndarray, possible: Bool[np.ndarray, " k"]
) -> Int64[np.ndarray, " n"]:
    graph = coo_array((np.ones(possible.sum()), (row[possible], owner[possible])), shape=(n, n))
    return connected_components(graph, connection="strong")[1].astype(np.int64)


def _exchangeable(
    n: int, arcs: Int64[np.ndarray, " k"], costs: Costs, found: Refined
) -> tuple[Bool[np.ndarray, " k"], Int64[np.ndarray, " n"]]:
    """The arcs that an optimal assignment on `arcs` may use, and the groups within which it exchanges partners.

    No optimal assignment uses an arc of more slack than the excess. What is left falls into strongly connected
    components; an assignment is optimal iff it is on each of them, and there the excess is that of its own points.
    """
    row, column = np.divmod(arcs, n)
    owner = np.argsort(found.sigma)[column]
    weights, rounding = slack(costs, found.u[:, row], found.v[:, column])
    least = weights - costs.error - rounding
    possible = least <= found.excess
    while True:
        possible |= owner == row
        group = _components(n, row, owner, possible)
        excess = np.bincount(group, found.matched, n)[group] * _UP
        fewer = possible & (group[row] == group[owner]) & (least <= excess[row])
        fewer |= owner == row
        if (fewer == possible).all():
            return possible, group
        possible = fewer


def _enumerate(
    clouds: Clouds, rows: Int64[np.ndarray, " k"], columns: Int64[np.ndarray, " k"]
) -> Int64[np.ndarray, "m k"]:
    """All cheapest assignments of a few points in whole numbers, as positions in `columns`, most fixed points first."""
    order = clouds.order.cpu().numpy()
    costs = rational_costs(
        clouds.x[order[rows]].double().cpu().numpy(), clouds.y[order[columns]].double().cpu().numpy()
    )
    every = np.array(list(itertools.permutations(range(len(rows)))))
    priced = costs[np.arange(len(rows)), every].sum(1)
    cheapest = every[priced == priced.min()]
    return cheapest[np.argsort(-(columns[cheapest] == rows).sum(1), kind="stable")]


def read_ties(
    clouds: Clouds,
    arcs: Int64[np.ndarray, " k"],
    costs: Costs,
    found: Refined,
    shift: Float64[Tensor, " d"],
    fine: bool,
    floor: float,
) -> Ties:
    """Which arcs other optimal assignments may use, and the assignment that fixes most points.

    In steps that cost more and tell more: float64 distances; those in two parts (`fine`) for what could be tied by the
    first; whole numbers for groups of up to seven points. What remains contains the truth, and is the truth for such
    groups. All arcs that were left out must have a slack above the excess.

    Where all groups are as small as that, the assignment is settled: each is the cheapest within every group, and no
    optimal one leaves the groups.
    """
    n, d = clouds.x.shape
    if not float(found.room.min()) > found.excess:
        return Ties(found.sigma, n * n - n, np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool))
    possible, group = _exchangeable(n, arcs, costs, found)
    row, column = np.divmod(arcs, n)
    sigma = found.sigma.copy()
    crowded = np.bincount(group, minlength=n)[group] > 1
    some = np.flatnonzero(possible & crowded[row])
    if len(some) and not fine and len(some) * d <= _MOST_WORK:
        members = np.flatnonzero(crowded)  # a problem of their own, rows and columns counted anew
        columns, place, m = sigma[members], np.empty(n, dtype=np.int64), len(members)
        place[columns] = np.arange(m)
        own = np.searchsorted(members, row[some]) * m + place[column[some]]
        some, own = some[np.argsort(own)], np.sort(own)
        finer = double_double_costs(clouds, arcs[some], shift, floor)
        sub = refine(m, own, finer, found.u[:, members], found.v[:, columns], np.inf, 0.0)
        possible[some], part = _exchangeable(m, own, finer, sub)
        sigma[members], group[members] = columns[sub.sigma], n + part
        group = np.unique(group, return_inverse=True)[1].astype(np.int64)
    size = np.bincount(group, minlength=n)
    few = np.flatnonzero((size > 1) & (size <= _FEW))
    for rows in [np.flatnonzero(group == k) for k in few[: max(1, 2**22 // d)]]:
        columns = sigma[rows]
        cheapest = _enumerate(clouds, rows, columns)
        within = np.flatnonzero(np.isin(row, rows))
        possible[within] = np.isin(arcs[within], rows * n + columns[cheapest])
        sigma[rows] = columns[cheapest[0]]
    owner = np.argsort(sigma)[column]
    possible |= owner == row
    group = _components(n, row, owner, possible)
    possible &= group[row] == group[owner]
    if (possible & (row == column) & (owner != row)).any():
        some = np.flatnonzero(possible)
        sigma = match(n, arcs[some], np.where(row == column, 0.0, 1.0)[some])
        owner = np.argsort(sigma)[column]
    fixable = np.zeros(n, dtype=bool)
    fixable[row[possible & (row == column)]] = True
    size = np.bincount(group, minlength=n)
    settled = bool((size <= _FEW).all()) and len(few) <= max(1, 2**22 // d)
    return Ties(sigma, int((possible & (owner != row)).sum()), group, fixable, settled)


def certify(
    clouds: Clouds,
    cost: SplitCost,
    u: Float[Tensor, " n"],
    v: Float[Tensor, " n"],
    sigma: Int64[np.ndarray, " n"],
    margin: float,
    most: int | None = None,
) -> Certified:
    """Solve on the near-tight arcs of a matrix product with float64 distances, and bound all others.

    Every arc outside the near-tight set has true slack ≥ margin under (u, v). Where u would have to rise by more, or
    less than the excess would be left of it, the margin was too small and is widened. A negative margin is an excess of
    that size a point, accepted in exchange for not looking at every tie.

    Raises: Crowded if there are more than `most` near-tight arcs: by default 64 a row, 2²⁶ under a negative margin.
    """
    n, floor, diagonal = cost.n, clouds.underflow(), np.arange(cost.n) * (cost.n + 1)
    old_u, old_v = (
        np.stack([(squares + z.double()).cpu().numpy(), np.zeros(n)])
        for squares, z in ((cost.x_squares, u), (cost.y_squares, v))
    )

    def spread(arcs: Int64[np.ndarray, " k"], costs: Costs, sigma: Int64[np.ndarray, " n"]) -> float:
        """Mean cost less what is common to all permutations, from below."""
        used = costs[np.searchsorted(arcs, np.arange(n) * n + sigma)]
        return max(float((used.high - used.error).mean()) * (2 - _UP) - cost.offset, 0.0)

    most = (CROWD * n if margin > 0 else MOST_ARCS) if most is None else most
    while True:
        near = near_arcs(cost, u, v, margin, rigorous=True, most=most)
        arcs = union(near, np.arange(n) * n + sigma)
        if margin <= 0:
            arcs = union(arcs, diagonal)  # which may be ties that were not looked at
        costs = float64_costs(clouds, arcs, floor)
        room = margin - 2.0**-10 * abs(margin)  # the roundings of the margin itself
        found = refine(n, arcs, costs, old_u, old_v, room, GAP * spread(arcs, costs, sigma) * n / 4, single=True)
        if margin > 0 and float(found.room.min()) < 5 * found.excess:
            margin = 2 * margin + 2 * float(found.matched.max())
            sigma = found.sigma
            if margin > 16 * clouds.x.shape[1]:  # more than any slack of points whose coordinates differ by less than 1
                raise Crowded
            continue
        if margin > 0:
            return _finish(clouds, arcs, costs, found, spread(arcs, costs, found.sigma), floor)
        row, column = np.divmod(arcs, n)
        weights, rounding = slack(costs, found.u[:, row], found.v[:, column])
        fixable = (weights - costs.error - rounding)[row == column] <= found.excess
        above = weights + costs.error + rounding
        tight = (above <= found.matched.max()) | (found.sigma[row] == column)
        sigma = match(n, arcs[tight], np.where(row == column, 0.0, 1.0)[tight])  # as many fixed points as there can be
        other = replace(
            found, sigma=sigma, matched=np.maximum(above[np.searchsorted(arcs, np.arange(n) * n + sigma)], 0)
        )
        found = other if other.excess <= GAP * spread(arcs, costs, sigma) * n else found
        used = np.searchsorted(arcs, np.arange(n) * n + found.sigma)
        return Certified(
            ties=Ties(found.sigma, 0, np.zeros(n, dtype=np.int64), fixable),
            cost=float(costs.high[used].mean()),
            excess=found.excess_of(costs[used]) / n,
            spread=spread(arcs, costs, found.sigma),
            u=found.u[0],
            v=found.v[0],
            shift=np.zeros(clouds.x.shape[1]),
            proof_u=found.u,
            proof_v=found.v,
            tolerance=-margin,
        )


def certify_all(clouds: Clouds) -> Certified:
    """The same from the float64 distances of all n² pairs, and with no potentials to start from. O(n² d + n³)."""
    n, floor = clouds.n, clouds.underflow()
    arcs = np.arange(n * n)
    costs = float64_costs(clouds, arcs, floor)
    u, v = np.zeros((2, n)), np.zeros((2, n))
    u[0] = costs.high.reshape(n, n).min(1)
    found = refine(n, arcs, costs, u, v, np.inf, 0.0, single=True)
    shift = torch.zeros(clouds.x.shape[1], dtype=torch.float64, device=clouds.x.device)
    return _finish(clouds, arcs, costs, found, _steps(clouds, found.sigma, shift)[1], floor)


def unproved(clouds: Clouds, sigma: Int64[np.ndarray, " n"]) -> Certified:
    """An assignment of which nothing is proved: where no precision tells the pairs of a large cloud apart."""
    n, zero = clouds.n, np.zeros(clouds.n)
    high = float64_costs(clouds, np.arange(n) * n + sigma, 0.0).high.mean()
    shift = torch.zeros(clouds.x.shape[1], dtype=torch.float64, device=clouds.x.device)
    return Certified(
        ties=Ties(sigma, n * n - n, np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool)),
        cost=float(high),
        excess=float(high),
        spread=_steps(clouds, sigma, shift)[1],
        u=zero,
        v=zero,
        shift=shift.cpu().numpy(),
        proof_u=np.zeros((2, n)),
        proof_v=np.zeros((2, n)),
    )
