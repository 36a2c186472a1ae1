"""The recorded runs of book/meanfield.md: `python -m geodesic.meanfield.runs NAME --out results/meanfield`.

An experiment is a list of parts; the record is written after each of them, atomically, and a run that was interrupted
goes on with the first part that is missing. `recorded` gives the chapter the finished record of the default settings.

| name | what it measures |
|---|---|
| success | share of initialisations that learn a teacher of 5 neurons in dimension 20, over the number m of particles |
| chaos | distance between the measure of m particles and the limit, over m: in W₂², in function, in loss |
| replication | the same in the plane, function and loss only, with new and more initialisations |
| real | two-layer network on images in mean-field and standard scaling: accuracy, and W₂ travelled, over m |
"""

import argparse
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geodesic import data, meanfield, records, transport
from geodesic.meanfield import models

Part = dict[str, Any]

# Everything that decides a number; the record's name is a hash of these.
SETTINGS: dict[str, dict[str, Any]] = {
    "success": {
        "experiment": "success",
        "dimension": 20,
        "teacher_neurons": 5,
        # m, and how many repeats: teachers and initialisations, both drawn anew
        "particles": [[1, 64], [3, 64], [5, 64], [7, 64], [10, 64], [14, 64], [20, 64], [100, 16]],
        "decay": 5e-4,  # of square_decay
        # Heun, in the unit of time of θ′ = −∇F′. Euler steps of this length carry small neurons across a = 0, which the
        # flow itself cannot.
        "step": 1.0,
        "steps": 2000,
        "seed": 0,
    },
    "chaos": {
        "experiment": "chaos",
        "problems": ["line", "plane", "sphere"],
        "particles": [4, 8, 16, 32, 64, 128, 256],
        "reference": 1024,  # particles that stand for the limit
        "repeats": {"line": 64, "plane": 16, "sphere": 16},
        "times": {"line": [0, 2, 10, 40], "plane": [0, 2, 10, 50], "sphere": [0, 10, 50]},
        "substeps": 40,  # of Heun's scheme between two of these times
        "seed": 0,
    },
    # Made after "chaos" had been looked at, to test what was read off it: other draws, four times as many.
    "replication": {
        "experiment": "replication",
        "problems": ["plane"],
        "particles": [4, 8, 16, 32, 64, 128, 256],
        "reference": 1024,
        "repeats": {"plane": 64},
        "w2_repeats": 0,  # W₂ takes most of the time, and is not in question
        "times": {"plane": [0, 2, 10, 50]},
        "substeps": 40,
        "seed": 1,
    },
    "real": {
        "experiment": "real",
        "dataset": "mnist",
        "particles": [10, 100, 1000, 10000],
        # α, and the step in the time of the function, so that f moves equally fast:
        # θ ← θ − (step/α²) ∇F′; the last entry is the largest m this is done for
        "scalings": [["mean-field", 3.0, 10000], ["standard", 3.0, 10000], ["standard", 10.0, 1000]],
        "steps": 500,
        "batch": 100,
        "seeds": [0, 1, 2],
        "w2_points": 2000,  # W₂ travelled is computed on so many particles at most
    },
}


def run(
    settings: dict[str, Any],
    out: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Path:
    """Make the record of these settings, part by part; parts that are in it already are not repeated.

    Args:
        settings: one of `SETTINGS`, or a changed copy.
        out: folder of the record.
        root: folder of the data for "real"; None takes $GEODESIC_DATA, else ./data.
        device: where to compute.

    Returns:
        The path of the record.
    """
    parts, measure = _EXPERIMENTS[settings["experiment"]]
    path = Path(out) / f"{records.name(settings)}.json"
    done = records.read(path)["final"]["parts"] if path.exists() else []
    todo = [part for part in parts(settings) if not any(part.items() <= old.items() for old in done)]
    for index, part in enumerate(todo):
        start, busy = time.perf_counter(), time.process_time()
        result = measure(settings, part, root, torch.device(device))
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
        done.append({**part, **result, **{key: round(value, 2) for key, value in spent.items()}})
        records.write(
            {
                "settings": settings,
                "status": "complete" if index == len(todo) - 1 else "unfinished",
                "final": {"parts": done},
                "provenance": records.provenance(device, sum(each["seconds"] for each in done))
                | {"command": f"python -m geodesic.meanfield.runs {settings['experiment']} --out results/meanfield"},
            },
            out,
        )
    return path


def recorded(experiment: str, folder: str | os.PathLike[str] = records.RESULTS / "meanfield") -> records.Record:
    """The finished record of an experiment's default settings.

    Raises:
        FileNotFoundError: if it has not been made, or not to its end.
    """
    path = Path(folder) / f"{records.name(SETTINGS[experiment])}.json"
    remedy = f"make it with: python -m geodesic.meanfield.runs {experiment} --out {folder}"
    if not path.exists() or (record := records.read(path))["status"] != "complete":
        raise FileNotFoundError(f"the record of {experiment!r} is not there or not finished; {remedy}")
    return record


def _generator(seed: int, use: Any) -> torch.Generator:
    """A stream for one use. Seeds that differ by a little give streams that do too; hashes of them share nothing."""
    digest = hashlib.sha256(json.dumps([seed, use], sort_keys=True).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# --------------------------------------------------------------------------------------------------------- success map
def draw_neurons(
    shape: Sequence[int], dimension: int, generator: torch.Generator, device: torch.device | None = None
) -> Float[Tensor, "... p"]:
    """Neurons (w, a) with w uniform on the unit sphere and a = ±1, so that a² = ‖w‖²; float64."""
    inner = torch.randn(*shape, dimension, generator=generator, dtype=torch.float64)
    outer = 2.0 * torch.randint(0, 2, (*shape, 1), generator=generator) - 1
    return torch.cat([inner / inner.norm(dim=-1, keepdim=True), outer.double()], -1).to(device)


def enough_of_each_sign(student: Float[Tensor, "*batch m p"], teacher: Float[Tensor, "*batch m0 p"]) -> Tensor:
    """Whether the student has at least as many neurons of each sign of a as the teacher, shape (*batch,)."""
    have, want = (student[..., -1] > 0).sum(-1), (teacher[..., -1] > 0).sum(-1)
    return (have >= want) & (student.shape[-2] - have >= teacher.shape[-2] - want)


def _success(settings: dict[str, Any], part: Part, root: Any, device: torch.device) -> Part:
    del root
    generator = _generator(settings["seed"], part)
    repeats = part["repeats"]
    teacher = draw_neurons((repeats, settings["teacher_neurons"]), settings["dimension"], generator, device)
    student = draw_neurons((repeats, part["m"]), settings["dimension"], generator, device)
    problem = models.teacher_student(teacher, settings["decay"])
    end = settings["steps"] * settings["step"]
    trajectory = meanfield.flow(problem, student, [0.0, end], "heun", substeps=settings["steps"])
    bare = models.teacher_student(teacher)
    # Relative to the risk of the network that is zero: 1 means that nothing was learnt.
    relative = meanfield.energy(bare, trajectory.particles[-1]) / bare.constant
    return {
        "relative_risk": relative.clamp_min(0).tolist(),
        "enough_signs": enough_of_each_sign(student, teacher).tolist(),
    }


# ------------------------------------------------------------------------------------------------ propagation of chaos
def line_problem() -> meanfield.Problem:
    """Bumps of width 0.15 on the line that are to sum to two bumps at 0.2 and 0.8 with masses 0.4 and 0.6."""
    integrate = models.bumps(torch.linspace(-0.5, 1.5, 41, dtype=torch.float64), 0.15)
    spikes = torch.tensor([[0.2], [0.8]], dtype=torch.float64)
    target = integrate(spikes, torch.tensor([0.4, 0.6], dtype=torch.float64))
    return meanfield.Problem(integrate, models.half_squared_loss(target))


def plane_teacher() -> Float[Tensor, "3 3"]:
    """Three neurons of length 1 in the plane, at the angles 0.3, 2.0 and 4.2, with signs +, −, +."""
    angle = torch.tensor([0.3, 2.0, 4.2], dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin(), torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)], -1)


def plane_neurons(angle: Float[Tensor, "*batch"], sign: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch 3"]:
    """Neurons of length 1 in the plane."""
    return torch.stack([angle.cos(), angle.sin(), sign], -1)


def line_w2_squared(first: Float[Tensor, "*batch m"], second: Float[Tensor, " q"]) -> Float[Tensor, "*batch"]:
    """W₂² of clouds of m points to one of q points on the line, m dividing q: the sorted points are paired."""
    low, high = first.sort(-1).values, second.sort(-1).values
    return (low.repeat_interleave(high.shape[-1] // low.shape[-1], -1) - high).square().mean(-1)


def cloud_w2_squared(first: Float[Tensor, "m p"], second: Float[Tensor, "q p"]) -> float:
    """W₂² of clouds of m and q points, m dividing q: every point of the first is repeated q/m times."""
    return transport.w2_squared(first.repeat_interleave(len(second) // len(first), 0), second)


def _chaos_start(name: str, count: int, batch: Sequence[int], generator: torch.Generator) -> Tensor:
    """Independent draws of the initial particles."""
    if name == "sphere":
        return draw_neurons((*batch, count), 20, generator)
    uniform = torch.rand(*batch, count, generator=generator, dtype=torch.float64)
    if name == "line":
        return uniform.unsqueeze(-1)
    # As many neurons of each sign: a surplus of order √m would have to cross from a = 1 to a = −1, and W₂² with it.
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(count // 2).expand(*batch, count)
    return plane_neurons(2 * math.pi * uniform, sign)


def _chaos_limit_start(name: str, count: int, generator: torch.Generator) -> Tensor:
    """Particles that stand for the initial measure itself: equally spaced where it has one dimension."""
    if name == "sphere":
        return _chaos_start(name, count, (), generator)
    if name == "line":
        return ((torch.arange(count, dtype=torch.float64) + 0.5) / count).unsqueeze(-1)
    angle = 4 * math.pi * torch.arange(count // 2, dtype=torch.float64) / count
    return torch.cat([plane_neurons(angle, torch.full_like(angle, sign)) for sign in (1.0, -1.0)])


def _chaos_problem(name: str, seed: int) -> meanfield.Functional:
    if name == "line":
        return line_problem()
    if name == "plane":
        return models.teacher_student(plane_teacher())
    return models.teacher_student(draw_neurons((5,), 20, _generator(seed, "teacher")))


@functools.lru_cache(maxsize=1)
def _chaos_limit(
    name: str, count: int, times: tuple[float | int, ...], substeps: int, seed: int
) -> meanfield.Trajectory:
    start = _chaos_limit_start(name, count, _generator(seed, "limit"))
    return meanfield.flow(_chaos_problem(name, seed), start, times, "heun", substeps=substeps)


def _function_gap(name: str, particles: Tensor, limit: Tensor) -> Tensor:
    """Mean square over the inputs of f_μm − f_μ, for a batch of clouds against one."""
    if name != "line":  # twice the risk of the student with the limit as its teacher
        return 2 * meanfield.energy(models.teacher_student(limit), particles)
    problem = line_problem()
    values = [problem.integrate(cloud, meanfield.uniform_weights(cloud)) for cloud in (particles, limit)]
    return (values[0] - values[1]).square().mean(-1)


def _chaos(settings: dict[str, Any], part: Part, root: Any, device: torch.device) -> Part:
    del root, device  # small problems, many W₂: made on the CPU
    name, m, times = part["problem"], part["m"], tuple(settings["times"][part["problem"]])
    limit = _chaos_limit(name, settings["reference"], times, settings["substeps"], settings["seed"])
    start = _chaos_start(name, m, (settings["repeats"][name],), _generator(settings["seed"], part))
    trajectory = meanfield.flow(
        _chaos_problem(name, settings["seed"]), start, times, "heun", substeps=settings["substeps"]
    )
    pairs = list(zip(trajectory.particles, limit.particles, strict=True))
    if name == "line":
        w2 = [line_w2_squared(clouds[..., 0], reference[..., 0]).tolist() for clouds, reference in pairs]
    else:
        some = settings.get("w2_repeats")  # None: all
        w2 = [[cloud_w2_squared(cloud, reference) for cloud in clouds[:some]] for clouds, reference in pairs]
    gaps = [_function_gap(name, clouds, reference).tolist() for clouds, reference in pairs]
    loss = (trajectory.energies - limit.energies[:, None]).tolist()
    result = {"w2_squared": w2, "function_gap": gaps, "loss_gap": loss}
    # (times, repeats) each; six digits are more than a mean over repeats can use
    return {key: [[float(f"{value:.6g}") for value in row] for row in rows] for key, rows in result.items()}


# ----------------------------------------------------------------------------------------------------------- real data
def scaling_factor(name: str, m: int) -> float:
    """α of `models.two_layer`: 1 for "mean-field", √m for "standard"."""
    return {"mean-field": 1.0, "standard": math.sqrt(m)}[name]


def paired_neurons(m: int, inputs: int, outputs: int, generator: torch.Generator) -> Float[Tensor, "m p"]:
    """Neurons (w, 0, a), w and a standard normal, each with its twin (w, 0, −a), so that f = 0 in any scaling."""
    half = m // 2
    inner, outer = (torch.randn(half, size, generator=generator) for size in (inputs, outputs))
    bias = torch.zeros(half, 1)
    return torch.cat([torch.cat([inner, bias, sign * outer], 1) for sign in (1, -1)])


@functools.lru_cache(maxsize=1)
def _images(name: str, root: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flattened images with mean squared length 1, and labels."""
    bundle = data.load(name, root, device=device)
    scale = math.sqrt(math.prod(bundle.in_shape))
    return bundle.x_train.flatten(1) / scale, bundle.y_train, bundle.x_test.flatten(1) / scale, bundle.y_test


def _train(settings: dict[str, Any], part: Part, images: tuple[Tensor, ...], start: Tensor, scale: float) -> Tensor:
    """Stochastic gradient flow: one Euler step on the functional of each batch."""
    x, y = images[:2]
    generator = _generator(part["seed"], "batches")
    particles = start
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(_epochs(settings, len(x)))])
    for batch in order.split(settings["batch"])[: settings["steps"]]:
        integrate = models.two_layer(x[batch], start.shape[-1] - x.shape[1] - 1, scale)
        problem = meanfield.Problem(integrate, models.cross_entropy_loss(y[batch]))
        particles = particles - part["step"] / scale**2 * meanfield.wasserstein_gradient(problem, particles)
    return particles


def _epochs(settings: dict[str, Any], size: int) -> int:
    return math.ceil(settings["steps"] * settings["batch"] / (size - size % settings["batch"]))


def _real(settings: dict[str, Any], part: Part, root: Any, device: torch.device) -> Part:
    images = _images(settings["dataset"], root, device)
    x, y, x_test, y_test = images
    classes = int(y.max()) + 1
    scale = scaling_factor(part["scaling"], part["m"])
    generator = _generator(part["seed"], "neurons")
    start = paired_neurons(part["m"], x.shape[1], classes, generator).to(device)
    end = _train(settings, part, images, start, scale)
    if not bool(end.isfinite().all()):
        raise RuntimeError(f"the run {part} diverged; take a smaller step than {part['step']}")
    weights = meanfield.uniform_weights(end)
    output = models.two_layer(x_test, classes, scale)(end, weights)
    some = torch.randperm(len(end), generator=generator)[: settings["w2_points"]].to(device)
    inner = x.shape[1]
    before, after = ((x_test[:1000] @ each[some, :inner].T + each[some, inner]) > 0 for each in (start, end))
    return {
        "test_accuracy": float((output.argmax(-1) == y_test).double().mean()),
        "test_loss": float(models.cross_entropy_loss(y_test)(output)),
        # root mean squares over particles: along their own paths, and between the clouds as measures
        "displacement": float((end - start).square().sum(-1).mean().sqrt()),
        "w2": math.sqrt(transport.w2_squared(start[some], end[some])),
        "w2_points": len(some),
        "start_norm": float(start.square().sum(-1).mean().sqrt()),
        "gates_flipped": float((before != after).double().mean()),
    }


def _chaos_parts(settings: dict[str, Any]) -> list[Part]:
    return [{"problem": name, "m": m} for name in settings["problems"] for m in settings["particles"]]


_EXPERIMENTS: dict[str, tuple[Callable[[dict[str, Any]], list[Part]], Callable[..., Part]]] = {
    "success": (lambda settings: [{"m": m, "repeats": repeats} for m, repeats in settings["particles"]], _success),
    "chaos": (_chaos_parts, _chaos),
    "replication": (_chaos_parts, _chaos),
    "real": (
        lambda settings: [
            {"m": m, "scaling": scaling, "step": step, "seed": seed}
            for seed in settings["seeds"]
            for m in settings["particles"]
            for scaling, step, largest in settings["scalings"]
            if m <= largest
        ],
        _real,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one record; an error of the caller becomes one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="geodesic.meanfield.runs", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(SETTINGS))
    parser.add_argument("--out", type=Path, default=records.RESULTS / "meanfield", help="folder of the record")
    parser.add_argument("--root", help="folder of the data; None takes $GEODESIC_DATA, else ./data")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    options = parser.parse_args(arguments)
    try:
        run(SETTINGS[options.name], options.out, options.root, options.device)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
