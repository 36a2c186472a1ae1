"""Optimal transport from a continuous source onto n atoms: a stochastic Newton method with a held-out certificate.

The Brenier potential u_h(x) = maxᵢ ⟨x, yᵢ⟩ + hᵢ sends the cell Wᵢ(h), where atom i attains the maximum, to yᵢ; it is
optimal for the quadratic cost when every cell has mass νᵢ. The heights minimise the convex energy E(h) = ∫ u_h dμ − Σ
νᵢhᵢ, whose gradient is μ(Wᵢ) − νᵢ and whose Hessian is the Laplacian of the graph of neighbouring cells. Cell masses
are only seen through samples; the method uses each sample three times:

1. **Test.** A batch is drawn after the heights were fixed, as independent scrambled Sobol sequences. Products of the
   errors of *different* sequences estimate the squared relative error without the bias of sampling noise.
2. **Step size.** The share of the observed squared error which is not noise is the Kalman gain of the step: near one
   at first, falling like 1/k once noise dominates. Nothing is left for the user to tune.
3. **Direction.** The best and second-best atom of a sample and the gap between their scores are a look at a facet:
   they estimate the Hessian. A damped Newton system on that graph is solved by conjugate gradients; no cell is moved
   further than its depth allows, and hidden planes are raised until they touch the potential.

In low dimension the heights of merged atoms give the start, so that only local errors are left for the full problem.

Source: Lei, An, Guo, Su, Liu, Luo, Yau & Gu, Engineering 6 (2020), the potential and its energy; the solver is ours.

| symbol | identifier | shape | meaning |
|---|---|---|---|
| y | points | (n, d) | atoms |
| ν | weights | (n,) | their masses |
| h | heights | (n,) | heights of the supporting planes, mean zero |
| | counts | (replicates, n) | samples of each sequence in each cell |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from geodesic.semidiscrete import _samples, _starts
from geodesic.semidiscrete._newton import Newton, facets
from geodesic.semidiscrete._potential import Potential, Progress
from geodesic.semidiscrete._samples import Frame, Source

_REPLICATES = 8  # independent sequences in a batch
_LOOKS = 16  # samples per atom whose second-best atom is looked up for the Hessian
_PLANAR = 3  # largest dimension in which coarser problems give the start
_FEW = 40  # atoms for which the Gaussian map is start enough
_REMEASURE = 1e3  # damping at which a step moves nothing: the batch then measures the same heights again


def solve(
    points: Real[Tensor, "n d"],
    weights: Real[Tensor, " masses"] | None = None,
    source: str = "cube",
    tol: float = 0.05,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    start: Real[Tensor, " heights"] | None = None,
    max_samples: int | None = None,
) -> Potential:
    """Heights of the optimal map from the source onto weighted atoms, certified on samples they have not seen.

    Args:
        points: distinct atoms, (n, d); integers are taken as float64, half precision as float32.
        weights: ν, positive, summing to one; uniform when None.
        source: "cube", uniform on [0, 1]^d, or "normal", the standard normal law.
        tol: the solver returns when the square of the held-out relative error, two standard errors added, is below
            tol². In high dimension reaching it takes about n/tol² samples, less in low dimension.
        generator: source of the scramblings; torch's own when None.
        device: where to work; that of the points when None.
        start: heights to begin with, for instance of nearby atoms; those of a coarser problem or of the Gaussian
            map when None.
        max_samples: budget of source points; (n + 512)(2000 + 40/tol²) when None.

    Raises:
        ValueError: repeated or non-finite points, wrong weights, heights of start that are not finite, an unknown
            source, or a budget too small for tol.
        TypeError: complex points.
        RuntimeError: the budget is spent; the message has the error reached.
    """
    if not 0 < tol < 1:
        raise ValueError(f"tol is {tol}; it is a relative error between 0 and 1, for instance 0.05")
    points = _samples.real(points if device is None else points.to(device), "points")
    weights, n = _samples.check_atoms(points, weights), len(points)
    max_samples = math.ceil((n + 512) * (2000 + 40 / tol**2)) if max_samples is None else max_samples
    _check_budget(n, tol, max_samples)
    law = cast(Source, source)
    frame = Frame.of(points, law)
    if n == 1:
        return Potential(points, weights, torch.zeros_like(weights), law, 0.0, 0.0, 0, 0, 0.0)
    mass = weights.double()
    heights = _start(frame, mass, generator) if start is None else frame.shrink(_check_start(start, n)).double()
    heights, history, gap = _iterate(frame, mass, heights.to(points.device), tol, max_samples, generator)
    last = history[-1]
    if not _reached(last.error, last.standard_error, tol):
        raise RuntimeError(
            f"after {last.samples:,} samples the held-out relative error is {last.error:.3g}, not tol = {tol:g}; "
            f"about {2 * last.samples:,} samples would be the next attempt: raise max_samples or tol"
        )
    heights = (heights - heights.mean()).to(points) * frame.scale
    if not heights.isfinite().all():
        raise ValueError(f"the heights of points of size {frame.scale:.3g} exceed {points.dtype}; scale them")
    return Potential(
        points,
        weights,
        heights,
        law,
        last.error,
        last.standard_error,
        len(history),
        last.samples,
        gap * frame.scale,
        tuple(history),
    )


def _iterate(
    frame: Frame, weights: Tensor, heights: Tensor, tol: float, max_samples: int, generator: torch.Generator | None
) -> tuple[Tensor, list[Progress], float]:
    """Test, accept or refuse the last step, step again; see the module's head. Ends at tol or with the budget."""
    n = len(weights)
    batch = _REPLICATES * 2 ** max(math.floor(math.log2(2 * n)), 9)
    history: list[Progress] = []
    kept: Newton | None = None
    damping = 0.0
    while True:
        survey = _survey(frame, heights, batch, generator)
        square, noise, standard_error = _held_out(survey.counts, weights)
        gain = max(square, 0.0) / max(square + noise, 1e-300)
        used = batch + (history[-1].samples if history else 0)
        error, empty = math.sqrt(max(square, 0.0)), int((survey.counts.sum(0) == 0).sum())
        history.append(Progress(batch, used, error, standard_error, gain, empty))
        if _reached(error, standard_error, tol) or used + batch > max_samples:
            return heights, history, float(survey.gap.median())
        slack = 2 * (standard_error + (kept.standard_error if kept else 0.0))
        if kept is not None and square > kept.square + slack and damping < _REMEASURE:
            damping = max(4 * damping, 1e-2)
            batch = 2 * batch if gain < 2 / 3 else batch
        else:
            damping = min(square, 1.0) if kept is None else damping / 4
            kept = _newton(frame, heights, survey, weights, (square, standard_error, gain))
            batch = 2 * batch if gain < 1 / 3 else batch
        heights = kept.step(damping)


def _newton(
    frame: Frame, heights: Tensor, survey: _Survey, weights: Tensor, seen: tuple[float, float, float]
) -> Newton:
    """The Newton system at these heights; `seen` has the squared error, its standard error and the gain."""
    graph = facets(frame.atoms, survey.best, survey.second, survey.gap)
    count = survey.counts.sum(0)
    hidden = (count == 0).nonzero()[:, 0]
    if len(hidden):  # their planes are raised until they touch u_h, or a step would not know where they belong
        deficit, touched = _deficit(frame, heights, survey, hidden)
        heights = heights.index_add(0, hidden, deficit)
        graph = graph.joined(hidden, touched, weights[hidden])
    ratio = weights * count.sum() / (count + 0.5)
    residual = weights * ratio.log() / ratio  # ν − m near the solution, but neither explodes nor stalls far from it
    return Newton(heights, graph, residual - residual.mean(), ratio, *seen)


def _reached(error: float, standard_error: float, tol: float) -> bool:
    return error**2 + 2 * standard_error <= tol**2


def _held_out(counts: Int[Tensor, "r n"], weights: Float[Tensor, " n"]) -> tuple[float, float, float]:
    """Squared relative error without noise, the squared noise of the batch, and the standard error of the first.

    With gᵣ the relative errors seen by sequence r, the mean of ⟨gᵣ, gₛ⟩_ν over r ≠ s is unbiased for ‖g‖²_ν whatever
    the noise is; the standard error is the jackknife's over the sequences.
    """
    r = len(counts)
    g = (counts / counts.sum(1, keepdim=True) / weights - 1) * weights.sqrt()  # (r, n)
    gram = g @ g.T
    square = float((gram.sum() - gram.trace()) / (r * (r - 1)))
    noise = float(gram.sum()) / r**2 - square
    without = gram.sum() - 2 * gram.sum(1) + gram.diagonal() - (gram.trace() - gram.diagonal())
    leave_one_out = without / ((r - 1) * (r - 2))
    spread = ((leave_one_out - leave_one_out.mean()) ** 2).sum() * (r - 1) / r
    return square, noise, float(spread.sqrt())


def _start(frame: Frame, weights: Float[Tensor, " n"], generator: torch.Generator | None) -> Float[Tensor, " n"]:
    """Heights of the Gaussian map; in low dimension only for few atoms, from which those of more are interpolated.

    A cloud in pieces is far from Gaussian, and in the plane a cell has few neighbours through which mass could pass
    from one side to the other. In high dimension everything is near, and the Gaussian map is the better start.
    """
    n, d = frame.atoms.shape
    if d > _PLANAR or n < 5 * _FEW:
        return _starts.gaussian(frame)
    coarse, mass = _starts.merged(frame, weights, n // 5, generator)
    first = _start(coarse, mass, generator)
    heights, _, _ = _iterate(coarse, mass, first, 0.15, 1000 * len(mass), generator)
    return _starts.prolonged(frame, coarse, heights, generator)


@dataclass(frozen=True)
class _Survey:
    """What a batch shows: counts, and of its first samples the two best atoms, the best score and the lead."""

    counts: Int[Tensor, "r n"]
    x: Float[Tensor, "k d"]
    value: Float[Tensor, " k"]
    best: Int[Tensor, " k"]
    second: Int[Tensor, " k"]
    gap: Float[Tensor, " k"]


def _survey(frame: Frame, heights: Tensor, batch: int, generator: torch.Generator | None) -> _Survey:
    n, d = frame.atoms.shape
    h, looks, seen = heights.to(frame.atoms), [], 0
    counts = torch.zeros(_REPLICATES, n, dtype=torch.long, device=heights.device)
    for r in range(_REPLICATES):
        for x in _samples.sequence(batch // _REPLICATES, d, frame, generator):
            look = _samples.two_best if seen < _LOOKS * n else _samples.best
            found = [torch.cat(part) for part in zip(*map(look, _samples.tiles(x, frame.atoms, h)), strict=True)]
            counts[r] += torch.bincount(found[0], minlength=n)
            if len(found) == 4:
                looks.append((x, *found))
                seen += len(x)
    x, best, value, second, behind = (torch.cat(part) for part in zip(*looks, strict=True))
    return _Survey(counts, x, value, best, second, value - behind)


def _deficit(frame: Frame, heights: Tensor, survey: _Survey, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """How far the planes of hidden atoms stay below u_h on the samples, and the cell where each comes closest."""
    deficit, touched = torch.full_like(heights[hidden], math.inf), torch.zeros_like(hidden)
    blocks = _samples.tiles(survey.x, frame.atoms[hidden], heights[hidden].to(frame.atoms))
    row = 0
    for scores in blocks:
        here = slice(row, row := row + len(scores))
        lead, where = (scores - survey.value[here, None]).max(0)
        nearer = -lead < deficit
        deficit = torch.where(nearer, -lead.to(deficit), deficit)
        touched = torch.where(nearer, survey.best[here][where], touched)
    return deficit, touched


def _check_start(start: Tensor, n: int) -> Tensor:
    if len(start) != n:
        raise ValueError(f"start has {len(start)} heights for {n} points; give one to each point")
    return _samples.real(start, "heights of start")


def _check_budget(n: int, tol: float, max_samples: int) -> None:
    """The squared error of a batch of M points has standard error (2n)^½/M: that alone sets a smallest M."""
    needed = math.ceil(4 * math.sqrt(2 * n) / tol**2)
    if max_samples < needed:
        raise ValueError(
            f"tol = {tol:g} for {n} points cannot be certified with max_samples = {max_samples:,}: the test alone "
            f"takes about {needed:,} samples and the solution about {math.ceil(n / tol**2):,}"
        )
