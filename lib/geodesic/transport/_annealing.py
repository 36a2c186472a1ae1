"""Potentials under which the optimal pairs have small slack, and few others: Sinkhorn scalings at falling temperature.

Between `_cost`, whose matrix it reads, and `_assignment`, whose sparse solver it spares the work. Nothing here
needs to be exact: poor potentials cost time, never the answer.

    identity_start    potentials that prove the identity optimal, where it is
    sinkhorn_stage    over-relaxed Sinkhorn scalings at one temperature
    anneal            stages at falling temperature until few pairs have small slack

A pass over all n² entries of the kernel K costs about an exponential each, and a stage takes some twenty. At high
temperature few rows tell as much as all; at low temperature few entries of K weigh anything, and they are known from
the stage before. So hot stages take a stride of the rows, and cold ones a sparse kernel.

| symbol | identifier    | shape  | meaning                                                          |
|--------|---------------|--------|------------------------------------------------------------------|
| m      | cross         | (n, n) | −2⟨x_i, y_j⟩ of the centred and scaled clouds, working precision |
| u, v   | u, v          | (n,)   | potentials of m, working precision; slack is m_ij − u_i − v_j    |
| ε      | epsilon       | scalar | temperature, in units of cost                                    |
| K      | kernel        | (n, n) | exp(−slack / ε)                                                  |
| a, b   | a, b          | (n,)   | scalings of the rows and columns of K                            |

Sources: Peyré & Cuturi, Computational Optimal Transport, ch. 4 (Sinkhorn, annealing); Thibault et al., arXiv:1711.01851
(over-relaxation); Schmitzer, arXiv:1610.06519 (truncated kernels).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor

from geodesic.transport._arcs import near_tiles
from geodesic.transport._cost import SplitCost, column_transform, row_transform

_TARGET_ARCS = 32  # a row; annealing stops once so few lie within 4 ε
_AIM = 20  # arcs a row within 4 ε that the last temperature is chosen for: balancing adds some
_HOT = 8  # times that many for the last stage before the kernel is sparse
_SWEEPS = 40  # of a stage at most
_EVEN = 0.05  # mean |column mass − 1| at which a stage ends
_IDENTITY_SWEEPS = 12
_RELAXATION = 1.6  # 1 is plain Sinkhorn and takes two to three times as long; 1.8 was seen to diverge
_FAINTEST = -60.0  # exponent: e^−88 and less is subnormal in float32, and costs a processor five to ten times as long
_BALANCED = 0.5  # mean |column mass − 1| below which given potentials suit a temperature
_REACH = 5  # temperatures of the stage before, beyond which a pair does not come to matter
_FAINT = 8  # temperatures of the stage itself, beyond which an entry of K is dropped
_SPARSE = 1 / 16  # share of the n² entries up to which a sparse kernel is faster
_MOST_ENTRIES = 2**26  # of a sparse kernel
_BYTES = 12  # of an entry, rounded up; twice that in float64

Sweep = Callable[[Float[Tensor, " n"], Float[Tensor, " n"], float], Float[Tensor, " n"]]


def identity_start(
    cost: SplitCost,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], float] | None:
    """Potentials under which every identity arc is tight, by Bellman–Ford over all arcs; None if there seem to be none.

    Where the identity is optimal, as between the ends of many a residual network, v_j ← min(v_j, min_i m_ij − m_ii +
    v_i) settles within a few sweeps, each far cheaper than one of Sinkhorn's. Where it is not, exchanging the partners
    of two points nearly always shows it: none of the sampled exchanges may save anything.

    Returns: u, v (feasible to rounding) and a slack limit under which the median row has a few arcs.
    """
    own = cost.cross.diagonal().clone()
    rounding = 16 * cost.unit_roundoff * (cost.x_squares + cost.y_squares).to(own.dtype)
    sampled = cost.sampled
    exchanged = cost.cross[sampled] + cost.cross[:, sampled].T
    if (exchanged < (own - rounding)[sampled, None] + (own - rounding)).any():
        return None
    v = -cost.y_squares.to(own.dtype)
    for _ in range(_IDENTITY_SWEEPS):
        lower = v.minimum(column_transform(cost, own - v))
        if (v - lower <= rounding).all():
            u = own - lower
            near = cost.slack(u, lower, sampled).kthvalue(min(_TARGET_ARCS // 4, cost.n), dim=1).values
            return u, lower, max(near.median().item(), 4 * cost.coldest)
        v = lower
    return None


def _dense(cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], epsilon: float, stride: int) -> Sweep:
    """Sweeps over every so many-th row of K, made anew tile by tile; each stands for the rows up to the next."""

    def sweep(a: Float[Tensor, " n"], b: Float[Tensor, " n"], omega: float) -> Float[Tensor, " n"]:
        mass = torch.zeros_like(b)
        for rows in cost.tiles(stride):
            tile = torch.add(v / epsilon, cost.cross[rows], alpha=-1 / epsilon)
            tile.add_(u[rows, None] / epsilon).clamp_min_(_FAINTEST).exp_()
            a[rows] *= (a[rows] * (tile @ b)).clamp_min_(1e-12).pow_(-omega)
            mass += a[rows] @ tile
        return mass.mul_(stride)

    return sweep


def _sparse(
    cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], epsilon: float, reach: float
) -> Sweep | None:
    """Sweeps over the entries of K of slack ≤ reach, on the processor; None if they are far more than a sample said."""
    n, count = cost.n, 0
    entries = torch.empty(min(n * n, 2 * _MOST_ENTRIES), dtype=u.dtype).numpy()  # what is not used takes no memory
    column, starts = np.empty(len(entries), dtype=np.int32), np.zeros(n + 1, dtype=np.int32)
    for rows, reduced, near in near_tiles(cost, u, v, reach, rigorous=False):
        flat = np.flatnonzero(near.numpy())
        if count + len(flat) > len(entries):
            return None
        here, row = slice(count, count + len(flat)), flat // n
        column[here] = flat - row * n
        np.subtract(u[rows].numpy()[row], reduced.numpy().ravel()[flat], out=entries[here])
        np.exp(np.divide(entries[here], epsilon, out=entries[here]), out=entries[here])
        starts[rows.numpy() + 1] = np.bincount(row, minlength=len(rows))
        count += len(flat)
    kernel = csr_array((entries[:count], column[:count], starts.cumsum(dtype=np.int32)), shape=(n, n))

    def sweep(a: Float[Tensor, " n"], b: Float[Tensor, " n"], omega: float) -> Float[Tensor, " n"]:
        a *= (a * torch.from_numpy(kernel @ b.numpy())).clamp_min_(1e-12).pow_(-omega)
        return torch.from_numpy(kernel.T @ a.numpy())

    return sweep


def sinkhorn_stage(
    cost: SplitCost,
    u: Float[Tensor, " n"],
    v: Float[Tensor, " n"],
    epsilon: float,
    relaxation: float = _RELAXATION,
    stride: int = 1,
    reach: float | None = None,
) -> tuple[Float[Tensor, " n"], float]:
    """Better potentials v by over-relaxed Sinkhorn scalings of K_ij = exp(−slack_ij / ε).

    a ← a (a · K b)^−ω and b ← b (b · Kᵀa)^−ω in one pass over the rows, ω = 1 in the first two sweeps, until the
    columns balance or the sweeps are spent; then v ← v − ε log Kᵀa. Requires u, v feasible, so that K ≤ 1.

    Args:
        cost: the cost matrix.
        u: potentials of the rows.
        v: potentials of the columns.
        epsilon: temperature.
        relaxation: ω, in [1, 2).
        stride: only every so many-th row takes part, and stands for those between; enough at high temperatures.
        reach: slack beyond which the entries of K are dropped; no potential moves further, which a column left without
            entries would. None keeps all.

    Returns:
        The new v, and the mean |column mass − 1| before the first scaling of the columns.
    """
    sweep = None if reach is None else _sparse(cost, u, v, epsilon, reach)
    furthest = math.exp(-_FAINTEST if sweep is None or reach is None else min(reach / epsilon, -_FAINTEST))
    sweep = sweep or _dense(cost, u, v, epsilon, stride)
    a, b, uneven = torch.ones_like(u), torch.ones_like(v), []
    while True:
        omega = 1.0 if len(uneven) < 2 else relaxation
        mass = sweep(a, b, omega)
        uneven.append((b * mass - 1).abs().mean().item())
        if uneven[-1] <= _EVEN or len(uneven) > _SWEEPS:
            break
        b.mul_((b * mass).clamp_min_(1e-12).pow_(-omega)).clamp_(1 / furthest, furthest)
    return v - epsilon * mass.clamp_(1 / furthest, furthest).log_(), uneven[0]


def sparse_bytes(n: int) -> int:
    """Memory that the sparse kernel of n points may take."""
    return _BYTES * min(int(_SPARSE * n**2), _MOST_ENTRIES)


def _reach(cost: SplitCost, sample: Float[Tensor, "rows n"], epsilon: float, previous: float) -> float | None:
    """Slack beyond which the kernel may be cut off; None where so many pairs lie within that a dense one is faster.

    On a CUDA device the sparse kernel was never tried.
    """
    reach, most = max(_FAINT * epsilon, _REACH * previous), min(_SPARSE, _MOST_ENTRIES / cost.n**2)
    few = cost.cross.device.type == "cpu" and (sample <= reach).sum().item() <= most * sample.numel()
    return reach if few else None


def _colder(cost: SplitCost, sample: Float[Tensor, "rows n"], epsilon: float) -> float:
    """The next temperature: where so many pairs a row lie within 4 ε as the last stage wants, a third at the least.

    If its kernel would be dense, which is dear with all rows, a stage with eight times the pairs comes between. And at
    once the mean slack of the near pairs where that is far less: within tight clusters or, to the end, among ties.
    """
    near, rows, colder = sample[sample <= 4 * epsilon], len(sample), epsilon / 3
    for pairs in (_AIM, _HOT * _AIM):
        wanted = near.kthvalue(pairs * rows).values.item() / 4 if pairs * rows <= len(near) else math.inf
        if pairs == _AIM or wanted < epsilon / 1.2:
            colder = max(epsilon / 3, wanted)
        if _reach(cost, sample, colder, epsilon) is not None:
            break
    return min(colder, near.mean().item())


def anneal(
    cost: SplitCost, v: Float[Tensor, " n"] | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], float]:
    """Potentials, and a slack limit that holds nearly all optimal arcs and few others: lower ε until it does.

    Cold, ε starts at a fifteenth of the mean slack. Given potentials v of a neighbouring problem, it starts at the
    lowest temperature at which they balance the columns of the kernel: for good ones that is the last. A dense stage
    takes so few rows that each column keeps some 32 near ones among them, and at least a thousand.

    Returns: u, v (feasible to rounding) and the limit 4 ε.
    """
    n, warm = cost.n, v is not None
    if v is None:
        v = column_transform(cost, row_transform(cost, -cost.y_squares.to(cost.cross.dtype)))
    u = row_transform(cost, v)
    sample = cost.slack(u, v, cost.sampled)
    highest, lowest = sample.mean().item() / 15, cost.coldest
    epsilon, relaxation = highest, _RELAXATION
    if warm:
        epsilon = sample.kthvalue(min(_TARGET_ARCS // 2, n), dim=1).values.median().item() / 4
    previous = epsilon
    while epsilon > lowest:
        reach, stride = _reach(cost, sample, epsilon, previous), 1
        if reach is None:
            crowd = (sample <= 4 * epsilon).sum().item() / (_TARGET_ARCS * len(sample))
            stride = max(1, min(int(crowd), n // 1000))
        candidate, imbalance = sinkhorn_stage(cost, u, v, epsilon, relaxation, stride, reach)
        if warm and imbalance > _BALANCED and epsilon < highest:
            previous = epsilon = 3 * epsilon
            continue
        warm = False
        if not candidate.isfinite().all():
            if relaxation == 1:
                break
            previous = epsilon = 3 * epsilon
            relaxation = 1.0
            continue
        v, previous = candidate, epsilon
        u = row_transform(cost, v)
        sample = cost.slack(u, v, cost.sampled)
        if (sample <= 4 * epsilon).sum() > _TARGET_ARCS * len(sample):
            epsilon = _colder(cost, sample, epsilon)
        elif stride == 1:
            break
    return u, v, 4 * max(epsilon, lowest)
