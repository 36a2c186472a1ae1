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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from geodesic import probes, robustness, tracks, transport
from geodesic.data import Dataset
from geodesic.networks import Network
from geodesic.robustness import Importance
from geodesic.settings import Settings

TRAIN_POINTS = 4000  # of the training part that are scored; loss and accuracy take all of it
TRAIN_OTS = 2000  # largest subset of the training part whose transport is scored, where the test part goes on
_UNIT_OTS = 4000  # largest subset at unit channels
_ALIGNED_OTS = 2000  # largest subset in the aligned gauge
_PATH_POINTS = 1000  # points whose whole tracks are kept: Theorem 1 takes their pairs, a gauge is fitted to them
_CURL_POINTS, _CURL_PROBES = 100, 4
_JACOBIAN_POINTS = 4  # points at which singular vectors of the blocks are taken
_PAIR_CLASSES = 20  # up to so many classes the table of class pairs is kept
_SCORED = {"cpu": 2**21, "cuda": 2**25}  # numbers of a state that a pass of scoring holds: a cache keeps a few such
_EXACT = {"w2_squared", "identity_cost", "cost_ratio"}  # what a certificate is about is not rounded
_DIGITS = 5

Map = Callable[[Tensor], Tensor]


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
    return _Pass(network, x, y).summary()


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
        of a plain network aligned: the line-shape scores at mean norm 1 (norm1), with units permuted (permuted) and
        scaled too (scaled), and ots, OTS with permuted units at one size. The gauge is fitted on training points.
    """
    x, y = dataset.x_train, dataset.y_train
    xt, yt = dataset.x_test, dataset.y_test
    sizes = {
        "train": [n for n in settings.ots_points if n <= len(y) and (n <= TRAIN_OTS or n > len(yt))],
        "test": [n for n in settings.ots_points if n <= len(yt)],
    }
    importance = Importance(network)
    train = _Pass(network, x, y, scored=TRAIN_POINTS, keep=sizes["train"], importance=importance)
    test = _Pass(network, xt, yt, keep=sizes["test"])
    classes = len(dataset.classes)
    found = {
        "train": train.record(sizes["train"], classes),
        "test": test.record(sizes["test"], classes, tabulate=classes <= _PAIR_CLASSES),
    }
    stages = found["test"]["stages"]
    gauges = None
    if network.network == "plain":
        gauges = [_Gauge(*paths) for paths in zip(train.paths, test.paths, strict=True)]
        for stage, gauge, ends in zip(stages, gauges, test.ends, strict=True):
            stage["aligned"] = gauge.scores() | {"ots": gauge.transport(ends, sizes["test"])}
    else:
        for stage, ends in zip(stages, test.ends, strict=True):
            stage |= _metric(ends, sizes["test"])
    for more in (_curl(network, xt[:_CURL_POINTS], gauges), _alignment(network, xt[:_JACOBIAN_POINTS])):
        for stage, extra in zip(stages, more, strict=True):
            stage |= extra
    found["test"]["robustness"] = robustness.measure(
        network,
        dataset,
        settings.eval_points,
        importance=importance,
        matched=gauges and (lambda k, l, before: gauges[k].matched(l, before)),
    )
    return found


def _metric(ends: Float[Tensor, "2 n *state"], sizes: list[int]) -> dict[str, Any]:
    """Growth of a residual stream, and OTS in the other metric that its identity maps leave free."""
    unit = tracks.unit_channels(ends)
    return {
        "growth": tracks.growth(ends),
        "ots_unit": [_optimal(unit[:, :n]) for n in sizes if n <= _UNIT_OTS],
    }


def _optimal(ends: Float[Tensor, "2 n *state"]) -> dict[str, Any]:
    """OTS with its bounds."""
    score = asdict(transport.optimal_transport_score(*ends))
    return {key: score[key] for key in ("n", "share", "share_lower", "share_upper", "cost_ratio", "certified")}


def _curl(network: Network, x: Float[Tensor, "n *shape"], gauges: "list[_Gauge] | None") -> Iterator[dict[str, Any]]:
    """The curl shares of every stage."""
    generator = torch.Generator().manual_seed(0)
    for k, stage in enumerate(network.stages):
        with torch.no_grad():
            x = stage.entry(x)
        blocks, start = (stage.blocks, x) if gauges is None else gauges[k].seen(stage.blocks, x)
        yield {"curl": probes.curl_of_stage(blocks, start, _CURL_PROBES, generator, spaces=("isotropic", "span"))}
        with torch.no_grad():
            for block in stage.blocks:
                x = block(x)


def _alignment(network: Network, x: Float[Tensor, "n *shape"]) -> Iterator[dict[str, Any]]:
    for alignment in probes.residual_alignment(network, x):
        yield {"residual_alignment": alignment}


class _Gauge:
    """A plain network's stage with its units named as in the state before and its states at mean norm 1.

    Fitted on the whole tracks of training points, applied to those of test points. A plain network's units bear no
    common name from layer to layer, and its states no common scale: every score of its tracks is one of a gauge.
    """

    def __init__(self, fit: Float[Tensor, "steps n *state"], track: Float[Tensor, "steps m *state"]):
        self._both, self._fit = torch.cat([fit, track], 1), slice(len(fit[0]))
        self._track = track
        self._aligned = tracks.align(self._both, self._fit)

    def scores(self) -> dict[str, Any]:
        """The line-shape scores of the test tracks in three gauges."""
        norms = self._both[:, self._fit].flatten(2).norm(dim=2).mean(1)
        n = self._fit.stop
        return {
            "norm1": _line_shape(self._track / norms.view(-1, *[1] * (self._track.ndim - 1))),
            "permuted": _line_shape(self._aligned.track[:, n:]),
            "scaled": _line_shape(tracks.align(self._both, self._fit, unit_scales=True).track[:, n:]),
        }

    def transport(self, ends: Float[Tensor, "2 n *state"], sizes: list[int]) -> dict[str, Any] | None:
        """OTS with the last state's units named as in the first, at the largest size up to 2000."""
        n = max([n for n in sizes if n <= _ALIGNED_OTS], default=0)
        if not n:
            return None
        first, last = (self.state(l, x[:n]) for l, x in zip((0, len(self._track) - 1), ends, strict=True))
        return _optimal(torch.stack([first, last]))

    def state(self, l: int, x: Float[Tensor, "n *state"]) -> Float[Tensor, "n *state"]:
        """x_l in the gauge."""
        return self._aligned.scales[l] * x.index_select(1, self._aligned.permutations[l])

    def back(self, l: int, z: Float[Tensor, "n *state"]) -> Float[Tensor, "n *state"]:
        """The x_l that the gauge takes to z."""
        return z.index_select(1, self._aligned.permutations[l].argsort()) / self._aligned.scales[l]

    def matched(self, l: int, before: Float[Tensor, "n *state"]) -> Float[Tensor, "n *state"]:
        """x_{l−1} with its units named and scaled as in x_l."""
        return self.back(l, self.state(l - 1, before))

    def seen(self, blocks: Sequence[Map], x: Float[Tensor, "n *state"]) -> tuple[list[Map], Float[Tensor, "n *state"]]:
        """The blocks as maps from gauge to gauge, and x_0 in it."""

        def named(l: int, block: Map) -> Map:
            return lambda z: self.state(l + 1, block(self.back(l, z)))

        return [named(l, block) for l, block in enumerate(blocks)], self.state(0, x)


def _line_shape(track: Float[Tensor, "steps n *state"]) -> dict[str, Any]:
    scores = tracks.Accumulator()
    scores.update(track)
    found = scores.summary()
    return {key: found[key] for key in ("lsr_mean", "lsr_median", "lss_mean", "lss_median", "segment_shares")}


def rounded(value: Any, digits: int = _DIGITS) -> Any:
    """The same value with its floats to so many significant digits; what a certificate is about stays as it is."""
    if isinstance(value, dict):
        return {key: item if key in _EXACT else rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


class _Pass:
    """One streamed pass over points: loss and accuracy of all, the scores of the first `scored` and their tracks.

    With `keep`, sizes of subsets, the ends of the tracks of the largest subset and the whole tracks of the first
    thousand points are kept; all of a subset is scored. The memory is that of one batch besides.
    """

    def __init__(
        self,
        network: Network,
        x: Float[Tensor, "n *shape"],
        y: Int64[Tensor, "n"],
        *,
        scored: int | None = None,
        keep: Sequence[int] | None = None,
        importance: Importance | None = None,
    ):
        network.eval()
        self.network, self.x, self.y, self.importance = network, x, y, importance
        largest = max(keep or [0])
        self.scored = len(y) if scored is None else min(len(y), max(scored, largest))
        pairs = 0 if keep is None else min(_PATH_POINTS, self.scored)
        self.straightness = [tracks.Accumulator() for _ in network.stages]
        shapes = network.arch.stage_shapes
        self.ends = [x.new_empty(2, max(largest, pairs), *shape) for shape in shapes]
        self.paths = [
            x.new_empty(len(stage.blocks) + 1, pairs, *shape)
            for stage, shape in zip(network.stages, shapes, strict=True)
        ]
        self._loss = torch.zeros((), dtype=torch.float64, device=y.device)
        self._correct = torch.zeros((), dtype=torch.int64, device=y.device)
        self._exits: Tensor | int = 0
        self._run()

    @torch.no_grad()
    def _run(self) -> None:
        batch, start = score_batch(self.network), 0
        while start < len(self.y):
            stop = min(start + batch, self.scored if start < self.scored else len(self.y))
            xb, yb = self.x[start:stop], self.y[start:stop]
            if start < self.scored:
                stages = self.network.states(xb)
                logits = torch.stack([self.network.head(state) for state in stages[-1]])
                self._exits = self._exits + (logits.argmax(-1) == yb).sum(1)
                self._see(start, yb, stages)
                logits = logits[-1]
            else:
                logits = self.network(xb)
            self._loss += F.cross_entropy(logits, yb, reduction="sum")
            self._correct += (logits.argmax(1) == yb).sum()
            start = stop

    def _see(self, start: int, y: Tensor, stages: list[list[Tensor]]) -> None:
        """Score and keep the states of a batch."""
        if self.importance is not None:
            self.importance.update(y, stages)
        for states, score, ends, paths in zip(stages, self.straightness, self.ends, self.paths, strict=True):
            score.update(states)
            for kept, some in ((ends, (states[0], states[-1])), (paths, states)):
                room = max(0, min(len(y), kept.shape[1] - start))
                for place, state in zip(kept, some, strict=True) if room else ():
                    place[start : start + room] = state[:room]

    def summary(self) -> dict[str, Any]:
        """What `evaluate` returns; early exits are those of the points scored."""
        return {
            "loss": self._loss.item() / len(self.y),
            "accuracy": self._correct.item() / len(self.y),
            "early_exit": (self._exits.double() / self.scored).tolist(),
            "stages": [score.summary() for score in self.straightness],
        }

    def record(self, sizes: list[int], classes: int, *, tabulate: bool = False) -> dict[str, Any]:
        """The summary with everything that residual and plain networks share; `tabulate`: pairs by class as well."""
        found = self.summary()
        first = slice(_PATH_POINTS)
        errors, found["one_step_accuracy"] = probes.one_step(self.network, self.x[first], self.y[first])
        for stage, ends, paths, error in zip(found["stages"], self.ends, self.paths, errors, strict=True):
            theorem1 = probes.theorem1_violations(paths.flatten(2), self.y[: paths.shape[1]], classes)
            stage |= {
                "ots": [asdict(transport.optimal_transport_score(*ends[:, :n])) for n in sizes],
                "theorem1": theorem1 | ({} if tabulate else {"by_class": None}),
                "collapse": probes.collapse(ends[1], self.y[: ends.shape[1]], classes),
                "pace": probes.pace(paths),
                "one_step_error": error,
            }
        return found
