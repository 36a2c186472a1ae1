"""Images per second of our training against a plain PyTorch loop, and the cost of scoring.

    python benchmarks/training.py [--cifar folder:cifar10] [--device cuda]

It writes results/benchmarks/training-DEVICE.json; on a processor without bfloat16 products training-cpu-float32.json.

*training*: the same network from the same weights for the same epochs: "plain" is a loop that anybody would write (a
DataLoader, eager, float32, channels first, the loss read at every step); "ours" is `training.train`, in float32 and in
the precision whose products are faster here, bfloat16 where the machine has them; then without its channels innermost,
and compiled by torch, where there is a C++ compiler. Rates are medians over epochs, the first left out where there are
more; the accuracy is that on test points at the end. Of K=4 a CPU sees so few images in that time that it learns
nothing.
*peak*: the fastest square product of matrices, in either precision; a rate becomes a fraction of it by the counted
operations of one image, forward and backward. Convolutions on a CPU come from another library than products do.
*scoring*: `measure.evaluate` (loss, accuracy, early exits, all scores) against the bare forward pass, and between
them the pass that keeps all states. Memory is the peak of a process of its own, beyond network and points.

All ways of a problem are measured in one run of this program, one after another; ratios are what to quote. Some five
minutes on two idle cores; --scale 0.1 is a trial.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from geodesic import data, devices, measure, networks, records, training
from geodesic.data import Dataset
from geodesic.networks import Network
from geodesic.training import Progress, Recipe
from memory import peak_bytes, reset_peak
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

RECIPE = Recipe(weight_decay=5e-4, learning_rate=0.02)


class Problem(NamedTuple):
    """A network and data."""

    dataset: str
    stages: int
    norm: str
    batch: int


class Size(NamedTuple):
    """How much of a problem is done on a kind of device."""

    train: int  # points
    epochs: int
    test: int  # points of the accuracy
    score: int  # points of the scoring pass


PROBLEMS = {
    "mnist": Problem("mnist", 1, "none", 256),
    "cifar-k1": Problem("cifar", 1, "batch", 128),
    "cifar-k4": Problem("cifar", 4, "batch", 128),
}
SIZES = {
    "cpu": {
        "mnist": Size(10240, 4, 5000, 4000),
        "cifar-k1": Size(2048, 3, 1000, 1000),
        "cifar-k4": Size(128, 3, 50, 100),
    },
    "cuda": {
        "mnist": Size(60000, 6, 10000, 10000),
        "cifar-k1": Size(50000, 6, 10000, 10000),
        "cifar-k4": Size(50000, 4, 10000, 5000),
    },
}


class Laps:
    """Seconds of every epoch, as `on_epoch`."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, progress: Progress | None = None) -> dict[str, Any]:
        """Note the time; every way of training has read a loss by then, so that a device has finished."""
        self.at.append(time.perf_counter())
        return {}

    @property
    def seconds(self) -> list[float]:
        """All epochs but the first, which warms up; the first if there is no other."""
        laps = [after - before for before, after in zip(self.at, self.at[1:], strict=False)]
        return laps[1:] or laps


def by_plain_loop(network: Network, dataset: Dataset, recipe: Recipe, laps: Laps) -> None:
    """The loop that anybody would write; the points come from the host."""
    device = dataset.x_train.device
    away = device.type == "cuda"
    points = TensorDataset(dataset.x_train.cpu(), dataset.y_train.cpu())
    shuffle = torch.Generator().manual_seed(1)
    loader = DataLoader(
        points, recipe.batch_size, shuffle=True, drop_last=True, generator=shuffle, pin_memory=away,
        num_workers=4 if away else 0, persistent_workers=away,
    )  # fmt: skip
    optimiser = torch.optim.SGD(
        network.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: training.schedule(recipe.schedule, step / steps)
    )
    network.to(memory_format=torch.contiguous_format).train()
    laps()
    for _ in range(recipe.epochs):
        total = 0.0
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(network(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            scheduler.step()
            total += loss.item()
        laps()


def by_ours(network: Network, dataset: Dataset, recipe: Recipe, laps: Laps) -> None:
    """The library."""
    training.train(network, dataset, recipe, generator=torch.Generator().manual_seed(1), on_epoch=laps)


def by_ours_channels_first(network: Network, dataset: Dataset, recipe: Recipe, laps: Laps) -> None:
    """The library, with the kernels in memory as torch makes them."""
    by_ours(network.to(memory_format=torch.contiguous_format), dataset, recipe, laps)


def by_ours_compiled(network: Network, dataset: Dataset, recipe: Recipe, laps: Laps) -> None:
    """The library, with the forward and backward pass compiled; that falls into the first epoch."""
    network.compile()
    by_ours(network, dataset, recipe, laps)


# With None in the faster precision.
WAYS: dict[str, tuple[Callable[[Network, Dataset, Recipe, Laps], None], str | None]] = {
    "plain": (by_plain_loop, "float32"),
    "ours, float32": (by_ours, "float32"),
    "ours": (by_ours, None),
    "ours, channels first": (by_ours_channels_first, None),
    "ours, compiled": (by_ours_compiled, None),
}


def build(problem: Problem, dataset: Dataset, seed: int = 0) -> Network:
    """The residual network of the problem."""
    return networks.build(
        "resnet", dataset.name, problem.stages, norm=problem.norm, in_shape=dataset.in_shape,
        classes=len(dataset.classes), generator=torch.Generator().manual_seed(seed),
    ).to(dataset.x_train.device)  # fmt: skip


def operations(problem: Problem, dataset: Dataset) -> float:
    """Floating-point operations of one image, forward and backward."""
    network, x = build(problem, dataset), dataset.x_train[:8]
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    return counter.get_total_flops() / len(x)


def peak(device: torch.device, precision: str, size: int) -> float:
    """Operations per second of the fastest of ten products of square matrices."""
    a = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    best = math.inf
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def compare_training(
    name: str, problem: Problem, size: Size, dataset: Dataset, peaks: dict[str, float]
) -> list[dict[str, Any]]:
    """One row a way."""
    recipe = replace(RECIPE, batch_size=problem.batch, epochs=size.epochs)
    flops, rows = operations(problem, dataset), []
    images = len(dataset.y_train) // problem.batch * problem.batch
    faster = max(peaks, key=peaks.get)
    for way, (work, precision) in WAYS.items():
        network, laps = build(problem, dataset), Laps()
        if work is by_ours_channels_first and all(w.ndim < 4 for w in network.weights()):
            continue
        if work is by_ours_compiled and shutil.which("c++") is None:
            continue
        if way == "ours, float32" and faster == "float32":
            continue  # the same as ours
        precision = precision or faster
        work(network, dataset, replace(recipe, precision=precision), laps)
        rates = [images / seconds for seconds in laps.seconds]
        row = {
            "problem": name, "way": way, "precision": precision, "images_per_second": statistics.median(rates),
            "slowest": min(rates), "fastest": max(rates), "operations_per_image": flops,
            "share_of_peak": statistics.median(rates) * flops / peaks[precision],
            "accuracy": measure.evaluate(network, dataset.x_test, dataset.y_test)["accuracy"],
            "train": len(dataset.y_train), "test": len(dataset.y_test), "epochs": size.epochs, "batch": problem.batch,
        }  # fmt: skip
        row["times_as_fast"] = row["images_per_second"] / (rows[0] if rows else row)["images_per_second"]
        rows.append(row)
        print(
            f"{name:<9} {way:<20} {row['images_per_second']:>9.0f} images/s {row['times_as_fast']:>6.2f}x  "
            f"{row['share_of_peak']:>4.0%} of peak, accuracy {row['accuracy']:.3f}",
            flush=True,
        )
    return rows


def forward(network: Network, x: torch.Tensor, y: torch.Tensor) -> None:
    """Logits, batch by batch as in scoring."""
    del y
    with torch.inference_mode():
        for batch in x.split(measure.score_batch(network)):
            network(batch)


def states(network: Network, x: torch.Tensor, y: torch.Tensor) -> None:
    """All states, not scored."""
    del y
    with torch.inference_mode():
        for batch in x.split(measure.score_batch(network)):
            network.tracks(batch)


PASSES: dict[str, Callable[[Network, torch.Tensor, torch.Tensor], object]] = {
    "forward": forward, "states": states, "scoring": measure.evaluate,
}  # fmt: skip


def memory(name: str, device: str, threads: int, in_shape: tuple[int, ...], work: str, points: int) -> int:
    """Peak bytes of one pass over noise, in this process, which should be fresh."""
    torch.set_num_threads(threads)
    problem, place = PROBLEMS[name], torch.device(device)
    kind = "mnist" if problem.dataset == "mnist" else "folder:images"
    network = networks.build("resnet", kind, problem.stages, norm=problem.norm, in_shape=in_shape, classes=10)
    network, x = network.to(place).eval(), torch.randn(points, *in_shape, device=place)
    y = torch.zeros(points, dtype=torch.int64, device=place)
    if place.type == "cuda":
        before = torch.cuda.max_memory_allocated(place)
        PASSES[work](network, x, y)
        return torch.cuda.max_memory_allocated(place) - before
    before = reset_peak()
    PASSES[work](network, x, y)
    return peak_bytes() - before


def compare_scoring(name: str, problem: Problem, size: Size, dataset: Dataset, repeats: int) -> list[dict[str, Any]]:
    """One row a pass; the passes take turns."""
    network, device = build(problem, dataset).eval(), dataset.x_train.device
    x, y = dataset.x_train[: size.score], dataset.y_train[: size.score]
    batch = measure.score_batch(network)
    seconds: dict[str, list[float]] = {way: [] for way in PASSES}
    for _ in range(repeats + 1):
        for way, work in PASSES.items():
            _wait(device)
            start = time.perf_counter()
            work(network, x, y)
            _wait(device)
            seconds[way].append(time.perf_counter() - start)
    with torch.inference_mode():
        track = sum(stage.nbytes for stage in network.tracks(x[:batch]))
    rows = []
    for way in PASSES:
        job = (name, str(device), torch.get_num_threads(), dataset.in_shape, way, min(len(x), batch))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            held = pool.submit(memory, *job).result()
        laps = seconds[way][1:]  # the first warms up
        row = {"problem": name, "pass": way, "points": len(x), "seconds": statistics.median(laps)}
        row |= {"fastest": min(laps), "slowest": max(laps), "peak_bytes": held, "track_bytes": track}
        row["ratio"] = row["seconds"] / (rows[0] if rows else row)["seconds"]
        rows.append(row)
        print(
            f"{name:<9} {way:<8} {row['seconds']:>8.3f} s {row['ratio']:>5.2f}x  peak {held / 2**20:.0f} MiB, "
            f"a batch of tracks {track / 2**20:.0f} MiB",
            flush=True,
        )
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def everything(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, problem by problem."""
    device = devices.find(options.device)
    square = 2048 if device.type == "cpu" else 8192
    peaks = {precision: peak(device, precision, square) for precision in training.PRECISIONS}
    print(", ".join(f"{precision} {rate / 1e9:.0f} GFLOP/s" for precision, rate in peaks.items()))
    found: dict[str, Any] = {"peak_operations_per_second": peaks, "training": [], "scoring": []}
    for name in options.problems:
        problem, size = PROBLEMS[name], SIZES[device.type][name]
        kind = options.cifar if problem.dataset == "cifar" else problem.dataset
        points = max(problem.batch, round(options.scale * size.train))
        dataset = data.load(kind, options.root, device=device)
        dataset = dataset.take(min(points, len(dataset.y_train)), max(50, round(options.scale * size.test)))
        size = size._replace(score=max(50, round(options.scale * size.score)))
        found["training"] += compare_training(name, problem, size, dataset, peaks)
        found["scoring"] += compare_scoring(name, problem, size, dataset, options.repeats)
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--cifar", default="cifar10", help="name of the CIFAR-10 data, cifar10 or folder:PATH")
    parser.add_argument("--root", help="folder of the data; None takes $GEODESIC_DATA, else ./data")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the points that is used")
    parser.add_argument("--repeats", type=int, default=3, help="of the scoring pass")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=records.RESULTS / "benchmarks", help="folder of the report")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start, load = time.perf_counter(), round(os.getloadavg()[0], 1)
    found = {"load_before": load, "cores": os.cpu_count(), "scale": options.scale, **everything(options)}
    found["provenance"] = records.provenance(options.device, time.perf_counter() - start)
    options.out.mkdir(parents=True, exist_ok=True)
    peaks = found["peak_operations_per_second"]
    slow = "-float32" if max(peaks, key=peaks.get) == "float32" else ""
    path = options.out / f"training-{torch.device(options.device).type}{slow}.json"
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{found['provenance']['device']}, {options.threads} threads; written to {path}")


if __name__ == "__main__":
    main()
