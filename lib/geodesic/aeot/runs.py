"""The recorded runs of book/aeot.md: `python -m geodesic aeot --data NAME --out results/aeot`.

A run is a list of parts, one for each method and seed; the record is written after each of them, atomically, and a run
that was interrupted goes on with the first part that is missing. `recorded` gives the chapter the finished record.

| name | what it measures |
|---|---|
| ring, grid | modes, high-quality share and reverse KL of AE-OT and its rivals on 8 and 25 planar Gaussians |
| mnist, digits | Fréchet distance, precision, recall, class balance and memorisation, with a sheet of samples |
| stacked | modes of 1000 and reverse KL on triples of MNIST digits, counted by a classifier of our own |
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, encode_png
from torchvision.utils import make_grid

from geodesic import aeot, data, records, semidiscrete
from geodesic.aeot import metrics

Part = dict[str, Any]

_PLANE = {
    "recipe": {
        "code": 2,
        "width": 128,
        "steps": 2000,
        "rate": 1e-3,
        "critic_steps": 5,
        "penalty": 0.1,  # as is customary in the plane
        "noise": 0.02,
    },
    "rival_steps": 20000,
    "n": 1000,
    "samples": 2500,
    "methods": list(aeot.METHODS),
    "seeds": [0, 1, 2],
}
_IMAGES = {"methods": list(aeot.METHODS), "seeds": [0, 1, 2]}

# Everything that decides a number; the record's name is a hash of these. "rival_steps" are those of all but AE-OT,
# as many as the recipe's where they are not given.
# On images "samples" counts fakes, and as many real images to judge them by: the Fréchet distance is biased in it.
SETTINGS: dict[str, dict[str, Any]] = {
    "ring": {"experiment": "ring", **_PLANE},
    "grid": {"experiment": "grid", **_PLANE},
    "mnist": {
        "experiment": "mnist",
        "dataset": "mnist",
        "recipe": {"code": 10, "width": 32, "steps": 1200, "batch": 64, "rate": 1e-3, "tol": 0.1},
        "rival_steps": 6000,
        "n": 5000,  # training images
        "samples": 2000,
        **_IMAGES,
    },
    "digits": {
        "experiment": "digits",
        "dataset": "digits",  # comes with the package: tries the command out in a minute
        "recipe": {"code": 4, "width": 32, "steps": 600, "batch": 64, "tol": 0.1},
        "n": 1000,
        "samples": 180,
        **_IMAGES,
    },
    "stacked": {
        "experiment": "stacked",
        "dataset": "mnist",
        "recipe": {"code": 60, "width": 32, "steps": 8000, "batch": 64, "rate": 3e-3, "noise": 0.5, "tol": 0.2},
        "rival_steps": 12000,
        "n": 20000,  # the divergence of so many random triples from the uniform law is already 999/(2n)
        "samples": 26000,  # as in the published counts
        **_IMAGES,
    },
}


def run(
    settings: dict[str, Any],
    out: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    follow: Callable[[Part], None] | None = None,
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
                | {"command": f"python -m geodesic aeot --data {settings['experiment']} --out results/aeot"},
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
    remedy = f"make it with: python -m geodesic aeot --data {experiment} --out {folder}"
    if not path.exists() or (record := records.read(path))["status"] != "complete":
        raise FileNotFoundError(f"the record of {experiment!r} is not there or not finished; {remedy}")
    return record


def sheet(record: records.Record, method: str, seed: int = 0, key: str = "sheet") -> UInt8[Tensor, "c h w"]:
    """The recorded sheet of samples as 8-bit values."""
    part = next(p for p in record["final"]["parts"] if p["method"] == method and p["seed"] == seed)
    raw = torch.frombuffer(bytearray(base64.b64decode(part[key])), dtype=torch.uint8)
    return decode_image(raw, ImageReadMode.UNCHANGED)


def page(record: records.Record) -> UInt8[Tensor, "c h w"]:
    """The sheets of all methods, one below the other, each of its first seed.

    Raises:
        ValueError: if the record is of points, which make no sheet.
    """
    first = record["settings"]["seeds"][0]
    methods = [p["method"] for p in record["final"]["parts"] if p["seed"] == first and "sheet" in p]
    if not methods:
        raise ValueError(f"the record of {record['settings']['experiment']!r} has no images to show")
    return torch.cat([sheet(record, method, first) for method in methods], dim=1)


def rows(record: records.Record) -> Iterator[tuple[str, dict[str, records.Summary]]]:
    """Name of each method, its mode included, and its scores over the seeds."""
    by_name: dict[str, list[dict[str, float]]] = {}
    for part in record["final"]["parts"]:
        for mode, scores in part["scores"].items():
            name = part["method"] if mode == "direct" else f"{part['method']}, {mode}"
            by_name.setdefault(name, []).append({k: v for k, v in scores.items() if k != "cloud"})
    for name, found in by_name.items():
        keyed = {key: records.summarise([{"x": one[key]} for one in found], [], "x")[()] for key in found[0]}
        yield name, keyed


def _fitted(x: Tensor, settings: dict[str, Any], part: Part, generator: torch.Generator) -> aeot.Model:
    recipe = aeot.Recipe(**settings["recipe"])
    if part["method"] != "ae-ot":
        recipe = dataclasses.replace(recipe, steps=settings.get("rival_steps", recipe.steps))
    return aeot.fit(x, part["method"], recipe, generator)


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


def _images(settings: dict[str, Any], part: Part, root: Any) -> Part:
    images, referee = _refereed(settings["dataset"], root)
    images = images.take(n_train=settings["n"])
    generator = torch.Generator().manual_seed(part["seed"])
    model = _fitted(images.x_train, settings, part, generator)
    # Drawn at random: the second half of MNIST's test set was written by other people than the first.
    order = torch.randperm(len(images.x_test), generator=torch.Generator().manual_seed(0))
    images = dataclasses.replace(images, x_test=images.x_test[order], y_test=images.y_test[order])
    with torch.no_grad():
        accuracy = float((referee(images.x_test).argmax(1) == images.y_test).double().mean())
        real, fresh = referee.features(images.x_test[: 2 * settings["samples"]]).split(settings["samples"])
        unit = float(real.var(0).sum().sqrt())  # features have no unit of their own
        scores = {
            mode: _image_scores(_drawn(model, settings["samples"], mode, generator), real, unit, images, referee)
            for mode in _modes(model)
        }
    low, high = float(images.x_train.min()), float(images.x_train.max())
    result = {
        "scores": scores,
        "accuracy": accuracy,
        "frechet_of_real": metrics.frechet_distance(fresh / unit, real / unit),  # what perfect samples would be given
        "data": images.fingerprint,
        "sheet": _png(_drawn(model, 40, _modes(model)[-1], torch.Generator().manual_seed(7)), low, high, 10),
        **_map(model),
    }
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
        "nearness": metrics.nearness_ratio(fake[:500], images.x_train, images.x_test),
    }


def _strips(model: aeot.Model, steps: int = 10) -> Float[Tensor, "n *shape"]:
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
    x = _triples(images.x_train, settings["n"], generator)
    model = _fitted(x, settings, part, generator)
    fresh = _triples(images.x_test, 500, torch.Generator().manual_seed(0))
    low, high = float(x.min()), float(x.max())
    scores = {}
    for mode in _modes(model):
        fake = _drawn(model, settings["samples"], mode, generator)
        scores[mode] = _thousand(fake, referee) | {"memorisation": metrics.memorisation_ratio(fake[:500], x, fresh)}
    return {
        "scores": scores,
        "of_training": _thousand(x, referee),
        "data": images.fingerprint,
        "sheet": _png(_drawn(model, 40, _modes(model)[-1], torch.Generator().manual_seed(7)), low, high, 10),
        **_map(model),
    }


def _triples(x: Float[Tensor, "m 1 h w"], n: int, generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
    """Three images drawn at random as the channels of one."""
    return x[torch.randint(len(x), (n, 3), generator=generator)][:, :, 0]


@torch.no_grad()
def _thousand(x: Float[Tensor, "n 3 h w"], referee: torch.nn.Module) -> Part:
    """Modes of triples of digits found, their divergence from the uniform law, and how sure the classifier was.

    An image counts as sure when each of its digits has at least nine tenths of the classifier's probability.
    """
    chance = torch.stack([referee(x[:, c : c + 1]).softmax(1) for c in range(3)], 1)  # (n, 3, 10)
    top, digit = chance.max(2)
    counts = torch.bincount(digit @ torch.tensor([100, 10, 1]), minlength=1000)
    return {
        "modes": int((counts > 0).sum()),
        "reverse_kl": metrics.reverse_kl(counts, torch.ones(1000)),
        "sure": float((top > 0.9).all(1).double().mean()),
    }


def _png(images: Float[Tensor, "n c h w"], low: float, high: float, columns: int) -> str:
    """Base64 of a small PNG sheet."""
    values = ((images.clamp(low, high) - low) / (high - low) * 255).round().byte()
    page = make_grid(values, nrow=columns, padding=1, pad_value=128)
    page = page[:1] if images.shape[1] == 1 else page
    return base64.b64encode(encode_png(page, 9).numpy().tobytes()).decode("ascii")


_MEASURES = {"ring": _plane, "grid": _plane, "mnist": _images, "digits": _images, "stacked": _stacked}
