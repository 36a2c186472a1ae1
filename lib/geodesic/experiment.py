"""One run: train a network, score its tracks, and return the record.

`run(Settings(...))` is the whole experiment; the notebook `notebooks/experiment.ipynb` and the command
`python -m geodesic run` are shells around it. `run_many` is a row of them, which can be trained as one stack. Scores
are computed in float32 whatever the precision of training.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from geodesic import data, devices, measure, networks, probes, records, stacked, training
from geodesic.data import Dataset
from geodesic.networks import Network
from geodesic.settings import Settings
from geodesic.training import Progress

FREE = ("seed", *stacked.FREE)  # what the runs of a row may differ in
_COLLAPSED = 0.99  # a training loss above this share of the best constant answer's: nothing was learnt


def run(
    settings: Settings,
    *,
    root: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    download: bool = False,
    checkpoints: str | os.PathLike[str] | None = None,
    show: bool = False,
) -> records.Record:
    """Train and score one network.

    Args:
        settings: what to run.
        root: where the data are (see `data.load`).
        device: where to run.
        download: fetch data that are not there.
        checkpoints: folder in which to keep an unfinished run's state, to continue from after an interruption.
        show: draw a progress bar.

    Returns:
        A record (see `records`): settings, status, epochs (epoch 0 is the untrained network), final scores on training
        and test points, weight norms, tracks in a plane, provenance. Status is "ok"; "collapsed" (the training loss is
        that of the best constant answer: scored, but there is nothing to score); or "diverged" (a non-finite loss, or
        one above the untrained network's: never scored).

    Raises:
        ValueError: for settings that do not fit the data.
    """
    clock = time.perf_counter()
    dataset, device = _data(settings, root, device, download)
    member = _member(settings, dataset, device, clock)
    progress = training.train(
        member.network,
        member.dataset,
        settings,
        generator=member.generator,
        on_epoch=member.on_epoch,
        checkpoint=Path(checkpoints) / f"{records.name(settings.to_dict())}.safetensors" if checkpoints else None,
        show=show,
    )
    return member.record(progress, member.final(progress))


def run_many(
    settings: Sequence[Settings],
    *,
    root: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    download: bool = False,
    checkpoints: str | os.PathLike[str] | None = None,
    stack: bool | None = None,
    show: bool = False,
) -> Iterator[records.Record]:
    """Train and score networks that differ in λ, step size and seed alone: a row of a table.

    Args:
        settings: what to run.
        root: see `run`.
        device: where to run.
        download: fetch data that are not there.
        checkpoints: see `run`; a stack keeps none.
        stack: train them as one tensor program (see `stacked`); None does so where it pays, which is for fully
            connected networks on a CUDA device. They then need the memory of all of them at once.
        show: draw a progress bar.

    Yields:
        One record each as it is finished, that of `run`; of a stack up to rounding. The members of a stack bear its
        time in equal shares, and their provenance says how many they were ("stacked").

    Raises:
        ValueError: for no settings, settings that differ in more, or that do not fit the data.
    """
    alike = {replace(one, seed=0, weight_decay=0.0, learning_rate=1.0) for one in settings}
    if len(alike) != 1:
        raise ValueError(
            f"{len(alike)} kinds of run: settings may differ in {', '.join(FREE)} alone; ask for each kind by itself"
        )
    clock = time.perf_counter()
    if stack is None:
        stack = len(settings) > 1 and devices.find(device).type == "cuda" and _fully_connected(settings[0])
    if not stack:
        for one in settings:
            yield run(one, root=root, device=device, download=download, checkpoints=checkpoints, show=show)
        return
    dataset, place = _data(settings[0], root, device, download)
    members = [_member(one, dataset, place, clock, share=len(settings)) for one in settings]
    progress = stacked.train(
        [member.network for member in members],
        [member.dataset for member in members],
        settings,
        generators=[member.generator for member in members],
        on_epoch=[member.on_epoch for member in members],
        show=show,
    )
    for member, each in zip(members, progress, strict=True):
        yield member.record(each, member.final(each))


@dataclass
class _Member:
    """A run under way: its network and data, what is noted after every epoch, and its record."""

    settings: Settings
    device: torch.device
    dataset: Dataset
    network: Network
    generator: torch.Generator
    plane_points: Int64[Tensor, "n"]  # training points whose tracks are kept
    clock: float  # when its time was last noted
    share: int  # networks that are trained in one stack and bear its time together

    def seconds(self, progress: Progress) -> float:
        """Wall time of the run so far, interruptions not counted."""
        before, self.clock = self.clock, time.perf_counter()
        spent = (self.clock - before) / self.share
        return round((progress.history[-1]["seconds"] if progress.history else 0) + spent, 2)

    def on_epoch(self, progress: Progress) -> dict[str, Any]:
        """Scores of the first points of both parts; tracks of a few are kept in `progress`."""
        dataset, n = self.dataset, self.settings.eval_points
        self.network.eval()
        with torch.inference_mode():
            states = self.network.tracks(dataset.x_train[self.plane_points])
        progress.snapshots |= {f"{k}.{progress.epoch}": probes.sketch(track) for k, track in enumerate(states)}
        return {
            "epoch": progress.epoch,
            "seconds": self.seconds(progress),
            "train": measure.brief(measure.evaluate(self.network, dataset.x_train[:n], dataset.y_train[:n])),
            "test": measure.brief(measure.evaluate(self.network, dataset.x_test[:n], dataset.y_test[:n])),
        }

    def final(self, progress: Progress) -> tuple[str, dict[str, Any] | None]:
        """Status and final scores."""
        return _final(self.network, self.dataset, self.settings, progress)

    def record(self, progress: Progress, outcome: tuple[str, dict[str, Any] | None]) -> records.Record:
        """The record, of what `final` has found."""
        status, final = outcome
        about = {
            "training_seconds": progress.history[-1]["seconds"],
            "data": self.dataset.source,
            "data_fingerprint": self.dataset.fingerprint,
        }
        if self.share > 1:
            about["stacked"] = self.share
        labels = self.dataset.y_train[self.plane_points]
        record = {
            "settings": self.settings.to_dict(),
            "status": status,
            "epochs": measure.rounded(progress.history),
            "final": measure.rounded(final),
            "weights": measure.rounded(probes.weight_norms(self.network)) if final else None,
            "plane": _plane(progress, labels, self.settings) if final else None,
            "provenance": records.provenance(self.device, self.seconds(progress)) | about,
        }
        return _json(record)


def _data(
    settings: Settings, root: str | os.PathLike[str] | None, device: str | torch.device, download: bool
) -> tuple[Dataset, torch.device]:
    """The points that are used, and the device on which they are."""
    device = devices.find(device)
    dataset = data.load(settings.dataset, root, device=device, download=download)
    dataset = dataset.take(settings.n_train, settings.n_test)
    _check_sizes(settings, dataset)
    return dataset, device


def _member(settings: Settings, dataset: Dataset, device: torch.device, clock: float, share: int = 1) -> _Member:
    """A network before its first step. One generator serves shuffled labels, then weights, then training."""
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.labels == "shuffled":
        dataset = dataset.shuffle_labels(generator)
    network = _network(settings, dataset, generator).to(device)
    points = _balanced(dataset.y_train, settings.plane_points)
    return _Member(settings, device, dataset, network, generator, points, clock, share)


def _final(
    network: Network, dataset: Dataset, settings: Settings, progress: Progress
) -> tuple[str, dict[str, Any] | None]:
    """Status, and everything measured on both parts; nothing for a diverged run."""
    if progress.diverged:
        return "diverged", None
    untrained = progress.history[0]["train"]["loss"]
    if progress.epoch and progress.history[-1]["train"]["loss"] > untrained:
        return "diverged", None
    final = measure.final(network, dataset, settings)
    counts = torch.bincount(dataset.y_train, minlength=len(dataset.classes)).double()
    constant = torch.special.entr(counts / counts.sum()).sum().item()  # loss of the best constant answer
    collapsed = progress.epoch and final["train"]["loss"] > _COLLAPSED * constant
    return ("collapsed" if collapsed else "ok"), final


def _plane(progress: Progress, labels: Tensor, settings: Settings) -> dict[str, Any]:
    """Tracks of a few training points at every epoch, in the plane of the last epoch's principal axes."""
    last = max(int(key.split(".")[1]) for key in progress.snapshots)
    stages = []
    for k in range(settings.stages):
        centre, axes, share = probes.plane(progress.snapshots[f"{k}.{last}"].flatten(0, 1))
        paths = []
        for epoch in range(last + 1):
            track = progress.snapshots[f"{k}.{epoch}"]
            paths.append((track - centre) @ axes)
        stages.append({"variance_share": share, "tracks": [_rounded(path) for path in paths]})
    return {"labels": labels.tolist(), "stages": stages}


def _network(settings: Settings, dataset: Dataset, generator: torch.Generator) -> Network:
    return networks.build(
        settings.network,
        settings.dataset,
        settings.stages,
        norm=settings.norm,
        depth=settings.depth,
        width=settings.width,
        in_shape=dataset.in_shape,
        classes=len(dataset.classes),
        generator=generator,
    )


def _fully_connected(settings: Settings) -> bool:
    """Whether the states are vectors; those of an image folder never are."""
    if settings.dataset.startswith("folder:"):
        return False
    return len(networks.architecture(settings.dataset, settings.stages).stage_shapes[0]) == 1


def _balanced(labels: Int64[Tensor, "n"], count: int) -> Int64[Tensor, "m"]:
    """The first points of each class in turn, `count` in all."""
    order = torch.argsort(labels, stable=True)
    rank = torch.empty_like(order)
    sizes = torch.bincount(labels)
    rank[order] = torch.cat([torch.arange(size, device=labels.device) for size in sizes.tolist()])
    return torch.argsort(rank * len(sizes) + labels)[:count]


def _check_sizes(settings: Settings, dataset: Dataset) -> None:
    """Each part is scored at the sizes that it has points for, so that a training set may be scored whole."""
    smaller, larger = sorted((len(dataset.y_train), len(dataset.y_test)))
    if settings.ots_points and (settings.ots_points[0] > smaller or settings.ots_points[-1] > larger):
        raise ValueError(
            f"ots_points={settings.ots_points}: the first must not be more than the {smaller} points of the smaller "
            f"part, nor the last more than the {larger} of the larger"
        )


def _rounded(values: Tensor) -> list[Any]:
    """Coordinates of a figure, to four digits of the largest."""
    digits = 3 - math.floor(math.log10(values.abs().max().clamp_min(1e-12)))
    return [[[round(c, digits) for c in point] for point in state] for state in values.double().tolist()]


def _json(value: Any) -> Any:
    """The same value with non-finite numbers as None, which is how JSON can say them."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
