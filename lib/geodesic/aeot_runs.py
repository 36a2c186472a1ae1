"""The recorded runs of book/aeot.md: `python -m geodesic.aeot_runs NAME --out results/aeot`.

A run is a list of parts, one for each method and seed; the record is written after each of them, atomically, and a run
that was interrupted goes on with the first part that is missing. `recorded` gives the chapter the finished record.

| name | what it measures |
|---|---|
| ring, grid | modes, high-quality share and reverse KL of AE-OT and its rivals on 8 and 25 planar Gaussians |
| mnist | Fréchet distance, precision, recall, class balance and memorisation on MNIST, with a sheet of samples |
| stacked | modes of 1000 and reverse KL on triples of MNIST digits, counted by a classifier of our own |
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, encode_png
from torchvision.utils import make_grid

from geodesic import aeot, data, records, semidiscrete
from geodesic import generative_metrics as metrics

Part = dict[str, Any]

_PLANE = {"n": 1000, "samples": 2500, "methods": list(aeot.METHODS), "seeds": [0, 1, 2]}
_IMAGES = {"methods": list(aeot.METHODS), "seeds": [0, 1, 2]}

# Everything that decides a number; the record's name is a hash of these.
SETTINGS: dict[str, dict[str, Any]] = {
    "ring": {"experiment": "ring", "recipe": {"code": 2, "width": 128, "steps": 2000, "noise": 0.02}, **_PLANE},
    "grid": {"experiment": "grid", "recipe": {"code": 2, "width": 128, "steps": 2000, "noise": 0.02}, **_PLANE},
    "mnist": {
        "experiment": "mnist",
        "dataset": "mnist",
        "recipe": {"code": 10, "width": 32, "steps": 1200, "batch": 64, "tol": 0.1},
        "n": 5000,  # training images
        "samples": 2000,  # of each method; the Fréchet distance is biased in this number, so it is fixed
        **_IMAGES,
    },
    "stacked": {
        "experiment": "stacked",
        "dataset": "mnist",
        "recipe": {"code": 20, "width": 32, "steps": 1200, "batch": 64, "tol": 0.1},
        "n": 10000,
        "samples": 5000,
        **_IMAGES,
    },
}


def run(
    settings: dict[str, Any],
    out: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    follow: Any = None,
) -> Path:
    """Make the record of these settings, part by part; parts that are in it already are not repeated.

    Args:
        settings: one of `SETTINGS`, or a changed copy.
        out: folder of the record.
        root: folder of the data; None takes $GEODESIC_DATA, else ./data.
        follow: called with each finished part.

    Returns:
        The path of the record.
    """
    path = Path(out) / f"{records.name(settings)}.json"
    done = records.read(path)["final"]["parts"] if path.exists() else []
    parts = [{"seed": s, "method": m} for s in settings["seeds"] for m in settings["methods"]]
    todo = [part for part in parts if not any(part.items() <= old.items() for old in done)]
    for index, part in enumerate(todo):
        start = time.perf_counter()
        result = _MEASURES[settings["experiment"]](settings, part, root)
        done.append({**part, **result, "seconds": round(time.perf_counter() - start, 2)})
        records.write(
            {
                "settings": settings,
                "status": "complete" if index == len(todo) - 1 else "unfinished",
                "final": {"parts": done},
                "provenance": records.provenance("cpu", sum(each["seconds"] for each in done))
                | {"command": f"python -m geodesic.aeot_runs {settings['experiment']} --out results/aeot"},
            },
            out,
        )
        if follow:
            follow(done[-1])
    return path


def recorded(experiment: str, folder: str | os.PathLike[str] = records.RESULTS / "aeot") -> records.Record:
    """The finished record of an experiment's default settings.

    Raises:
        FileNotFoundError: if it has not been made, or not to its end.
    """
    path = Path(folder) / f"{records.name(SETTINGS[experiment])}.json"
    remedy = f"make it with: python -m geodesic.aeot_runs {experiment} --out {folder}"
    if not path.exists() or (record := records.read(path))["status"] != "complete":
        raise FileNotFoundError(f"the record of {experiment!r} is not there or not finished; {remedy}")
    return record


def sheet(record: records.Record, method: str, seed: int = 0, key: str = "sheet") -> Tensor:
    """The recorded sheet of samples as 8-bit values, (channels, height, width)."""
    part = next(p for p in record["final"]["parts"] if p["method"] == method and p["seed"] == seed)
    raw = torch.frombuffer(bytearray(base64.b64decode(part[key])), dtype=torch.uint8)
    return decode_image(raw, ImageReadMode.UNCHANGED)


def _fitted(x: Tensor, settings: dict[str, Any], part: Part, generator: torch.Generator) -> aeot.Model:
    return aeot.fit(x, part["method"], aeot.Recipe(**settings["recipe"]), generator)


def _modes(model: aeot.Model) -> tuple[str, ...]:
    """AE-OT is measured in each of its modes, a rival once."""
    return aeot.MODES if model.potential else ("direct",)


def _drawn(model: aeot.Model, n: int, mode: str, generator: torch.Generator) -> Tensor:
    return model.sample(n, "discrete" if mode == "direct" else mode, generator)


def _map(model: aeot.Model) -> Part:
    """What the semi-discrete solver certified."""
    if model.potential is None:
        return {}
    return {
        "marginal_error": model.potential.marginal_error,
        "solver_samples": model.potential.samples,
        "angle": model.angle,
    }


def _plane(settings: dict[str, Any], part: Part, root: Any) -> Part:
    del root
    generator = torch.Generator().manual_seed(part["seed"])
    law = {"ring": metrics.ring, "grid": metrics.grid}[settings["experiment"]]
    x, centres, deviation = law(settings["n"], generator)
    test, scale = law(settings["n"], generator)[0], float(x.std())
    model = _fitted(x / scale, settings, part, generator)
    scores = {}
    for mode in _modes(model):
        samples = _drawn(model, settings["samples"], mode, generator) * scale
        found = metrics.coverage(samples, centres, deviation)
        cloud = [[round(float(v), 3) for v in row] for row in samples[:400]]
        scores[mode] = dataclasses.asdict(found) | {
            "memorisation": metrics.memorisation_ratio(samples, x, test),
            "cloud": cloud if part["seed"] == 0 else [],
        }
    return {"scores": scores, **_map(model)}


@functools.cache
def _refereed(name: str, root: Any) -> tuple[data.Dataset, metrics.Classifier]:
    """The data set and the one classifier that judges all methods on it, trained on all of its training points."""
    images = data.load(name, root)
    generator = torch.Generator().manual_seed(0)
    return images, metrics.train_classifier(images.x_train, images.y_train, len(images.classes), generator)


def _mnist(settings: dict[str, Any], part: Part, root: Any) -> Part:
    images, referee = _refereed(settings["dataset"], root)
    images = images.take(n_train=settings["n"])
    generator = torch.Generator().manual_seed(part["seed"])
    model = _fitted(images.x_train, settings, part, generator)
    with torch.no_grad():
        accuracy = float((referee(images.x_test).argmax(1) == images.y_test).double().mean())
        real = referee.features(images.x_test[: settings["samples"]])
        unit = float(real.var(0).sum().sqrt())  # features have no unit of their own
        fresh = referee.features(images.x_test[-settings["samples"] :])
        floor = metrics.frechet_distance(real / unit, fresh / unit)
        scores = {
            mode: _image_scores(_drawn(model, settings["samples"], mode, generator), real, unit, images, referee)
            for mode in _modes(model)
        }
    low, high = float(images.x_train.min()), float(images.x_train.max())
    mode = "singularity-aware" if model.potential else "direct"
    result = {"scores": scores, "accuracy": accuracy, "frechet_of_real": floor, **_map(model)}
    result["sheet"] = _png(_drawn(model, 40, mode, torch.Generator().manual_seed(7)), low, high, 10)
    if model.potential and part["seed"] == 0:
        result["strips"] = _png(_strips(model), low, high, 10)
    return result


def _image_scores(fake: Tensor, real: Tensor, unit: float, images: data.Dataset, referee: metrics.Classifier) -> Part:
    """Scores of one sheet of fakes; the Fréchet distance is in units of the total variance of the real features."""
    features = referee.features(fake)
    precision, recall = metrics.precision_recall(real, features)
    classes = torch.bincount(referee.head(features).argmax(1), minlength=len(images.classes))
    half = len(fake) // 2
    return {
        "frechet": metrics.frechet_distance(features / unit, real / unit),
        "frechet_half": metrics.frechet_distance(
            features[:half] / unit, real[:half] / unit
        ),  # shows the bias of a finite sample
        "precision": precision,
        "recall": recall,
        "class_kl": metrics.reverse_kl(classes, torch.bincount(images.y_train, minlength=len(images.classes))),
        "memorisation": metrics.memorisation_ratio(fake[:500], images.x_train, images.x_test[:500]),
    }


def _strips(model: aeot.Model, steps: int = 10) -> Float[Tensor, n * shape]:
    """Two strips of images across large folds, then two across small ones: the continuous map along short segments.

    A strip crosses the facet between the two best cells of its middle point at a right angle.
    """
    noise = semidiscrete.draw(512, model.recipe.code, "normal", torch.Generator().manual_seed(5))
    order = model.potential.fold_angle(noise).argsort()
    middle = noise[order[[-1, -2, 0, 1]]]
    first, second, reach = model.potential.facet(middle)
    across = torch.nn.functional.normalize(second - first, dim=1)
    t = torch.linspace(-1, 1, steps)[None, :, None] * 2
    path = middle[:, None] + reach[:, None, None] * (1 + t) * across[:, None]
    with torch.no_grad():
        return model.decode(model.codes(path.flatten(0, 1), "extended"))


def _stacked(settings: dict[str, Any], part: Part, root: Any) -> Part:
    images, referee = _refereed(settings["dataset"], root)
    generator = torch.Generator().manual_seed(part["seed"])
    triples = torch.randint(len(images.x_train), (settings["n"], 3), generator=generator)
    x = images.x_train[triples][:, :, 0]  # (n, 3, 28, 28)
    model = _fitted(x, settings, part, generator)
    scores = {}
    with torch.no_grad():
        uniform = torch.ones(1000)
        for mode in _modes(model):
            fake = _drawn(model, settings["samples"], mode, generator)
            digits = [referee(fake[:, c : c + 1]).argmax(1) for c in range(3)]
            counts = torch.bincount(100 * digits[0] + 10 * digits[1] + digits[2], minlength=1000)
            scores[mode] = {"modes": int((counts > 0).sum()), "reverse_kl": metrics.reverse_kl(counts, uniform)}
    return {"scores": scores, **_map(model)}


def _png(images: Float[Tensor, "n c h w"], low: float, high: float, columns: int) -> str:
    """Base64 of a small PNG sheet."""
    values = ((images.clamp(low, high) - low) / (high - low) * 255).round().byte()
    page = make_grid(values, nrow=columns, padding=1, pad_value=128)
    page = page[:1] if images.shape[1] == 1 else page
    return base64.b64encode(encode_png(page, 9).numpy().tobytes()).decode("ascii")


_MEASURES = {"ring": _plane, "grid": _plane, "mnist": _mnist, "stacked": _stacked}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the recorded runs."""
    parser = argparse.ArgumentParser(prog="python -m geodesic.aeot_runs", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=list(SETTINGS))
    parser.add_argument("--out", default="results/aeot", help="folder of the record")
    parser.add_argument("--data", default=None, help="folder of the data; $GEODESIC_DATA, else ./data, when absent")
    options = parser.parse_args(arguments)

    def follow(part: Part) -> None:
        sys.stderr.write(f"seed {part['seed']} {part['method']}: {part['seconds']:.0f} s\n")

    sys.stdout.write(f"{run(SETTINGS[options.name], options.out, options.data, follow)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
