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
    records.RESULTS / "cifar-cpu",
    records.RESULTS / "cifar10-k1",
    records.RESULTS / "cifar10-k4",
    records.RESULTS / "cifar100-k1",
    records.RESULTS / "cifar100-k4",
)

Row = dict[str, Any]


def rows(folders: Iterable[Path] = FOLDERS) -> list[Row]:
    """The rows of every record in the folders that exist.

    Raises:
        ValueError: for a record that `records.load` refuses.
    """
    return [row(record) for folder in folders if folder.is_dir() for record in records.load(folder)]


def row(record: records.Record) -> Row:
    """What the tests read of a record; None where it was not measured. Scores are means over stages, on test points."""
    settings, final = record["settings"], record["final"]
    keys = ("network", "weight_decay", "seed", "stages", "norm", "labels", "epochs")
    found: Row = {key: settings[key] for key in keys}
    found["dataset"] = settings["dataset"].removeprefix("folder:")
    found["copy"] = settings["dataset"].startswith("folder:")
    reduced = any(settings[key] is not None for key in ("width", "depth", "n_train"))
    found["tier"] = "CPU" if reduced else "full"
    varying = (*keys, "dataset", "learning_rate", "ots_points", "eval_points", "plane_points")
    found["recipe"] = repr(sorted((key, value) for key, value in settings.items() if key not in varying))
    found["recipe"] += f" epochs={settings['epochs']} learning_rate={settings['learning_rate']:g}"
    found["status"] = record["status"]
    found["fingerprint"] = record["provenance"]["data_fingerprint"]
    return found | _scores(record["epochs"], final) | _answers(final) | {"plane_lsr": _plane_lsr(record["plane"])}


def _scores(epochs: Sequence[dict[str, Any]], final: dict[str, Any] | None) -> Row:
    """Accuracies, LSS, OTS and the last segment's share; the logarithm of the fall of LSS during training."""
    first, last = (_mean(stage["lss_mean"] for stage in epochs[k]["train"]["stages"]) for k in (0, -1))
    test = final["test"]["stages"] if final else []
    return {
        "train_accuracy": final["train"]["accuracy"] if final else None,
        "test_accuracy": final["test"]["accuracy"] if final else None,
        "lss_fall": math.log(first / last) if first and last else None,
        "lss": _mean(stage["lss_mean"] for stage in test),
        "ots": _mean(stage["ots"][-1]["share"] if stage["ots"] else None for stage in test),
        "last_share": _mean(stage["segment_shares"] and stage["segment_shares"][-1] for stage in test),
    }


def _answers(final: dict[str, Any] | None) -> Row:
    """Accuracy kept under disturbances and without units, as a share of the clean one; the variation rate."""
    found: Row = dict.fromkeys(("noise_kept", "fgsm_kept", "pgd_kept", "variation", "state_lost", "branch_lost"))
    answer = final["test"].get("robustness") if final else None
    if not answer or not answer["clean"]:
        return found
    clean = answer["clean"]
    for name in ("noise", "fgsm"):
        found[f"{name}_kept"] = _mean(accuracy / clean for accuracy in answer[name]["accuracy"])
    found["pgd_kept"] = answer["pgd"]["accuracy"] / clean
    rates = [rate for size in answer["noise"]["variation"] for stage in size for rate in stage[1:]]
    found["variation"] = _mean(math.log(rate) if rate else None for rate in rates)
    removed = answer["elimination"]
    eighth = removed["shares"].index(1 / 8)
    for name in ("state", "branch"):
        if removed[name]:
            found[f"{name}_lost"] = _mean(1 - layer[eighth] / clean for layer in removed[name])
    return found


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
