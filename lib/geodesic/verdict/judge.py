"""From rows to a verdict: tests with an interval over seeds, arms of runs that may be compared, Holm's correction.

A test's number is taken once for every seed, always from runs of that seed alone (paired: what is compared shares its
initial weights' seed and its data). Over seeds its mean has a Student interval and a two-sided p-value against the
threshold; the p-values of all tests that count are corrected together, by Holm's method. A test is shown or refuted
only if its corrected p-value is below 1 − CONFIDENCE. What could not be tested never counts against a claim.

Used by book/verdict.md; which tests a claim has is said in `claims`. Source of the correction: Holm 1979.

| word | meaning |
|---|---|
| row | the numbers of one record that the tests read (`evidence.row`) |
| arm | the rows of one data set and K that agree in everything but λ, network and seed, with their controls |
| rival | a row like those of the arm, with λ = 0 and another step size |
| part | one test of a claim; a control is a test of ours that the verdict does not count |
| regime | what a claim presupposes: outside it a part is not tested |
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from scipy import stats

from geodesic.verdict.evidence import Row

CONFIDENCE = 0.95
MIN_SEEDS = 3
OUTCOMES = ("shown", "mixed", "refuted", "undecided", "not tested")
NAMES = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
NETWORKS = ("resnet", "plain")

Cells = dict[float, dict[int, float]]  # λ → seed → value


@dataclass(frozen=True)
class Part:
    """One test: its number for every seed, and the side of the threshold on which the claim puts it."""

    what: str
    values: tuple[float, ...]
    side: str  # "above" or "below"
    threshold: float
    control: bool = False
    outside: str = ""  # why the runs are outside the claim's regime; empty if they are not
    adjusted: float | None = None  # Holm's p-value, once all parts of the table are known

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def tested(self) -> bool:
        """Enough seeds, and inside the claim's regime."""
        return self.n >= MIN_SEEDS and not self.outside

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
        """Student's interval of the mean at `CONFIDENCE`, not corrected."""
        half = stats.t.ppf((1 + CONFIDENCE) / 2, self.n - 1) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    @cached_property
    def p(self) -> float:
        """Two-sided p-value of Student's test of the mean against the threshold."""
        gap = abs(self.mean - self.threshold)
        if self.sd == 0:
            return 1.0 if gap == 0 else 0.0
        return float(2 * stats.t.sf(gap / self.sd * math.sqrt(self.n), self.n - 1))

    @property
    def alone(self) -> str:
        """The outcome of this test by itself, without the correction."""
        return self._outcome(self.p) if self.tested else "not tested"

    @property
    def outcome(self) -> str:
        """Shown, refuted, undecided (the corrected interval holds the threshold) or not tested."""
        if not self.tested:
            return "not tested"
        return self._outcome(self.p if self.adjusted is None else self.adjusted)

    def _outcome(self, p: float) -> str:
        if p >= 1 - CONFIDENCE:
            return "undecided"
        return "shown" if (self.mean > self.threshold) == (self.side == "above") else "refuted"

    @property
    def why(self) -> str:
        """Why the part was not tested; empty if it was."""
        if self.outside:
            return self.outside
        return "" if self.tested else "no runs" if not self.n else f"{self.n} of {MIN_SEEDS} seeds"


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order of the given ones: max over the j-th least up to this of (m − j + 1) p_j.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    order = sorted(range(len(p)), key=p.__getitem__)
    found, largest = [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[at]))
        found[at] = largest
    return found


@dataclass(frozen=True)
class Arm:
    """Rows that may be compared with each other, and those that stand beside them."""

    dataset: str
    stages: int | None  # None: every K
    recipe: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    rows: tuple[Row, ...] = ()
    rivals: tuple[Row, ...] = ()
    untrained: tuple[Row, ...] = ()
    shuffled: tuple[Row, ...] = ()

    def cells(
        self,
        network: str,
        value: str,
        *,
        rows: Iterable[Row] | None = None,
        collapsed: bool = False,
        seeds: int = MIN_SEEDS,
    ) -> Cells:
        """λ → seed → value, of the λ that so many seeds have; collapsed runs only where they are asked for.

        A network that learnt nothing has scores, but they mean nothing; its accuracy is a fact.
        """
        found: Cells = {}
        for row in self.rows if rows is None else rows:
            alive = row["status"] == "ok" or (collapsed and row["status"] == "collapsed")
            if row["network"] == network and alive and row[value] is not None:
                found.setdefault(row["weight_decay"], {})[row["seed"]] = row[value]
        return {decay: values for decay, values in sorted(found.items()) if len(values) >= seeds}

    def before(self, network: str, value: str) -> dict[int, float]:
        """Seed → value of the untrained networks."""
        return {r["seed"]: r[value] for r in self.untrained if r["network"] == network and r[value] is not None}

    def steps(self, network: str, value: str) -> Cells:
        """Step size → seed → value at λ = 0, of the arm itself and its rivals."""
        found: Cells = {}
        free = [row for row in self.rows if row["weight_decay"] == 0]
        for step in sorted({row["recipe"]["learning_rate"] for row in (*free, *self.rivals)}):
            same = [row for row in (*free, *self.rivals) if row["recipe"]["learning_rate"] == step]
            if cells := self.cells(network, value, rows=same, collapsed=True):
                found[step] = cells[0.0]
        return found


@dataclass(frozen=True)
class Claim:
    """What the paper says, where, and how it is tested."""

    name: str
    says: str
    where: str
    sets: tuple[tuple[str, int | None], ...]  # (data set, K); K = None compares both
    test: Callable[[Arm], list[Part]]
    paper: Callable[[str, int | None], str]  # the paper's number for a data set and K, in words
    ours: Callable[[Arm], str] = lambda arm: ""  # the same numbers of an arm


class Verdict(NamedTuple):
    """A claim, judged on one arm."""

    claim: Claim
    arm: Arm
    parts: tuple[Part, ...]

    @property
    def counted(self) -> tuple[Part, ...]:
        """The parts that the verdict counts."""
        return tuple(part for part in self.parts if not part.control)

    @property
    def verdict(self) -> str:
        """One of OUTCOMES."""
        return combine(part.outcome for part in self.counted)

    @property
    def alone(self) -> str:
        """The verdict without the correction for the number of tests."""
        return combine(part.alone for part in self.counted)


def combine(outcomes: Iterable[str]) -> str:
    """The verdict on a claim from the outcomes of its parts.

    Shown if every part is; mixed if some are shown and some refuted; refuted if some are refuted and none is shown; not
    tested if none was; else undecided.
    """
    found = set(outcomes)
    if found <= {"not tested"}:
        return "not tested"
    if found == {"shown"}:
        return "shown"
    if "refuted" in found:
        return "mixed" if "shown" in found else "refuted"
    return "undecided"


def judge(found: Sequence[Row], claims: Sequence[Claim]) -> list[Verdict]:
    """The whole table: a verdict for every arm of every claim, corrected together by Holm's method.

    A data set and K without an arm has one verdict, on an arm without rows: not tested.

    Raises:
        ValueError: if the records of an arm come from different data.
    """
    made = arms(found)
    table = []
    for claim in claims:
        for dataset, stages in claim.sets:
            here = [arm for arm in made if (arm.dataset, arm.stages) == (dataset, stages)]
            for arm in here or [Arm(dataset, stages)]:
                table.append(Verdict(claim, arm, tuple(claim.test(arm))))
    return _corrected(table)


def _corrected(table: Sequence[Verdict]) -> list[Verdict]:
    places = [
        (i, j)
        for i, verdict in enumerate(table)
        for j, part in enumerate(verdict.parts)
        if part.tested and not part.control
    ]
    adjusted = dict(zip(places, holm([table[i].parts[j].p for i, j in places]), strict=True))
    return [
        verdict._replace(
            parts=tuple(
                replace(part, adjusted=adjusted[i, j]) if (i, j) in adjusted else part
                for j, part in enumerate(verdict.parts)
            )
        )
        for i, verdict in enumerate(table)
    ]


# --------------------------------------------------------------------------------------------------------------- arms
def arms(found: Sequence[Row], seeds: int = MIN_SEEDS) -> list[Arm]:
    """Every arm in which some λ and network has so many seeds, by default enough for a test. Those that compare K last.

    Rows with λ = 0 alone are rivals of the arms from which only their step size differs, and no arm of their own where
    there are such. At λ = 0 it does not matter what λ acts on: an arm that lacks such rows takes its sibling's.

    Raises:
        ValueError: if the records of an arm come from different data.
    """
    kept = [row for row in found if row["network"] in NETWORKS]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in kept:
        if row["labels"] == "true" and row["recipe"]["epochs"]:
            groups.setdefault((row["dataset"], row["stages"], _frozen(row["recipe"])), []).append(row)
    made = []
    for (dataset, stages, recipe), mine in groups.items():
        free = {row["weight_decay"] for row in mine} == {0.0}
        others = [
            (theirs, rows)
            for (other, k, theirs), rows in groups.items()
            if (other, k) == (dataset, stages) and theirs != recipe and _same(theirs, recipe, _STEP)
        ]
        if free and any({row["weight_decay"] for row in rows} != {0.0} for _, rows in others):
            continue
        idle = [(theirs, row) for theirs, rows in others for row in rows if row["weight_decay"] == 0]
        have = {(row["network"], row["seed"]) for row in mine if row["weight_decay"] == 0}
        mine = mine + [
            row
            for theirs, row in idle
            if _same(theirs, recipe, ("decay",)) and (row["network"], row["seed"]) not in have
        ]
        near = [row for row in kept if (row["dataset"], row["stages"]) == (dataset, stages)]
        recipe = mine[0]["recipe"]
        built = ("norm", "depth", "width", "n_train")
        arm = Arm(
            dataset,
            stages,
            recipe,
            rows=tuple(mine),
            rivals=tuple(row for theirs, row in idle if dict(theirs)["learning_rate"] != recipe["learning_rate"]),
            untrained=tuple(
                row
                for row in near
                if row["labels"] == "true" and not row["recipe"]["epochs"] and _alike(row["recipe"], recipe, built)
            ),
            shuffled=tuple(
                row
                for row in near
                if row["labels"] == "shuffled" and row["recipe"]["epochs"] and _alike(row["recipe"], recipe, built)
            ),
        )
        if any(arm.cells(network, "test_accuracy", collapsed=True, seeds=seeds) for network in NETWORKS):
            _one_source(arm)
            made.append(arm)
    made.sort(key=_order)
    return [*_named(made), *_across(made)]


_STEP = ("learning_rate", "decay")  # settings in which the rows at λ = 0 that stand beside an arm may differ


def _across(made: Sequence[Arm]) -> list[Arm]:
    """For every data set and normalisation the largest arm of each K, as one arm that compares K."""
    largest: dict[tuple[str, str], dict[int, Arm]] = {}
    for arm in made:
        ks = largest.setdefault((arm.dataset, arm.recipe["norm"]), {})
        if arm.stages not in ks or len(arm.rows) > len(ks[arm.stages].rows):
            ks[arm.stages] = arm
    return [
        Arm(dataset, None, {"norm": norm}, _NORMS.get(norm, norm), tuple(r for arm in ks.values() for r in arm.rows))
        for (dataset, norm), ks in largest.items()
        if len(ks) > 1
    ]  # fmt: skip


def _one_source(arm: Arm) -> None:
    prints = {row["fingerprint"] for row in arm.rows}
    if len(prints) > 1:
        raise ValueError(
            f"{arm.dataset}, K = {arm.stages}: records of {len(prints)} different data sets "
            f"({', '.join(sorted(prints))}); delete those of the data that you do not mean, and run them again"
        )


def _frozen(recipe: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, tuple(v) if isinstance(v, list) else v) for key, v in recipe.items()))


def _same(first: tuple[Any, ...], second: tuple[Any, ...], but: Sequence[str]) -> bool:
    return [pair for pair in first if pair[0] not in but] == [pair for pair in second if pair[0] not in but]


def _alike(first: dict[str, Any], second: dict[str, Any], keys: Sequence[str]) -> bool:
    return all(first.get(key) == second.get(key) for key in keys)


def _order(arm: Arm) -> tuple[Any, ...]:
    """MNIST first, small K first; batch normalisation, which the paper's numbers fit best, before none."""
    recipe = arm.recipe
    return (
        list(NAMES).index(arm.dataset) if arm.dataset in NAMES else len(NAMES),
        arm.stages,
        recipe["norm"] != "batch",
        recipe["decay"] != "weights",
        recipe["schedule"],
        -len(arm.rows),
        repr(_frozen(recipe)),
    )


# -------------------------------------------------------------------------------------------------------------- words
_NORMS = {"none": "no normalisation", "batch": "batch normalisation", "layer": "layer normalisation"}
_SCHEDULES = {"onecycle": "one cycle to {:g}", "cosine": "cosine from {:g}", "constant": "constant step {:g}"}


def _named(made: Sequence[Arm]) -> list[Arm]:
    """With names that tell the arms of a data set and K apart."""
    names = []
    for arm in made:
        recipe = arm.recipe
        words = [
            _NORMS.get(recipe["norm"], f"{recipe['norm']} normalisation"),
            _SCHEDULES[recipe["schedule"]].format(recipe["learning_rate"]),
            f"{recipe['epochs']} epochs",
        ]
        words += ["every parameter decayed"] * (recipe["decay"] == "all")
        words += [f"{key} {recipe[key]}" for key in ("depth", "width", "n_train") if recipe.get(key) is not None]
        names.append(", ".join(words))
    told = []
    for arm, name in zip(made, names, strict=True):
        twins = [
            other
            for other, theirs in zip(made, names, strict=True)
            if theirs == name and (other.dataset, other.stages) == (arm.dataset, arm.stages)
        ]
        differing = [key for key in arm.recipe if len({repr(other.recipe.get(key)) for other in twins}) > 1]
        told.append(", ".join([name, *(f"{key} {arm.recipe[key]}" for key in differing)]))
    return [replace(arm, name=name) for arm, name in zip(made, told, strict=True)]
