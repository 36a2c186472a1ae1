"""From all n² pairs to the few that matter. Used by `_annealing` and `_assignment`.

An *arc* is a pair (i, j), kept as the key i·n + j; its *slack* is m_ij − u_i − v_j. Everything here is one pass over
the matrix by row tiles, and returns sorted keys.

    union         of two sets of keys
    near_arcs     the arcs of small slack, with a margin for rounding if asked for
    feed          at least four arcs for each row and each column
"""

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from geodesic.transport._cost import TILE, SplitCost

MOST_ARCS = 2**26  # kept at once, a gigabyte or two
_LEAST_ARCS = 4  # of each row and column


class Crowded(Exception):
    """More near-tight arcs than can be told apart at the working precision.

    Attributes:
        v: the potentials reached; None before there are any.
    """

    def __init__(self, v: Tensor | None = None):
        super().__init__()
        self.v = v


def union(one: Int64[np.ndarray, " k"], other: Int64[np.ndarray, " l"]) -> Int64[np.ndarray, " m"]:
    """The keys of both, sorted, each once. NumPy's own hashes them, which takes ten times as long."""
    both = np.sort(np.concatenate([one, other]), kind="stable")
    return both[np.append(True, both[1:] != both[:-1])]


def _thin(
    near: Bool[Tensor, "rows n"], reduced: Float[Tensor, "rows n"], cap: int, dice: torch.Generator | None
) -> Bool[Tensor, "rows n"]:
    """Of each row the `cap` cheapest arcs or, given dice, the cheapest and some `cap` at random."""
    if dice is None:
        kept = torch.zeros_like(near).scatter_(1, reduced.topk(cap, 1, largest=False).indices, True)
    else:
        kept = torch.rand(near.shape, generator=dice, device=near.device) * near.sum(1, keepdim=True) < cap
        kept.scatter_(1, reduced.argmin(1, keepdim=True), True)
    return near & kept


def near_tiles(
    cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], limit: float, rigorous: bool
) -> Iterator[tuple[Int64[Tensor, " rows"], Float[Tensor, "rows n"], Bool[Tensor, "rows n"]]]:
    """Rows with a near arc, m_ij − v_j (less its error, if rigorous) and where it is ≤ u_i + limit, tile by tile."""
    bound, errors = u + limit, cost.error_factors(u, v) if rigorous else None
    if errors:
        bound, v = bound + errors[2], v + errors[3]
    for tile in cost.tiles():
        reduced = torch.sub(cost.cross[tile], v)
        if errors:
            reduced.addr_(errors[0][tile], errors[1], alpha=-1.001)  # a little more than p q: these lines round
        hit = (reduced.amin(1) <= bound[tile]).nonzero()[:, 0]  # in pricing few, and a minimum is cheaper than a mask
        if len(hit) < len(reduced):
            reduced = reduced[hit]
        yield hit + tile.start, reduced, _at_most(reduced, bound[tile][hit, None])


def _at_most(reduced: Float[Tensor, "rows n"], bound: Float[Tensor, "rows 1"]) -> Bool[Tensor, "rows n"]:
    """Where reduced ≤ bound; on a processor NumPy compares several times as fast as torch."""
    if reduced.device.type == "cpu":
        return torch.from_numpy(reduced.numpy() <= bound.numpy())
    return reduced <= bound


def _true(mask: Bool[Tensor, "rows n"]) -> Int64[Tensor, " k"]:
    """Flat indices of the true entries; where they are few, NumPy finds them eight times as fast on a processor."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def near_arcs(
    cost: SplitCost,
    u: Float[Tensor, " n"],
    v: Float[Tensor, " n"],
    limit: float,
    *,
    rigorous: bool = False,
    cap: int | None = None,
    at_random: bool = False,
    most: int = MOST_ARCS,
) -> Int64[np.ndarray, " k"]:
    """Keys of all arcs of slack ≤ limit, sorted; `rigorous` adds the error bound: every other arc truly exceeds it.

    Args:
        cost: the cost matrix.
        u: potentials of the rows.
        v: potentials of the columns.
        limit: of the slack, in the unit of the scaled clouds.
        rigorous: whether to include the arcs whose computed slack exceeds the limit by no more than its error.
        cap: arcs to keep of a row, the cheapest.
        at_random: keep the cheapest and a random choice instead: among ties the cheapest may not connect, these do.
        most: arcs to keep in all.

    Raises: Crowded if there are more.
    """
    dice = torch.Generator(u.device).manual_seed(cost.n) if at_random else None
    found, count = torch.empty(min(max(most, cost.n), cost.n**2), dtype=torch.int64, device=u.device), 0
    for rows, reduced, near in near_tiles(cost, u, v, limit, rigorous):
        flat = _true(near)
        if cap is not None:
            crowded = (torch.bincount(flat // cost.n, minlength=len(near)) > cap).nonzero()[:, 0]
            if len(crowded):
                near[crowded] = _thin(near[crowded], reduced[crowded], cap, dice)
                flat = _true(near)
        if count + len(flat) > len(found):
            raise Crowded
        torch.add(flat % cost.n, rows[flat // cost.n], alpha=cost.n, out=found[count : count + len(flat)])
        count += len(flat)
    return found[:count].cpu().numpy().copy()


def feed(
    cost: SplitCost, u: Float[Tensor, " n"], v: Float[Tensor, " n"], arcs: Int64[np.ndarray, " k"]
) -> Int64[np.ndarray, " m"]:
    """The arcs, with the cheapest ones of each row and column that has fewer than four.

    The rows and columns of outliers have hardly an arc within a limit that suits the rest. Left with a dear one, they
    push the potentials of the sparse problem far off, and hundreds of thousands of arcs then price below zero.
    """
    n, least, fed = cost.n, min(_LEAST_ARCS, cost.n), [arcs]

    def starved(nodes: Int64[np.ndarray, " k"]) -> Int64[Tensor, " few"]:
        return torch.from_numpy(np.flatnonzero(np.bincount(nodes, minlength=n) < least)).to(u.device)

    for rows in starved(arcs // n).split(max(1, TILE[u.device.type] // n)):
        cheapest = torch.sub(cost.cross[rows], v).topk(least, 1, largest=False).indices
        fed.append((rows[:, None] * n + cheapest).flatten().cpu().numpy())
    columns = starved(arcs % n)
    best, owner = u.new_full((least, len(columns)), math.inf), columns.new_zeros(least, len(columns))
    for rows in cost.tiles():  # columns picked from whole tiles: one by one, each of their entries misses the cache
        reduced = cost.cross[rows][:, columns].sub_(u[rows, None])
        better = (reduced < best[-1]).any(0).nonzero()[:, 0]  # fewer and fewer
        row = torch.arange(rows.start, rows.stop, device=u.device)[:, None].expand(-1, len(better))
        best[:, better], place = torch.cat([best[:, better], reduced[:, better]]).topk(least, 0, largest=False)
        owner[:, better] = torch.cat([owner[:, better], row]).gather(0, place)
    fed.append((owner * n + columns).flatten().cpu().numpy())
    return functools.reduce(union, fed)
