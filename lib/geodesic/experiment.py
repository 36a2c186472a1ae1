"""One run: train a network, score its tracks, and return the record.

`run(Settings(...))` is the whole experiment; the notebook `notebooks/experiment.ipynb` and the command
`python -m geodesic run` are shells around it. `run_many` does several, side by side on a CUDA device. Scores are
computed in float32 whatever the precision of training.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from geodesic import data, devices, measure, networks, probes, records, tracks, training
from geodesic.data import Dataset
from geodesic.networks import Network
from geodesic.settings import Settings
from geodesic.training import Job, Progress

_PLANE_EPOCHS = 8  # at most, of which tracks are kept in a plane
_COLLAPSED = 0.99  # a training loss above this share of the best constant answer's: nothing was learnt


def run(
    settings: Settings,
    *,
    root: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    download: bool = False,
    dataset: Dataset | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    stop: Callable[[], bool] | None = None,
    show: bool = False,
) -> records.Record:
    """Train and score one network.

    Args:
        settings: what to run.
        root: where the data are (see `data.load`).
        device: where to run.
        download: fetch data that are not there.
        dataset: the data, if they are loaded already and on the device.
        checkpoints: folder in which to keep an unfinished run's state, to continue from after an interruption.
        stop: asked after every epoch; where it says True before the last, the run ends there.
        show: draw a progress bar.

    Returns:
        A record (see `records`): settings, status, epochs (epoch 0 is the untrained network), final scores on training
        and test points, weight norms, tracks in a plane, provenance. Status is "ok"; "collapsed" (the training loss is
        that of the best constant answer: scored, but there is nothing to score); or "diverged" (a non-finite loss, or
        one above the untrained network's: never scored).

    Raises:
        ValueError: for settings that do not fit the data.
        Stopped: if `stop` ended the run; its checkpoint continues it.
    """
    options = {
        "root": root, "device": device, "download": download, "dataset": dataset, "checkpoints": checkpoints
    }  # fmt: skip
    record = next(run_many([settings], **options, stop=stop, show=show), None)
    if record is None:
        raise Stopped(f"stopped before its {settings.epochs} epochs were over; its checkpoint continues it")
    return record


class Stopped(RuntimeError):
    """A run was asked to end before its last epoch."""


def run_many(
    settings: Iterable[Settings],
    *,
    root: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    download: bool = False,
    dataset: Dataset | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    together: int = 1,
    stop: Callable[[], bool] | None = None,
    show: bool = False,
) -> Iterator[records.Record | None]:
    """Train and score several networks; data that runs share are loaded once.

    Args:
        settings: what to run.
        root: see `run`.
        device: where to run.
        download: fetch data that are not there.
        dataset: the data, if they are loaded already and on the device.
        checkpoints: see `run`.
        together: networks in training at a time on a CUDA device (see `training.train_many`).
        stop: see `run`.
        show: draw a progress bar.

    Yields:
        One record each as it is finished, that of `run`; None for a run that was stopped.

    Raises:
        ValueError: for settings that do not fit the data.
    """
    for member, progress in train_many(
        settings, root=root, device=device, download=download, dataset=dataset, checkpoints=checkpoints,
        together=together, stop=stop, show=show,
    ):  # fmt: skip
        yield member.record(progress) if progress.finished(member.settings) else None


def train_many(
    settings: Iterable[Settings],
    *,
    root: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    download: bool = False,
    dataset: Dataset | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    together: int = 1,
    stop: Callable[[], bool] | None = None,
    show: bool = False,
) -> Iterator[tuple["Member", Progress]]:
    """The training of `run_many` without the scores; `member.record(progress)` makes those.

    A finished run's checkpoint is kept: whoever runs the same settings with it, in this process or another, finds
    nothing left to train.
    """
    device = devices.find(device)
    members: dict[int, Member] = {}

    def jobs() -> Iterator[Job]:
        loaded = dataset
        for one in settings:
            clock = time.perf_counter()
            if loaded is None or (dataset is None and loaded.name != one.dataset):
                loaded = data.load(one.dataset, root, device=device, download=download)
            member = _member(one, loaded, device, clock, together)
            path = records.checkpoint(one.to_dict(), checkpoints) if checkpoints else None
            job = Job(member.network, member.dataset, one, member.generator, member.on_epoch, path)
            members[id(job)] = member
            yield job

    for job, progress in training.train_many(jobs(), together=together, stop=stop, show=show):
        yield members.pop(id(job)), progress


@dataclass
class Member:
    """A run under way: its network and data, what is noted after every epoch, and its record."""

    settings: Settings
    device: torch.device
    dataset: Dataset
    network: Network
    generator: torch.Generator
    plane_points: Int64[Tensor, "n"]  # training points whose tracks are kept
    clock: float  # when its time was last noted
    together: int  # networks that shared the device in its time

    def seconds(self, progress: Progress) -> float:
        """Wall time of the run so far, interruptions not counted."""
        before, self.clock = self.clock, time.perf_counter()
        return round((progress.history[-1]["seconds"] if progress.history else 0) + self.clock - before, 2)

    def on_epoch(self, progress: Progress) -> dict[str, Any]:
        """Scores of the first points of both parts; tracks of a few are kept in `progress`."""
        dataset, n = self.dataset, self.settings.eval_points
        self.network.eval()
        if progress.epoch in _plane_epochs(self.settings):
            with torch.inference_mode():
                states = self.network.tracks(dataset.x_train[self.plane_points])
            progress.snapshots |= {f"{k}.{progress.epoch}": probes.sketch(track) for k, track in enumerate(states)}
        try:
            train, test = (
                measure.brief(measure.evaluate(self.network, x[:n], y[:n]))
                for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test))
            )
        except tracks.NotFiniteError as error:
            raise training.DivergedError(str(error)) from error
        return {"epoch": progress.epoch, "seconds": self.seconds(progress), "train": train, "test": test}

    def record(self, progress: Progress) -> records.Record:
        """Score the trained network; the whole record."""
        status, final = _final(self.network, self.dataset, self.settings, progress)
        about = {
            "training_seconds": progress.history[-1]["seconds"],
            "data": self.dataset.source,
            "data_fingerprint": self.dataset.fingerprint,
        }
        if self.together > 1:
            about["together"] = self.together
        labels = self.dataset.y_train[self.plane_points]
        record = {
            "schema": records.SCHEMA,
            "settings": self.settings.to_dict(),
            "status": status,
            "epochs": measure.rounded(progress.history),
            "final": measure.rounded(final),
            "weights": measure.rounded(probes.weight_norms(self.network)) if final else None,
            "plane": _plane(progress, labels, self.settings) if final else None,
            "provenance": records.provenance(self.device, self.seconds(progress)) | about,
        }
        return _json(record)


def _member(settings: Settings, dataset: Dataset, device: torch.device, clock: float, together: int) -> Member:
    """A network before its first step. One generator serves shuffled labels, then weights, then training."""
    dataset = dataset.take(settings.n_train, settings.n_test)
    _check_sizes(settings, dataset)
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.labels == "shuffled":
        dataset = dataset.shuffle_labels(generator)
    network = _network(settings, dataset, generator).to(device)
    points = _balanced(dataset.y_train, settings.plane_points)
    return Member(settings, device, dataset, network, generator, points, clock, together)


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
    """Tracks of a few training points in the plane of the last epoch's principal axes."""
    epochs = _plane_epochs(settings)
    stages = []
    for k in range(settings.stages):
        centre, axes, share = probes.plane(progress.snapshots[f"{k}.{epochs[-1]}"].flatten(0, 1))
        paths = [(progress.snapshots[f"{k}.{epoch}"] - centre) @ axes for epoch in epochs]
        stages.append({"variance_share": share, "tracks": [_rounded(path) for path in paths]})
    return {"labels": labels.tolist(), "epochs": epochs, "stages": stages}


def _plane_epochs(settings: Settings) -> list[int]:
    """Of seed 0, which figures draw, up to eight epochs that lie even; of other seeds the last one alone."""
    if settings.seed:
        return [settings.epochs]
    return sorted({round(k * settings.epochs / (_PLANE_EPOCHS - 1)) for k in range(_PLANE_EPOCHS)})


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
