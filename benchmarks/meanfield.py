"""Particle-steps per second of `geodesic.meanfield.flow`, against two ways of doing without it.

    python benchmarks/meanfield.py [--device cuda] [--steps 200]      # writes results/benchmarks/meanfield-DEVICE.json

The problem is the planar illustration of Chizat (2019): two-layer ReLU network, 15 inputs in R², 3 teacher neurons.
First one initialisation against a training loop of `torch.nn` (same network, SGD with the step times m) and against a
loop over particles in Python, all three checked to end in the same place; then 64 initialisations in one batch against
64 runs one after another. Rates are the best of three repetitions in one process; ratios are what to quote. On the CPU
the clock is that of the process, on one thread, so that other work on the machine does not count.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from geodesic import meanfield, records
from geodesic.meanfield import models
from torch import Tensor

STEP = 0.05
RUNS = 64


def data(device: str) -> tuple[Tensor, Tensor]:
    """15 inputs on the circle of radius √2 and the labels of three neurons at the angles 0.3, 2.0, 4.2."""
    angle = 2 * math.pi * torch.arange(15) / 15
    inputs = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)
    teacher = torch.tensor([[math.cos(t), math.sin(t)] for t in (0.3, 2.0, 4.2)])
    labels = (inputs @ teacher.T).relu() @ torch.tensor([1.0, -1.0, 1.0]) / 3
    return inputs.to(device), labels.to(device)


def by_flow(inputs: Tensor, labels: Tensor, start: Tensor, steps: int) -> Tensor:
    """The library."""
    problem = meanfield.Problem(models.relu_neurons(inputs), models.half_squared_loss(labels))
    # Fifteen ReLU inputs make kinks; the steps are small, the slack lets them slide along one.
    return meanfield.flow(problem, start, [0.0, steps * STEP], substeps=steps, slack=0.1).particles[-1]


def by_training_loop(inputs: Tensor, labels: Tensor, start: Tensor, steps: int) -> Tensor:
    """The same network as anybody would train it."""
    m = len(start)
    first, last = torch.nn.Linear(2, m, bias=False), torch.nn.Linear(m, 1, bias=False)
    network = torch.nn.Sequential(first, torch.nn.ReLU(), last).to(start.device)
    with torch.no_grad():
        first.weight.copy_(start[:, :2])
        last.weight.copy_(start[:, 2:].T)
    optimiser = torch.optim.SGD(network.parameters(), lr=m * STEP)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (network(inputs)[:, 0] / m - labels).square().mean() / 2
        loss.backward()
        optimiser.step()
    return torch.cat([first.weight.detach(), last.weight.detach().T], 1)


def by_particles(inputs: Tensor, labels: Tensor, start: Tensor, steps: int) -> Tensor:
    """One particle after another, gradients written out by hand."""
    particles = list(start)
    for _ in range(steps):
        hidden = [(inputs @ p[:2]).relu() for p in particles]
        residual = (sum(h * p[2] for h, p in zip(hidden, particles, strict=True)) / len(particles) - labels) / len(
            labels
        )
        particles = [
            p - STEP * torch.cat([(residual * (h > 0)) @ inputs * p[2], (residual @ h)[None]])
            for h, p in zip(hidden, particles, strict=True)
        ]
    return torch.stack(particles)


def seconds(work: Callable[[], object], device: str) -> float:
    """Best of three, after one repetition that warms up; processor seconds on the CPU."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    work()
    best = math.inf
    for _ in range(3):
        _wait(device)
        start = clock()
        work()
        _wait(device)
        best = min(best, clock() - start)
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def compare_ways(device: str, steps: int) -> list[dict[str, Any]]:
    """One initialisation, three ways."""
    inputs, labels = data(device)
    rows = []
    print(f"{'m':>6} {'way':<16} {'particle-steps/s':>17} {'flow is':>9}")
    for m in (20, 100, 1000):
        start = torch.randn(m, 3, generator=torch.Generator().manual_seed(m)).to(device)
        ends, rates = {}, {}
        for way, few in ((by_flow, steps), (by_training_loop, steps), (by_particles, max(2, 2000 // m))):
            ends[way] = way(inputs, labels, start, 2)
            taken = seconds(lambda way=way, few=few, start=start: way(inputs, labels, start, few), device)
            rates[way] = m * few / taken
        for way, rate in rates.items():
            torch.testing.assert_close(ends[way], ends[by_flow], rtol=1e-4, atol=1e-5)  # float32
            gain = rates[by_flow] / rate
            print(f"{m:>6} {way.__name__:<16} {rate:>17,.0f} {gain:>8.1f}x")
            rows.append({"m": m, "way": way.__name__, "particle_steps_per_second": rate, "flow_is_faster_by": gain})
    return rows


def compare_batch(device: str, steps: int) -> list[dict[str, Any]]:
    """64 initialisations: one batch against one after another."""
    inputs, labels = data(device)
    rows = []
    print(f"\n{'m':>6} {'64 in turn, s':>14} {'in one batch, s':>16} {'gain':>7}")
    for m in (20, 100, 300, 1000):
        starts = torch.randn(RUNS, m, 3, generator=torch.Generator().manual_seed(m)).to(device)
        few = max(10, min(steps, 5000 // m))
        in_turn = lambda: [by_flow(inputs, labels, each, few) for each in starts]  # noqa: B023, E731
        together = lambda: by_flow(inputs, labels, starts, few)  # noqa: B023, E731
        torch.testing.assert_close(torch.stack(in_turn()), together(), rtol=1e-3, atol=1e-4)  # float32
        turn, once = seconds(in_turn, device), seconds(together, device)
        print(f"{m:>6} {turn:>14.3f} {once:>16.3f} {turn / once:>6.1f}x")
        rows.append({"m": m, "steps": few, "in_turn_s": turn, "in_one_batch_s": once, "gain": turn / once})
    return rows


def main() -> None:
    """Print both tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "benchmarks", help="folder of the report")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.device}, float32, {options.steps} steps of {STEP}")
    begin = time.perf_counter()
    report = {
        "settings": {"steps": options.steps, "step": STEP, "runs": RUNS, "dtype": "float32", "threads": 1},
        "ways": compare_ways(options.device, options.steps),
        "batch": compare_batch(options.device, options.steps),
        "provenance": records.provenance(options.device, time.perf_counter() - begin),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"meanfield-{options.device.split(':')[0]}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
