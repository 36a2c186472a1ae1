"""The paper's claims C1–C10 as tests on records: a statistic, a threshold, a paired comparison over seeds, a verdict.

The tests were written down before the CIFAR records existed; those of MNIST were known. A test's number is taken once
for every seed, always from runs of that seed alone (paired: what is compared shares its initial weights' seed and its
data); over seeds its mean has a Student interval, and the test is shown only if the whole interval lies on the claimed
side of the threshold. The burden of proof is the claim's: what is neither shown nor refuted counts as not shown.

Used by book/verdict.md. Source of the claims: arXiv:2102.09235v2, Figs 2–16 and Tables 2–7.

| word | meaning |
|---|---|
| row | the numbers of one record that the tests read (`row`) |
| arm | the rows of one data set, K, normalisation and tier, all of one recipe; λ, network and seed vary |
| part | one test of a claim; a control is a test of ours that the verdict does not count |
"""

import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from geodesic import records, report

CONFIDENCE = 0.95
MIN_SEEDS = 3
VERDICTS = ("holds", "holds in part", "does not hold", "not run")
FOLDERS = ("mnist", "cifar-cpu", "cifar10-k1", "cifar10-k4", "cifar100-k1", "cifar100-k4")
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
NETWORKS = ("resnet", "plain")
_MAIN_NORM = {1: "none", 4: "batch", None: "main"}  # the arm that stands for the paper's networks, for each K
_LARGE = 0.1  # the λ past which the paper sees accuracy fall

# Thresholds.
FALL = math.log(1.05)  # C1: a score that falls by 5 %
LSS_ONE, OTS_ONE = 1.1, 0.95  # C2: "≈ 1"
USABLE = 0.02  # C2: test accuracy that a λ may cost and still be of use
DROP, RISE = math.log(1.25), 0.02  # C3: a sharp drop of LSS between neighbouring λ; accuracy that moves
RANK, OTS_ZERO = -0.5, 0.1  # C4
FITTED = 0.99  # C5: "near 100 %"
BARELY, QUICKLY = 0.1, 0.3  # C6: accuracy lost without an eighth of a layer's units
MOST, MORE = 0.5, 0.2  # C8: share of the last segment, and its rise over that at λ = 0
MIN_DECAYS = 3  # C10: λ that two settings must share before their best can be told apart

Row = dict[str, Any]
Cells = dict[float, dict[int, float]]  # λ → seed → value


@dataclass(frozen=True)
class Part:
    """One test: its number for every seed, and the side of the threshold on which the claim puts it."""

    what: str
    values: tuple[float, ...]
    side: str  # "above" or "below"
    threshold: float
    control: bool = False

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @cached_property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @cached_property
    def sd(self) -> float:
        """Sample standard deviation over seeds."""
        return statistics.stdev(self.values)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Student's interval of the mean at `CONFIDENCE`."""
        half = stats.t.ppf((1 + CONFIDENCE) / 2, self.n - 1) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    @property
    def outcome(self) -> str:
        """Shown, refuted, open (the interval holds the threshold) or not run (fewer than MIN_SEEDS seeds)."""
        if self.n < MIN_SEEDS:
            return "not run"
        low, high = self.interval
        if self.side == "below":
            low, high = 2 * self.threshold - high, 2 * self.threshold - low
        if low > self.threshold:
            return "shown"
        return "refuted" if high < self.threshold else "open"


class Arm(NamedTuple):
    """Rows that may be compared with each other."""

    dataset: str
    stages: int | None  # None: every K
    norm: str
    tier: str
    rows: tuple[Row, ...]

    def cells(self, network: str, value: str, *, untrained: bool = False, collapsed: bool = False) -> Cells:
        """λ → seed → value, of the λ that at least MIN_SEEDS seeds have; collapsed runs only where they are asked for.

        A network that learnt nothing has scores, but they mean nothing; its accuracy is a fact.
        """
        found: Cells = {}
        for row in self.rows:
            wanted = row["network"] == network and (row["epochs"] == 0) == untrained
            alive = row["status"] == "ok" or (collapsed and row["status"] == "collapsed")
            if wanted and alive and row[value] is not None:
                found.setdefault(row["weight_decay"], {})[row["seed"]] = row[value]
        return {decay: seeds for decay, seeds in sorted(found.items()) if len(seeds) >= MIN_SEEDS}


@dataclass(frozen=True)
class Claim:
    """What the paper says, where, and how it is tested."""

    name: str
    says: str
    where: str
    sets: tuple[tuple[str, int | None], ...]  # (data set, K); K = None compares both
    test: Callable[[Arm], list[Part]]
    paper: Callable[[str, int | None], str]  # the paper's number for a data set and K, in words


class Verdict(NamedTuple):
    """A claim, judged on one arm."""

    claim: Claim
    arm: Arm
    parts: tuple[Part, ...]

    @property
    def verdict(self) -> str:
        """One of VERDICTS."""
        counted = [part.outcome for part in self.parts if not part.control]
        if not counted or all(outcome == "not run" for outcome in counted):
            return "not run"
        shown = counted.count("shown")
        if shown == len(counted):
            return "holds"
        return "holds in part" if shown else "does not hold"


def rows(root: str | os.PathLike[str] = records.RESULTS, folders: Iterable[str] = FOLDERS) -> list[Row]:
    """The rows of every record in the folders that exist.

    Raises:
        ValueError: for a file that is not a whole record.
    """
    there = [Path(root) / folder for folder in folders if (Path(root) / folder).is_dir()]
    return [row(record) for folder in there for record in records.load(folder)]


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


def arms(found: Sequence[Row], claim: Claim) -> list[Arm]:
    """The arms of a claim that have rows; of several recipes in one arm, the one with most runs.

    Raises:
        ValueError: if the records of an arm come from different data.
    """
    made = []
    kept = [r for r in found if r["labels"] == "true" and r["network"] in NETWORKS]
    for dataset, stages in claim.sets:
        here = [r for r in kept if r["dataset"] == dataset and stages in (None, r["stages"])]
        if stages is None:
            here = [r | {"norm": "main"} for r in here if r["norm"] == _MAIN_NORM[r["stages"]]]
        # The full tier first, the paper's normalisation before the other.
        groups = {(r["tier"] != "full", r["norm"] != _MAIN_NORM[stages], r["norm"]) for r in here}
        for reduced, _, norm in sorted(groups):
            mine = [r for r in here if (r["tier"] != "full") == reduced and r["norm"] == norm]
            made.append(Arm(dataset, stages, norm, mine[0]["tier"], tuple(_one_recipe(mine))))
    return made


def judge(found: Sequence[Row], claim: Claim) -> list[Verdict]:
    """A verdict for every arm of the claim, and "not run" for every data set and K that has none.

    Arms of another normalisation than the main one are left out unless they can be judged.
    """
    have = [Verdict(claim, arm, tuple(claim.test(arm))) for arm in arms(found, claim)]
    have = [one for one in have if one.verdict != "not run" or one.arm.norm == _MAIN_NORM[one.arm.stages]]
    done = {(verdict.arm.dataset, verdict.arm.stages) for verdict in have}
    missing = [(dataset, stages) for dataset, stages in claim.sets if (dataset, stages) not in done]
    return have + [Verdict(claim, Arm(*one, _MAIN_NORM[one[1]], "full", ()), ()) for one in missing]


def _one_recipe(mine: list[Row]) -> list[Row]:
    """For each K the rows of its most common recipe; untrained networks belong to any."""
    kept: list[Row] = []
    for stages in sorted({r["stages"] for r in mine}):
        here = [r for r in mine if r["stages"] == stages]
        recipes = Counter(r["recipe"] for r in here if r["epochs"])
        best = max(recipes, key=lambda recipe: (recipes[recipe], recipe), default=None)
        kept += [r for r in here if r["recipe"] == best or not r["epochs"]]
    prints = {r["fingerprint"] for r in kept}
    if len(prints) > 1:
        first = kept[0]
        raise ValueError(
            f"{first['dataset']}, {first['tier']} tier: records of {len(prints)} different data sets "
            f"({', '.join(sorted(prints))}); delete those of the data that you do not mean, and run them again"
        )
    return kept


# -------------------------------------------------------------------------------------------------------------- words
def describe(arm: Arm) -> str:
    """The arm in words: data set, K, normalisation if it is not the main one, tier."""
    copy = " (JPEG copy)" if any(r["copy"] for r in arm.rows) else ""
    norm = "" if arm.norm == _MAIN_NORM[arm.stages] else f", {arm.norm} normalisation"
    return f"{NAMES[arm.dataset]}{copy}, K = {arm.stages or '1 and 4'}{norm}, {arm.tier} tier"


def not_run(verdicts: Iterable[Verdict]) -> str:
    """Which claims have no test on which data set and K, in one phrase."""
    missing: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.verdict == "not run":
            why = f", {verdict.arm.tier} tier: fewer than {MIN_SEEDS} seeds" if verdict.arm.rows else ""
            missing.setdefault(f"{_where(verdict.arm)}{why}", []).append(verdict.claim.name)
    return "; ".join(f"{where} ({', '.join(names)})" for where, names in missing.items()) or "nothing"


def table(verdicts: Iterable[Verdict], link: str = "#verdict-{}") -> str:
    """Markdown: claim with a link to its tests, where the paper shows it, its number, ours, verdict.

    A claim has a line for each arm, and one for all the data sets and K without records.
    """
    head = ("claim", "in the paper", "the paper's number", "ours, mean ± sd over seeds", "verdict")
    lines: dict[tuple[str, str | None], list[str]] = {}
    for verdict in verdicts:
        claim, arm, parts = verdict
        if (line := lines.get((claim.name, None))) and not arm.rows:
            line[3] += f"; {_where(arm)}"
            continue
        numbers = (f"{part.what}: {_number(part)}" for part in parts if not part.control and part.n >= MIN_SEEDS)
        where = describe(arm) if arm.rows else _where(arm)
        lines[claim.name, where if arm.rows else None] = [
            f"[{claim.name}]({link.format(claim.name.lower())}): {claim.says}",
            claim.where,
            claim.paper(arm.dataset, arm.stages),
            ". ".join((where, *filter(None, ["; ".join(numbers)]))),
            f"**{verdict.verdict}**",
        ]
    return _markdown(head, list(lines.values()))


def _where(arm: Arm) -> str:
    return f"{NAMES[arm.dataset]} with K = {arm.stages or '1 and 4'}"


def details(verdict: Verdict) -> str:
    """Markdown: the parts of a verdict, their numbers and outcomes."""
    head = ("test", "wanted", "mean ± sd over seeds", f"{CONFIDENCE:.0%} interval", "seeds", "outcome")
    lines = []
    for part in verdict.parts:
        side = {"above": ">", "below": "<"}[part.side]
        enough = part.n >= MIN_SEEDS
        interval = f"{part.interval[0]:.3g} … {part.interval[1]:.3g}" if enough else "–"
        what = f"{part.what} (control)" if part.control else part.what
        number = _number(part) if enough else "–"
        lines.append((what, f"{side} {part.threshold:.3g}", number, interval, str(part.n), part.outcome))
    if not verdict.arm.rows:
        return f"{_where(verdict.arm)}: **not run**\n"
    return f"{describe(verdict.arm)}: **{verdict.verdict}**\n\n{_markdown(head, lines)}"


def _number(part: Part) -> str:
    return f"{part.mean:.3g} ± {part.sd:.2g} (n = {part.n})"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)) + "\n"


# --------------------------------------------------------------------------------------------------------------- rows
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


# -------------------------------------------------------------------------------------------------------------- tests
def _common(*cells: dict[int, float]) -> list[int]:
    return sorted(set.intersection(*(set(one) for one in cells))) if cells else []


def _over_decays(cells: Cells) -> dict[int, float]:
    """Mean over λ for every seed that has them all."""
    return {seed: statistics.fmean(one[seed] for one in cells.values()) for seed in _common(*cells.values())}


def _difference(first: dict[int, float], second: dict[int, float]) -> tuple[float, ...]:
    return tuple(first[seed] - second[seed] for seed in _common(first, second))


def _paired(arm: Arm, value: str, **options: bool) -> tuple[float, ...]:
    """ResNet less plain network, mean over the λ that both have, for every seed."""
    resnet, plain = (arm.cells(network, value, **options) for network in NETWORKS)
    both = sorted(resnet.keys() & plain.keys())
    return _difference(_over_decays({d: resnet[d] for d in both}), _over_decays({d: plain[d] for d in both}))


def _best(cells: Cells, *, least: bool = False) -> float | None:
    """The λ of the largest (or least) mean over seeds."""
    if not cells:
        return None
    means = {decay: statistics.fmean(seeds.values()) for decay, seeds in cells.items()}
    return (min if least else max)(means, key=means.__getitem__)


def _at(cells: Cells, decay: float | None) -> tuple[float, ...]:
    return tuple(cells[decay].values()) if decay in cells else ()


def _c1(arm: Arm) -> list[Part]:
    parts = []
    for network in NETWORKS:
        falls = {d: seeds for d, seeds in arm.cells(network, "lss_fall").items() if d > 0}
        parts.append(Part(f"{network}: ln(LSS before / after training), λ > 0", tuple(_over_decays(falls).values()),
                          "above", FALL))  # fmt: skip
        scores = arm.cells(network, "lss")
        decayed = _over_decays({d: {s: math.log(v) for s, v in seeds.items()} for d, seeds in scores.items() if d > 0})
        free = {seed: math.log(value) for seed, value in scores.get(0.0, {}).items()}
        parts.append(Part(f"{network}: ln(LSS at λ = 0 / at λ > 0), trained", _difference(free, decayed), "above", 0.0,
                          control=True))  # fmt: skip
    return parts


def _c2(arm: Arm) -> list[Part]:
    lss, ots = arm.cells("resnet", "lss"), arm.cells("resnet", "ots")
    best = _best({decay: seeds for decay, seeds in lss.items() if decay > 0}, least=True)
    at = "" if best is None else f" at λ = {best:g}"
    before = arm.cells("resnet", "ots", untrained=True).get(0.0, {})
    accuracy = {d: statistics.fmean(seeds.values()) for d, seeds in arm.cells("resnet", "test_accuracy").items()}
    useful = [d for d, mean in accuracy.items() if d > 0 and mean >= max(accuracy.values()) - USABLE]
    modest = _best({decay: lss[decay] for decay in useful if decay in lss}, least=True)
    near = (
        "" if modest is None else f" at λ = {modest:g}, the straightest within {USABLE:.0%} of the best test accuracy"
    )
    return [
        Part(f"ResNet: LSS{at}", _at(lss, best), "below", LSS_ONE),
        Part(f"ResNet: OTS{at}", _at(ots, best), "above", OTS_ONE),
        Part(f"ResNet: OTS{at} less OTS untrained", _difference(ots.get(best, {}), before), "above", 0.0, control=True),
        Part(f"ResNet: LSS{near}", _at(lss, modest), "below", LSS_ONE, control=True),
    ]


def _c3(arm: Arm) -> list[Part]:
    parts = []
    for network in NETWORKS:
        lss = {d: seeds for d, seeds in arm.cells(network, "lss").items() if d <= _LARGE}
        drops = {
            (a, b): tuple(math.log(lss[a][seed] / lss[b][seed]) for seed in _common(lss[a], lss[b]))
            for a, b in zip(list(lss), list(lss)[1:], strict=False)
        }
        known = {step: values for step, values in drops.items() if values}
        step = max(known, key=lambda step: statistics.fmean(known[step]), default=None)
        at = f", λ = {step[0]:g} to {step[1]:g}" if step else ""
        parts.append(Part(f"{network}: largest fall of ln LSS{at}", known.get(step, ()), "above", DROP))
        for what in ("train", "test"):
            accuracy = arm.cells(network, f"{what}_accuracy", collapsed=True)
            rise = _difference(accuracy.get(step[1], {}), accuracy.get(step[0], {})) if step else ()
            parts.append(Part(f"{network}: rise of {what} accuracy{at}", rise, "above", RISE))
            beyond = [decay for decay in accuracy if decay > _LARGE]
            fall = _difference(accuracy.get(_LARGE, {}), accuracy[max(beyond)]) if beyond else ()
            parts.append(Part(f"{network}: fall of {what} accuracy past λ = {_LARGE:g}", fall, "above", RISE))
    return parts


def _c4(arm: Arm) -> list[Part]:
    ots, accuracy = arm.cells("resnet", "ots"), arm.cells("resnet", "train_accuracy")
    both = sorted(ots.keys() & accuracy.keys())
    ranks = tuple(
        _rank([ots[d][seed] for d in both], [accuracy[d][seed] for d in both])
        for seed in (_common(*(ots[d] for d in both)) if len(both) > 2 else [])
    )
    best = _best(accuracy)
    at = "" if best is None else f" at λ = {best:g}, where training accuracy is largest"
    return [
        Part("ResNet: rank correlation over λ of OTS with training accuracy", ranks, "below", RANK),
        Part(f"ResNet: OTS{at}", _at(ots, best), "below", OTS_ZERO),
    ]


def _rank(first: list[float], second: list[float]) -> float:
    """Spearman's ρ; 0 where one of them does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def _c5(arm: Arm) -> list[Part]:
    fitted = []
    for network in NETWORKS:
        accuracy = arm.cells(network, "train_accuracy")
        best = _best(accuracy)
        at = "" if best is None else f" at λ = {best:g}"
        fitted.append(Part(f"{network}: largest training accuracy{at}", _at(accuracy, best), "above", FITTED))
    return [
        *fitted,
        Part("LSS, ResNet − plain", _paired(arm, "lss"), "below", 0.0),
        Part("OTS, ResNet − plain", _paired(arm, "ots"), "above", 0.0),
        Part("test accuracy, ResNet − plain", _paired(arm, "test_accuracy"), "above", 0.0),
    ]


def _c6(arm: Arm) -> list[Part]:
    lost = {network: tuple(_over_decays(arm.cells(network, "state_lost")).values()) for network in NETWORKS}
    branch = tuple(_over_decays(arm.cells("resnet", "branch_lost")).values())
    what = "share of the accuracy lost without a layer's top eighth"
    return [
        Part(f"ResNet: {what}", lost["resnet"], "below", BARELY),
        Part(f"plain: {what}", lost["plain"], "above", QUICKLY),
        Part(f"{what}, ResNet − plain", _paired(arm, "state_lost"), "below", 0.0),
        Part("ResNet: the same, removed from the block's branch alone", branch, "below", BARELY, control=True),
    ]


def _c7(arm: Arm) -> list[Part]:
    return [
        Part("share of the accuracy kept under noise, ResNet − plain", _paired(arm, "noise_kept"), "above", 0.0),
        Part("the same under FGSM", _paired(arm, "fgsm_kept"), "above", 0.0),
        Part("ln variation rate under noise, ResNet − plain", _paired(arm, "variation"), "below", 0.0),
        Part("share of the accuracy kept under PGD, ResNet − plain", _paired(arm, "pgd_kept"), "above", 0.0,
             control=True),
    ]  # fmt: skip


def _c8(arm: Arm) -> list[Part]:
    shares = arm.cells("plain", "last_share")
    large = max((decay for decay in shares if decay > 0), default=None)
    at = "" if large is None else f" at λ = {large:g}"
    rise = _difference(shares.get(large, {}), shares.get(0.0, {}))
    return [
        Part(f"plain: share of the last segment{at}", _at(shares, large), "above", MOST),
        Part(f"plain: the same less that at λ = 0{at}", rise, "above", MORE),
    ]


def _c9(arm: Arm) -> list[Part]:
    parts = []
    for network in NETWORKS:
        ratios = arm.cells(network, "plane_lsr")
        large = max((decay for decay in ratios if decay > 0), default=None)
        at = "" if large is None else f" at λ = {large:g}"
        logs = {decay: {seed: math.log(value) for seed, value in seeds.items()} for decay, seeds in ratios.items()}
        fall = _difference(logs.get(0.0, {}), logs.get(large, {}))
        parts.append(Part(f"{network}: ln(length/chord in the plane at λ = 0 / the same{at})", fall, "above", FALL))
    return parts


def _c10(arm: Arm) -> list[Part]:
    """What a seed loses by the other's best λ; the best λ are those of the means over seeds."""
    tables = {(stages, network): Arm(*arm[:4], tuple(r for r in arm.rows if r["stages"] == stages)).cells(
        network, "test_accuracy", collapsed=True) for stages in (1, 4) for network in NETWORKS}  # fmt: skip
    pairs = [((k, "resnet"), (k, "plain")) for k in (1, 4)] + [((1, network), (4, network)) for network in NETWORKS]
    parts = []
    for first, second in pairs:
        common = sorted(tables[first].keys() & tables[second].keys())
        for mine, other in ((first, second), (second, first)):
            cells = {decay: tables[mine][decay] for decay in common}
            best, theirs = _best(cells), _best({decay: tables[other][decay] for decay in common})
            enough = len(common) >= MIN_DECAYS
            loss = _difference(cells[best], cells[theirs]) if enough else ()
            at = f" ({theirs:g} for {best:g})" if enough else ""
            who = [f"{network}, K = {stages}" for stages, network in (mine, other)]
            parts.append(Part(f"{who[0]}: accuracy lost with the best λ of {who[1]}{at}", loss, "above", 0.0))
    return parts


# ----------------------------------------------------------------------------------------------------- paper's numbers
def _paper(*names: str, networks: Sequence[str] = NETWORKS) -> Callable[[str, int | None], str]:
    """The range over λ of the paper's own numbers, from its tables."""

    def text(dataset: str, stages: int | None) -> str:
        words = []
        for network in networks:
            tables = report.paper_values().get((dataset, stages or 1, network), {})
            for name in names:
                values = [summary.mean for summary in tables.get(name, {}).values()]
                if values:
                    words.append(f"{network}, {_LABELS[name]}: {min(values):.3g} … {max(values):.3g}")
        return "; ".join(words) or "not in our text"

    return text


def _words(text: str) -> Callable[[str, int | None], str]:
    return lambda dataset, stages: text


_LABELS = {
    "lss_mean": "LSS",
    "ots_share": "OTS",
    "train_accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
    "segment_share_10": "last segment's share",
}
_MNIST = (("mnist", 1),)
_K1, _K4 = (("cifar10", 1), ("cifar100", 1)), (("cifar10", 4), ("cifar100", 4))
_BOTH = (("cifar10", None), ("cifar100", None))

CLAIMS = (
    Claim("C1", "LSS falls during training under weight decay, for both architectures", "Fig. 2",
          _MNIST + _K1 + _K4, _c1, lambda dataset, stages: "a curve" if (dataset, stages) not in _K1
          else "at the end about 6.1 (plain) and 2.2 (resnet)"),
    Claim("C2", "the ResNet reaches LSS ≈ 1 and OTS ≈ 1 at a suitable λ", "Fig. 3", _MNIST, _c2,
          _words("LSS ≈ 1, OTS ≈ 1")),
    Claim("C3", "past a threshold in λ LSS drops sharply and accuracies rise together; past λ = 0.1 both fall",
          "Fig. 4, Tables 4–5", _K1, _c3, _paper("lss_mean", "train_accuracy", "test_accuracy")),
    Claim("C4", "the ResNet's OTS falls towards 0 as its training accuracy rises", "Tables 4–5", _K1, _c4,
          _paper("ots_share", "train_accuracy", networks=("resnet",))),
    Claim("C5", "training accuracy near 100 % for both; the ResNet's scores are closer to 1 and its test accuracy is "
          "higher", "Figs 5–6, Tables 6–7", _K4, _c5, _paper("lss_mean", "ots_share", "test_accuracy")),
    Claim("C6", "without a layer's most important units the ResNet loses little and the plain network much", "Fig. 7",
          _K1 + _K4, _c6, _words("curves")),
    Claim("C7", "under noise and FGSM the ResNet's accuracy falls more slowly, and its states vary less", "Fig. 8",
          _K1 + _K4, _c7, _words("curves")),
    Claim("C8", "at large λ the plain network puts most of its length into the last segment", "Tables 2–3", _K1, _c8,
          _paper("segment_share_10", networks=("plain",))),
    Claim("C9", "tracks drawn in a plane are straighter at large λ than at small λ", "Figs 9–16",
          _MNIST + _K1 + _K4, _c9, _words("pictures")),
    Claim("C10", "the best λ differs between K = 1 and K = 4, and between the architectures", "Tables 4–7", _BOTH,
          _c10, _words("by its tables")),
)  # fmt: skip
