"""What a network makes of its data: the only path on which trained networks are measured.

`evaluate` scores the tracks of any points in one streamed pass; `final` is everything that the record of a finished
run holds. Scores are computed in float32 whatever the precision of training. Nothing in a loop over batches waits for
the device. Used by `experiment`, and through it by every chapter with recorded results.

| symbol | identifier | meaning |
|---|---|---|
| x_0, x_L | ends[0], ends[1] | states of the points at the two ends of a stage |
| κ | curl | share of the stage's displacement that is not a gradient (see `probes`) |
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from geodesic import probes, robustness, tracks
from geodesic._gauged import Aligned, Map, optimal, unitwise
from geodesic._meters import (
    Answers,
    Batch,
    Control,
    Ends,
    Exits,
    Meter,
    Paths,
    Straightness,
    measure,
    radial,
    scattered,
)
from geodesic._score import CONTROLS, Report, score
from geodesic.data import Dataset
from geodesic.networks import Network
from geodesic.robustness import Importance
from geodesic.settings import Settings
from geodesic.watch import watch

__all__ = [
    "CONTROLS",
    "TRAIN_OTS",
    "TRAIN_POINTS",
    "Answers",
    "Batch",
    "Control",
    "Ends",
    "Exits",
    "Meter",
    "Paths",
    "Report",
    "Straightness",
    "brief",
    "evaluate",
    "final",
    "measure",
    "radial",
    "rounded",
    "scattered",
    "score",
    "score_batch",
    "watch",
]

TRAIN_POINTS = 4000  # of the training part that are scored; loss and accuracy take all of it
TRAIN_OTS = 2000  # largest subset of the training part whose transport is scored, where the test part goes on
_UNIT_OTS = 4000  # largest subset at unit channels
_PATH_POINTS = 1000  # points whose whole tracks are kept: Theorem 1 takes their pairs, a gauge is fitted to them
_CURL_CLOUD, _CURL_POINTS, _CURL_PROBES = 500, 64, 4  # test points that span, that are linearised; probes of each
_JACOBIAN_POINTS = 4  # points at which singular vectors of the blocks are taken
_PAIR_CLASSES = 20  # up to so many classes the table of class pairs is kept
_SCORED = {"cpu": 2**21, "cuda": 2**25}  # numbers of a state that a pass of scoring holds: a cache keeps a few such
_EXACT = {"w2_squared", "identity_cost", "cost_ratio"}  # what a certificate is about is not rounded
_DIGITS = 5


def score_batch(network: Network) -> int:
    """Points that a pass of scoring sends through a network at a time: as many as its largest state allows."""
    largest = max(math.prod(shape) for shape in network.arch.stage_shapes)
    return max(1, _SCORED[network.head[-1].weight.device.type] // largest)


def evaluate(network: Network, x: Float[Tensor, "n *shape"], y: Int64[Tensor, "n"]) -> dict[str, Any]:
    """Loss, accuracy and the scores of every stage in one streamed pass over the points.

    Returns:
        loss (mean cross-entropy, nats), accuracy in [0, 1], stages: one `tracks.Accumulator.summary` per stage, and
        early_exit: accuracy when the head reads each state of the last stage.
    """
    return _Pass(network, x, y).found


def brief(found: dict[str, Any]) -> dict[str, Any]:
    """Of what `evaluate` found, what a curve over the epochs shows."""
    stages = [{key: stage[key] for key in ("lsr_mean", "lss_mean")} for stage in found["stages"]]
    return {"loss": found["loss"], "accuracy": found["accuracy"], "stages": stages}


def final(network: Network, dataset: Dataset, settings: Settings) -> dict[str, Any]:
    """Everything that the record of a finished run holds, of its training and its test points.

    Args:
        network: trained, on the device of the data; it is left in evaluation mode.
        dataset: both parts.
        settings: `ots_points` and `eval_points` are read.

    Returns:
        train, test: `evaluate`, with one_step_accuracy, and in every stage ots (a score for every size in `ots_points`
        that the part has), theorem1, collapse, pace, one_step_error. Of the training part the first 4000 points are
        scored (loss and accuracy take all of it), and OTS stops at 2000 points, but for sizes that the test part lacks.
        On test points alone: robustness, and in every stage
        residual_alignment; curl, of a plain network in the permuted gauge and free of the trace (see `probes`);
        of a residual network growth, the growth of the stream (see `tracks.growth`), and ots_unit, OTS at unit
        channels of x_0 (the same sizes up to 4000);
        of a plain network aligned: line-shape scores in the gauges norm1, permuted and scaled of `tracks.align`, and
        ots, OTS at one size with the units of x_L matched to those of x_0. Gauges are fitted on training points.
    """
    x, y = dataset.x_train, dataset.y_train
    xt, yt = dataset.x_test, dataset.y_test
    sizes = {
        "train": [n for n in settings.ots_points if n <= len(y) and (n <= TRAIN_OTS or n > len(yt))],
        "test": [n for n in settings.ots_points if n <= len(yt)],
    }
    importance, classes = Importance(network), len(dataset.classes)
    train = _Pass(network, x, y, scored=TRAIN_POINTS, keep=sizes["train"], classes=classes, importance=importance)
    test = _Pass(network, xt, yt, keep=sizes["test"], classes=classes, tabulate=classes <= _PAIR_CLASSES)
    found = {"train": train.found, "test": test.found}
    stages = found["test"]["stages"]
    aligned = [Aligned(paths) for paths in train.paths] if network.network == "plain" else None
    for k, stage in enumerate(stages):
        paths, ends = test.paths[k], test.ends[k]
        blocks, start = network.stages[k].blocks, paths[0][:_CURL_CLOUD]
        if aligned is None:
            stage |= _metric(ends, sizes["test"])
        else:
            stage["aligned"] = aligned[k].scores(paths, ends, sizes["test"])
            blocks, start = aligned[k].seen(blocks), aligned[k].state(0, start)
        stage["curl"] = _curl(blocks, start)
    for stage, alignment in zip(stages, probes.residual_alignment(network, xt[:_JACOBIAN_POINTS]), strict=True):
        stage["residual_alignment"] = alignment
    found["test"]["robustness"] = robustness.measure(
        network,
        dataset,
        settings.eval_points,
        importance=importance,
        matched=aligned and (lambda k, l, before: aligned[k].matched(l, before)),
    )
    return found


def _metric(ends: Float[Tensor, "2 n *state"], sizes: list[int]) -> dict[str, Any]:
    """Growth of a residual stream, and OTS in another of the metrics that its identity maps leave free."""
    factors = unitwise(tracks.unit_channels(ends[0]), ends[0])
    return {
        "growth": tracks.growth(ends).item(),
        "ots_unit": [optimal(*ends[:, :n] * factors) for n in sizes if n <= _UNIT_OTS],
    }


def _curl(blocks: Iterable[Map], x: Float[Tensor, "n *state"]) -> dict[str, Any]:
    """κ of a stage and of its blocks, on all directions and on those of the data."""

    def found(*spaces: str) -> dict[str, Any]:
        draws = torch.Generator().manual_seed(0)
        where = {"spaces": spaces, "block_spaces": spaces}
        return probes.curl_of_stage(blocks, x, _CURL_PROBES, draws, points=_CURL_POINTS, **where)

    try:
        return found("isotropic", "span")
    except ValueError:  # a collapsed network: some state is the same at all points, and spans nothing
        return found("isotropic")


def rounded(value: Any, digits: int = _DIGITS) -> Any:
    """The same value with its floats to so many significant digits; what a certificate is about stays as it is."""
    if isinstance(value, dict):
        return {key: item if key in _EXACT else rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


class _Pass:
    """One streamed pass over points: loss and accuracy of all, the scores of the first `scored`.

    With `keep`, sizes of subsets, the ends of the tracks of the largest subset and the whole tracks of the first
    thousand points are kept, and what they say is found besides; all of a subset is scored.
    """

    def __init__(
        self,
        network: Network,
        x: Float[Tensor, "n *shape"],
        y: Int64[Tensor, "n"],
        *,
        scored: int | None = None,
        keep: Sequence[int] | None = None,
        classes: int | None = None,
        tabulate: bool = False,
        importance: Importance | None = None,
    ):
        network.eval()
        largest = max(keep or [0])
        self.scored = len(y) if scored is None else min(len(y), max(scored, largest))
        meters: list[Meter] = [Answers(), Exits(network.head), Straightness()]
        if importance is not None:
            meters.append(_Ranked(importance))
        pairs = 0 if keep is None else min(_PATH_POINTS, self.scored)
        ends, paths = Ends(keep or [], classes, max(largest, pairs)), Paths(pairs, classes, tabulate=tabulate)
        if keep is not None:
            meters += [ends, paths]
        self.found = measure(network, _cut(x, y, score_batch(network), self.scored), *meters, scored=self.scored)
        if keep is not None:
            self.ends, self.paths = ends.stages, paths.stages
            errors, self.found["one_step_accuracy"] = probes.one_step(network, self.paths, y[:pairs])
            for stage, error in zip(self.found["stages"], errors, strict=True):
                stage["one_step_error"] = error


def _cut(x: Tensor, y: Tensor, size: int, at: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, of which none reaches beyond a point on both sides."""
    for some, labels in ((x[:at], y[:at]), (x[at:], y[at:])):
        if len(labels):
            yield from zip(some.split(size), labels.split(size), strict=True)


class _Ranked:
    """Lets the units be ranked on the way."""

    def __init__(self, importance: Importance):
        self._importance = importance

    def update(self, batch: Batch) -> None:
        self._importance.update(batch.classes, batch.stages)

    def summary(self) -> dict[str, Any]:
        return {}
