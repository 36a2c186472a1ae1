"""Networks trained side by side on a CUDA device, each step a captured graph on a stream of its own.

    python benchmarks/together.py [--problems mnist cifar-k1 cifar-k4] [--together 1 4 8 16]

It writes results/benchmarks/together-cuda.json. The images are random, of the size and number of the data set's: the
time of a step does not depend on what they show. A row is two epochs of so many ResNets of Table 1's width in
bfloat16, the capture of their graphs counted, after a short run that has loaded the device's libraries; one network
alone for K = 4, and one epoch.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from geodesic import devices, networks, records, training
from geodesic.data import Dataset
from geodesic.training import Job, Recipe


class Problem(NamedTuple):
    """A network, the size of its data, and how it is trained."""

    dataset: str
    stages: int
    norm: str
    shape: tuple[int, ...]
    points: int
    recipe: Recipe


_CIFAR = Recipe(epochs=2, batch_size=128, augment="crop-flip", precision="bfloat16", learning_rate=1e-3)
PROBLEMS = {
    "mnist": Problem("mnist", 1, "none", (1, 28, 28), 60000, Recipe(epochs=2, batch_size=256, precision="bfloat16")),
    "cifar-k1": Problem("cifar10", 1, "batch", (3, 32, 32), 50000, _CIFAR),
    "cifar-k4": Problem("cifar10", 4, "batch", (3, 32, 32), 50000, _CIFAR),
}


def images(shape: tuple[int, ...], points: int, device: torch.device) -> Dataset:
    """Random ones, with labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(points, *shape, generator=generator).to(device)
    y = torch.randint(0, 10, (points,), generator=generator).to(device)
    return Dataset("random", x, y, x[:100], y[:100], tuple("0123456789"), "0", "made here")


def images_per_second(problem: Problem, dataset: Dataset, together: int) -> float:
    """Of all networks."""
    device = dataset.x_train.device

    def job(seed: int) -> Job:
        generator = torch.Generator().manual_seed(seed)
        network = networks.build("resnet", problem.dataset, problem.stages, norm=problem.norm, generator=generator)
        return Job(network.to(device), dataset, problem.recipe, generator)

    jobs = [job(seed) for seed in range(together)]
    start = time.perf_counter()
    for _ in training.train_many(jobs, together=together):
        pass
    steps = problem.points // problem.recipe.batch_size
    seen = together * problem.recipe.epochs * steps * problem.recipe.batch_size
    return seen / (time.perf_counter() - start)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--together", nargs="+", type=int, default=[1, 4, 8, 16], help="networks at a time")
    parser.add_argument("--points", type=int, help="images, for a trial; None takes the data set's number")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "benchmarks", help="folder of the report")
    options = parser.parse_args()
    device, start, rows = devices.find(options.device), time.perf_counter(), list[dict[str, Any]]()
    for name in options.problems:
        problem = PROBLEMS[name]
        problem = problem._replace(points=options.points or problem.points)
        few = problem._replace(points=10 * problem.recipe.batch_size)
        images_per_second(few, images(few.shape, few.points, device), 1)
        dataset = images(problem.shape, problem.points, device)
        for together in options.together if problem.stages == 1 else [1]:
            rate = images_per_second(problem, dataset, together)
            rows.append({"problem": name, "together": together, "images_per_second": rate})
            print(f"{name:<9} {together:>3} at a time: {rate:>9.0f} images/s", flush=True)
    provenance = records.provenance(options.device, time.perf_counter() - start)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"together-{device.type}.json"
    path.write_text(json.dumps({"rows": rows, "provenance": provenance}, indent=1) + "\n", encoding="utf-8")
    print(f"{provenance['device']}; written to {path}")


if __name__ == "__main__":
    main()
