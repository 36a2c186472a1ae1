"""What the tests of the paper's claims read of a record: one flat row of numbers each.

Used by book/verdict.md, through `judge` and `claims`, which judge the rows.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geodesic import records

FOLDERS = (
    records.RESULTS / "mnist",
    records.RESULTS / "cifar10-k1",
    records.RESULTS / "cifar10-k4",
    records.RESULTS / "cifar100-k1",
    records.RESULTS / "cifar100-k4",
)
CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100}
OTS_POINTS = 4000  # OTS is read at the largest n up to this, the largest at which the other metric is scored too
QUARTER, EIGHTH = 1 / 4, 1 / 8  # shares of a layer's units that are eliminated
_NOT_TRAINING = ("eval_points", "ots_points", "plane_points")  # settings that change what is measured, not the network
_VARYING = ("network", "weight_decay", "seed", "labels", "dataset", "stages")

Row = dict[str, Any]


def rows(folders: Iterable[Path] = FOLDERS) -> list[Row]:
    """The rows of every record in the folders that exist.

    Raises:
        ValueError: for a record that `records.load` refuses.
    """
    return [row(record) for folder in folders if folder.is_dir() for record in records.load(folder)]


def row(record: records.Record) -> Row:
    """What the tests read of a record; None where it was not measured. Scores are means over stages, on test points.

    `recipe` holds every setting but λ, network, seed, labels, data and K, and those that only say what is measured.
    """
    settings, final = record["settings"], record["final"]
    found: Row = {key: settings[key] for key in _VARYING}
    found["dataset"] = settings["dataset"].removeprefix("folder:")
    recipe = {"decay": "weights"} | {k: v for k, v in settings.items() if k not in (*_VARYING, *_NOT_TRAINING)}
    found["recipe"] = recipe
    found["status"] = record["status"]
    found["fingerprint"] = record["provenance"]["data_fingerprint"]
    chance = 1 / CLASSES.get(found["dataset"], 10)
    return (
        found
        | _accuracies(record["epochs"], final)
        | _scores(record["epochs"], final)
        | _answers(final, chance)
        | {"plane_lsr": _plane_lsr(record.get("plane"))}
    )


def _accuracies(epochs: Sequence[dict[str, Any]], final: dict[str, Any] | None) -> Row:
    """`running`: accuracy while training, over the last epoch's batches; train_accuracy: the trained network's."""
    return {
        "running": epochs[-1].get("running", {}).get("accuracy") if epochs else None,
        "train_accuracy": final["train"]["accuracy"] if final else None,
        "train_loss": final["train"]["loss"] if final else None,
        "test_accuracy": final["test"]["accuracy"] if final else None,
    }


def _scores(epochs: Sequence[dict[str, Any]], final: dict[str, Any] | None) -> Row:
    """Line-shape scores raw and, of a plain network, in fixed gauges; OTS in two metrics; curl shares."""
    first, last = (_mean(stage["lss_mean"] for stage in epochs[k]["train"]["stages"]) for k in (0, -1))
    test = final["test"]["stages"] if final else []
    found: Row = {
        "lss_fall": math.log(first / last) if first and last else None,
        "lss": _mean(stage["lss_mean"] for stage in test),
        "lsr": _mean(stage["lsr_median"] for stage in test),
        "lss_first": test[0]["lss_mean"] if test else None,
        "lss_last": test[-1]["lss_mean"] if test else None,
        "last_share": _mean(_last(stage["segment_shares"]) for stage in test),
        "ots": _mean(_share(stage.get("ots")) for stage in test),
        "ots_unit": _mean(_share(stage.get("ots_unit")) for stage in test),
        "growth": _mean(stage.get("growth") for stage in test),
    }
    for gauge in ("norm1", "permuted"):
        seen = [(stage.get("aligned") or {}).get(gauge) for stage in test]
        found[f"lss_{gauge}"] = _mean(one and one["lss_mean"] for one in seen)
    found["lsr_permuted"] = _mean(one and one["lsr_median"] for one in seen)
    found["last_share_permuted"] = _mean(one and _last(one["segment_shares"]) for one in seen)
    for name, at in (("first", 0), ("last", -1)):
        found[f"lss_{name}_permuted"] = seen[at]["lss_mean"] if seen and seen[at] else None
    matched = [(stage.get("aligned") or {}).get("ots") for stage in test]
    found["ots_permuted"] = _mean(one and one["share"] for one in matched)
    for space in ("span", "isotropic"):
        curls = [((stage.get("curl") or {}).get("map") or {}).get(space) for stage in test]
        found[f"curl_{space}"] = _mean(one and one["share"] for one in curls)
        found[f"curl_{space}_trace_free"] = _mean(one and one["trace_free_share"] for one in curls)
        found[f"curl_{space}_size"] = _mean(one and one["size"] for one in curls)
    return found


def _answers(final: dict[str, Any] | None, chance: float) -> Row:
    """Accuracy kept under disturbances, above chance; accuracy lost without units; the variation rate."""
    found: Row = dict.fromkeys(
        ("noise_kept", "fgsm_kept", "pgd_kept", "variation", "copied_lost", "copied_lost_eighth", "aligned_lost",
         "zeroed_lost", "state_lost", "branch_lost")
    )  # fmt: skip
    answer = final["test"].get("robustness") if final else None
    if not answer or not answer["clean"]:
        return found
    clean = answer["clean"]
    if clean > chance:
        for name in ("noise", "fgsm"):
            found[f"{name}_kept"] = _mean((one - chance) / (clean - chance) for one in answer[name]["accuracy"])
        found["pgd_kept"] = (answer["pgd"]["accuracy"] - chance) / (clean - chance)
    rates = [rate for size in answer["noise"]["variation"] for stage in size for rate in stage[1:]]
    found["variation"] = _mean(math.log(rate) if rate else None for rate in rates)
    removed = answer["elimination"]
    quarter, eighth = (removed["shares"].index(share) for share in (QUARTER, EIGHTH))

    def lost(name: str, at: int) -> float | None:
        return _mean(1 - layer[at] / clean for layer in removed[name]) if removed.get(name) else None

    for name in ("copied", "aligned", "zeroed", "state", "branch"):
        found[f"{name}_lost"] = lost(name, quarter)
    found["copied_lost_eighth"] = lost("copied", eighth)
    return found


def _share(scores: Sequence[dict[str, Any]] | None) -> float | None:
    """OTS on the most points up to OTS_POINTS."""
    small = [one for one in scores or () if one["n"] <= OTS_POINTS]
    return max(small, key=lambda one: one["n"])["share"] if small else None


def _last(values: Sequence[float] | None) -> float | None:
    return values[-1] if values else None


def _plane_lsr(plane: dict[str, Any] | None) -> float | None:
    """Median over the drawn points of length over chord in the plane, after the last epoch; mean over stages."""
    if not plane:
        return None
    medians = []
    for stage in plane["stages"]:
        path = np.array(stage["tracks"][-1])  # (steps, points, 2)
        length = np.linalg.norm(np.diff(path, axis=0), axis=-1).sum(0)
        chord = np.linalg.norm(path[-1] - path[0], axis=-1)
        if (moving := chord > 0).any():
            medians.append(float(np.median(length[moving] / chord[moving])))
    return _mean(medians)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
