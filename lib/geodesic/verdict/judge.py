"""From rows to a verdict: tests with an interval over seeds, arms of runs that may be compared, and tables in words.

A test's number is taken once for every seed, always from runs of that seed alone (paired: what is compared shares its
initial weights' seed and its data); over seeds its mean has a Student interval, and the test is shown only if the whole
interval lies on the claimed side of the threshold. The burden of proof is the claim's: what is neither shown nor
refuted counts as not shown.

Used by book/verdict.md; which tests a claim has is said in `claims`.

| word | meaning |
|---|---|
| row | the numbers of one record that the tests read (`evidence.row`) |
| arm | the rows of one data set, K, normalisation and tier, all of one recipe; λ, network and seed vary |
| part | one test of a claim; a control is a test of ours that the verdict does not count |
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from scipy import stats

from geodesic.verdict.evidence import Row

CONFIDENCE = 0.95
MIN_SEEDS = 3
VERDICTS = ("holds", "holds in part", "does not hold", "not run")
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
NETWORKS = ("resnet", "plain")
MAIN_NORM = {1: "none", 4: "batch", None: "main"}  # the arm that stands for the paper's networks, for each K

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
            here = [r | {"norm": "main"} for r in here if r["norm"] == MAIN_NORM[r["stages"]]]
        # The full tier first, the paper's normalisation before the other.
        groups = {(r["tier"] != "full", r["norm"] != MAIN_NORM[stages], r["norm"]) for r in here}
        for reduced, _, norm in sorted(groups):
            mine = [r for r in here if (r["tier"] != "full") == reduced and r["norm"] == norm]
            made.append(Arm(dataset, stages, norm, mine[0]["tier"], tuple(_one_recipe(mine))))
    return made


def judge(found: Sequence[Row], claim: Claim) -> list[Verdict]:
    """A verdict for every arm of the claim, and "not run" for every data set and K that has none.

    Arms of another normalisation than the main one are left out unless they can be judged.
    """
    have = [Verdict(claim, arm, tuple(claim.test(arm))) for arm in arms(found, claim)]
    have = [one for one in have if one.verdict != "not run" or one.arm.norm == MAIN_NORM[one.arm.stages]]
    done = {(verdict.arm.dataset, verdict.arm.stages) for verdict in have}
    missing = [(dataset, stages) for dataset, stages in claim.sets if (dataset, stages) not in done]
    return have + [Verdict(claim, Arm(*one, MAIN_NORM[one[1]], "full", ()), ()) for one in missing]


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
    norm = "" if arm.norm == MAIN_NORM[arm.stages] else f", {arm.norm} normalisation"
    return f"{NAMES[arm.dataset]}{copy}, K = {arm.stages or '1 and 4'}{norm}, {arm.tier} tier"


def not_run(verdicts: Iterable[Verdict]) -> str:
    """Which claims have no test on which data set and K, in one phrase."""
    missing: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.verdict == "not run":
            why = f", {verdict.arm.tier} tier: fewer than {MIN_SEEDS} seeds" if verdict.arm.rows else ""
            missing.setdefault(f"{_where(verdict.arm)}{why}", []).append(verdict.claim.name)
    return "; ".join(f"{where} ({', '.join(names)})" for where, names in missing.items()) or "nothing"


def overview(verdicts: Sequence[Verdict], link: str = "#verdict-{}") -> str:
    """Markdown: a line for each claim, a column for each arm that has records; empty where the claim says nothing."""
    arms = list(dict.fromkeys(describe(one.arm) for one in verdicts if one.arm.rows))
    lines: dict[str, dict[str, str]] = {}
    for one in verdicts:
        line = lines.setdefault(f"{_linked(one.claim, link)}: {one.claim.says}", {})
        if one.arm.rows:
            line[describe(one.arm)] = one.verdict
    return _markdown(("claim", *arms), [(name, *(line.get(arm, "") for arm in arms)) for name, line in lines.items()])


def table(verdicts: Iterable[Verdict], link: str = "#verdict-{}") -> str:
    """Markdown: claim with a link to its tests, where the paper shows it, its number, ours, verdict.

    A claim has a line for each arm, and one for all the data sets and K without records; its first line has its words.
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
        first = not any(name == claim.name for name, _ in lines)
        lines[claim.name, where if arm.rows else None] = [
            _linked(claim, link) + (f": {claim.says}" if first else ""),
            claim.where if first else "",
            claim.paper(arm.dataset, arm.stages),
            ". ".join((where, *filter(None, ["; ".join(numbers)]))),
            f"**{verdict.verdict}**",
        ]
    return _markdown(head, list(lines.values()))


def _linked(claim: Claim, link: str) -> str:
    return f"[{claim.name}]({link.format(claim.name.lower())})"


def _where(arm: Arm) -> str:
    return f"{NAMES[arm.dataset]} with K = {arm.stages or '1 and 4'}"


def details(verdict: Verdict) -> str:
    """Markdown: the parts of a verdict, their numbers and outcomes, and in a line those that have too few seeds."""
    if not verdict.arm.rows:
        return f"{_where(verdict.arm)}: **not run**\n"
    head = ("test", "wanted", "mean ± sd over seeds", f"{CONFIDENCE:.0%} interval", "seeds", "outcome")
    lines, few = [], []
    for part in verdict.parts:
        what = f"{part.what} (control)" if part.control else part.what
        if part.n < MIN_SEEDS:
            few.append(what)
            continue
        side = {"above": ">", "below": "<"}[part.side]
        interval = "{:.3g} … {:.3g}".format(*part.interval)
        lines.append((what, f"{side} {part.threshold:.3g}", _number(part), interval, str(part.n), part.outcome))
    said = [f"{describe(verdict.arm)}: **{verdict.verdict}**\n"]
    if lines:
        said.append(_markdown(head, lines))
    if few:
        said.append(f"Not run (fewer than {MIN_SEEDS} seeds): {'; '.join(few)}.\n")
    return "\n".join(said)


def _number(part: Part) -> str:
    return f"{part.mean:.3g} ± {part.sd:.2g} (n = {part.n})"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)) + "\n"
