"""Particle-steps per second of `geodesic.meanfield.flow`, against two ways of doing without it.

    python benchmarks/meanfield.py [--device cuda] [--steps 200]

The problem is the planar illustration of Chizat (2019): two-layer ReLU network, 15 inputs in R², 3 teacher neurons.
First one initialisation against a training loop of `torch.nn` (same network, SGD with the step times m) and against a
loop over particles in Python, all three checked to end in the same place; then 64 initialisations in one batch against
64 runs one after another. Rates are the best of three repetitions in one process; ratios are what to quote.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from geodesic import meanfield, meanfield_models
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
    problem = meanfield.Problem(meanfield_models.relu_neurons(inputs), meanfield_models.half_squared_loss(labels))
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
    """Best of three, after one repetition that warms up."""
    work()
    best = math.inf
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def compare_ways(device: str, steps: int) -> None:
    """One initialisation, three ways."""
    inputs, labels = data(device)
    print(f"{'m':>6} {'way':<16} {'particle-steps/s':>17} {'flow is':>9}")
    for m in (20, 100, 1000):
        start = torch.randn(m, 3, generator=torch.Generator().manual_seed(m)).to(device)
        ends, rates = {}, {}
        for way, few in ((by_flow, steps), (by_training_loop, steps), (by_particles, max(2, 2000 // m))):
            ends[way] = way(inputs, labels, start, 2)
            rates[way] = (
                m * few / seconds(lambda way=way, few=few, start=start: way(inputs, labels, start, few), device)
            )
        for way, rate in rates.items():
            torch.testing.assert_close(ends[way], ends[by_flow], rtol=1e-4, atol=1e-5)  # float32
            print(f"{m:>6} {way.__name__:<16} {rate:>17,.0f} {rates[by_flow] / rate:>8.1f}x")


def compare_batch(device: str, steps: int) -> None:
    """64 initialisations: one batch against one after another."""
    inputs, labels = data(device)
    print(f"\n{'m':>6} {'64 in turn, s':>14} {'in one batch, s':>16} {'gain':>7}")
    for m in (20, 100, 300, 1000):
        starts = torch.randn(RUNS, m, 3, generator=torch.Generator().manual_seed(m)).to(device)
        few = max(10, min(steps, 5000 // m))
        in_turn = lambda: [by_flow(inputs, labels, each, few) for each in starts]  # noqa: B023, E731
        together = lambda: by_flow(inputs, labels, starts, few)  # noqa: B023, E731
        torch.testing.assert_close(torch.stack(in_turn()), together(), rtol=1e-3, atol=1e-4)  # float32
        turn, once = seconds(in_turn, device), seconds(together, device)
        print(f"{m:>6} {turn:>14.3f} {once:>16.3f} {turn / once:>6.1f}x")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    name = (
        torch.cuda.get_device_name() if options.device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {name}, float32, {options.steps} steps of {STEP}")
    compare_ways(options.device, options.steps)
    compare_batch(options.device, options.steps)


if __name__ == "__main__":
    main()
