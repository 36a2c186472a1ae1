"""The paper's claims C1–C14: for each its tests on rows of records, their thresholds, and the paper's own numbers.

What a test is and how a verdict follows from it is said in `judge`. The tests and thresholds were fixed in a commit
before any of the CIFAR-10 records that they judge was made; pilot runs of one seed, and all of MNIST, were known.

Three rules, for reasons given in the chapter on networks:

- A plain network's line-shape scores depend on the names and scales of its units, which can be changed without
  changing a prediction. Its tests are made twice: raw, and permuted (states at mean norm 1, units named as in the
  layer before).
- A residual network's OTS depends on the metric. Its tests are made twice: as trained, and at unit channels.
- Where λ may act as a step size, what λ gives is compared with what another step size gives at λ = 0.

Used by book/verdict.md. Source of the claims: arXiv:2102.09235v2, Figs 2–16 and Tables 2–7, eq. 15.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from scipy import stats

from geodesic import report
from geodesic.verdict.judge import NAMES, NETWORKS, Arm, Cells, Claim, Part

FIXED = "2026-11-27"  # when tests and thresholds were fixed
_ZERO = 1e-12  # a loss below it is none
_LARGE = 0.1  # the λ past which the paper sees accuracy fall

# Thresholds.
FALL = math.log(1.05)  # C1, C9: a score that falls by 5 %
LSS_ONE, OTS_ONE = 1.1, 0.95  # C2: "≈ 1"
USABLE = 0.02  # C2, C14: test accuracy that a λ may cost and still be of use
DROP, RISE = math.log(1.25), 0.02  # C3: a sharp drop of LSS between neighbouring λ; accuracy that moves
RANK, OTS_ZERO = -0.5, 0.1  # C4
FITTED = 0.99  # C5: "near 100 %"
BARELY, QUICKLY = 0.1, 0.3  # C6: share of the accuracy lost when a quarter of a layer's units is replaced
FIT, ALIKE = 0.95, math.log(2)  # C7: training accuracy of networks that fit; training losses that are equal
MOST, MORE = 0.5, 0.2  # C8: share of the last segment, and its rise over that at λ = 0
MIN_DECAYS = 3  # C10, C11: λ that two settings must share before their best can be told apart
DIFFER = 0.005  # C10: test accuracy that the wrong λ must cost, if the best ones differ
ALMOST = 0.01  # C11: test accuracy that the λ of the best training accuracy may cost
SMALL, SMALL_DECAY = 1.5, 0.01  # C12: "a very small LSS", "a relatively small λ"
HALF = math.log(2)  # C14: at least half of the curl share is gone
MOVES = 0.01  # C14: ‖J − I‖ / ‖I‖ below which a stage does nothing that could curl


def _common(*cells: dict[int, float]) -> list[int]:
    return sorted(set.intersection(*(set(one) for one in cells))) if cells else []


def _over_decays(cells: Cells) -> dict[int, float]:
    """Mean over λ for every seed that has them all."""
    return {seed: statistics.fmean(one[seed] for one in cells.values()) for seed in _common(*cells.values())}


def _difference(first: dict[int, float], second: dict[int, float]) -> tuple[float, ...]:
    return tuple(first[seed] - second[seed] for seed in _common(first, second))


def _ln(cells: dict[int, float]) -> dict[int, float]:
    return {seed: math.log(value) for seed, value in cells.items() if value > 0}


def _logs(cells: Cells) -> Cells:
    return {decay: _ln(seeds) for decay, seeds in cells.items()}


def _decayed(cells: Cells) -> Cells:
    return {decay: seeds for decay, seeds in cells.items() if decay > 0}


def _paired(first: Cells, second: Cells) -> tuple[float, ...]:
    """First less second, mean over the λ that both have, for every seed that both have."""
    both = sorted(first.keys() & second.keys())
    return _difference(_over_decays({d: first[d] for d in both}), _over_decays({d: second[d] for d in both}))


def _networks(arm: Arm, value: str, other: str | None = None) -> tuple[float, ...]:
    """ResNet less plain network."""
    return _paired(arm.cells("resnet", value), arm.cells("plain", other or value))


def _means(cells: Cells) -> dict[float, float]:
    return {decay: statistics.fmean(seeds.values()) for decay, seeds in cells.items()}


def _best(cells: Cells, *, least: bool = False) -> float | None:
    """The λ of the largest (or least) mean over seeds."""
    means = _means(cells)
    return (min if least else max)(means, key=means.__getitem__, default=None)


def _at(cells: Cells, decay: float | None) -> tuple[float, ...]:
    return tuple(cells[decay].values()) if decay in cells else ()


def _where(decay: float | None) -> str:
    return "" if decay is None else f" at λ = {decay:g}"


def _gauges(network: str) -> tuple[tuple[str, str], ...]:
    """Suffix of a value and words, for every gauge in which a network's line-shape scores are judged."""
    return (("", ""),) if network == "resnet" else (("", ", raw"), ("_permuted", ", permuted"))


_METRICS = (("ots", "OTS"), ("ots_unit", "OTS at unit channels"))  # in which a ResNet's transport is judged


def _regime(arm: Arm, network: str) -> str:
    """Why the networks of an arm are not those that the paper's table is about; empty if they are.

    The table's least training accuracy must be reached at some λ. MNIST has no table.
    """
    table = report.paper_values().get((arm.dataset, arm.stages or 1, network), {}).get("train_accuracy")
    means = _means(arm.cells(network, "running"))
    if not table or not means:
        return ""
    least = min(summary.mean for summary in table.values())
    if max(means.values()) >= least:
        return ""
    return f"{network}: training accuracy {max(means.values()):.1%} at best, the paper's least is {least:.1%}"


def _outside(parts: list[Part], *reasons: str) -> list[Part]:
    """The same parts, not tested if there is a reason."""
    why = "; ".join(dict.fromkeys(filter(None, reasons)))
    return [replace(part, outside=part.outside or why) for part in parts] if why else parts


def _c1(arm: Arm) -> list[Part]:
    parts = []
    for network in NETWORKS:
        falls = _decayed(arm.cells(network, "lss_fall"))
        raw = ", raw" if network == "plain" else ""
        parts.append(Part(f"{network}{raw}: ln(LSS before / after training), λ > 0",
                          tuple(_over_decays(falls).values()), "above", FALL))  # fmt: skip
        gauges = [*_gauges(network), *([("_norm1", ", norm 1")] if network == "plain" else [])]
        for suffix, gauge in gauges:
            scores = _logs(arm.cells(network, f"lss{suffix}"))
            decayed = _over_decays(_decayed(scores))
            if suffix:
                fall = _difference(_ln(arm.before(network, f"lss{suffix}")), decayed)
                parts.append(Part(f"{network}{gauge}: ln(LSS before / after training), λ > 0", fall, "above", FALL,
                                  control=suffix == "_norm1"))  # fmt: skip
            parts.append(Part(f"{network}{gauge}: ln(LSS at λ = 0 / at λ > 0), trained",
                              _difference(scores.get(0.0, {}), decayed), "above", 0.0, control=True))  # fmt: skip
    return parts


def _c2(arm: Arm) -> list[Part]:
    lss = arm.cells("resnet", "lss")
    best = _best(_decayed(lss), least=True)
    accuracy = _means(arm.cells("resnet", "test_accuracy"))
    useful = [d for d, mean in accuracy.items() if d > 0 and mean >= max(accuracy.values()) - USABLE]
    modest = _best({decay: lss[decay] for decay in useful if decay in lss}, least=True)
    near = (
        "" if modest is None else f" at λ = {modest:g}, the straightest within {USABLE:.0%} of the best test accuracy"
    )
    parts = [Part(f"ResNet: LSS{_where(best)}", _at(lss, best), "below", LSS_ONE)]
    for value, words in _METRICS:
        ots = arm.cells("resnet", value)
        parts += [
            Part(f"ResNet: {words}{_where(best)}", _at(ots, best), "above", OTS_ONE),
            Part(f"ResNet: {words}{_where(best)} less that untrained",
                 _difference(ots.get(best, {}), arm.before("resnet", value)), "above", 0.0, control=True),
        ]  # fmt: skip
    return [*parts, Part(f"ResNet: LSS{near}", _at(lss, modest), "below", LSS_ONE, control=True)]


def _c3(arm: Arm) -> list[Part]:
    parts = []
    for network in NETWORKS:
        mine = []
        step = None
        for suffix, gauge in _gauges(network):
            lss = {d: seeds for d, seeds in _logs(arm.cells(network, f"lss{suffix}")).items() if d <= _LARGE}
            drops = {(a, b): _difference(lss[a], lss[b]) for a, b in zip(list(lss), list(lss)[1:], strict=False)}
            known = {step: values for step, values in drops.items() if values}
            here = max(known, key=lambda step: statistics.fmean(known[step]), default=None)
            step = step or here  # accuracies are read where the raw score falls, as in the paper
            at = f", λ = {here[0]:g} to {here[1]:g}" if here else ""
            mine.append(Part(f"{network}{gauge}: largest fall of ln LSS{at}", known.get(here, ()), "above", DROP))
        at = f", λ = {step[0]:g} to {step[1]:g}" if step else ""
        for value, words in (("running", "training accuracy"), ("test_accuracy", "test accuracy")):
            accuracy = arm.cells(network, value, collapsed=True)
            rise = _difference(accuracy.get(step[1], {}), accuracy.get(step[0], {})) if step else ()
            mine.append(Part(f"{network}: rise of {words}{at}", rise, "above", RISE))
            beyond = [decay for decay in accuracy if decay > _LARGE]
            fall = _difference(accuracy.get(_LARGE, {}), accuracy[max(beyond)]) if beyond else ()
            mine.append(Part(f"{network}: fall of {words} past λ = {_LARGE:g}", fall, "above", RISE))
            best = _best(_decayed(accuracy))
            gain = _difference(accuracy.get(best, {}), accuracy.get(0.0, {}))
            mine.append(Part(f"{network}: {words}{_where(best)} less that at λ = 0, same step", gain, "above", RISE,
                             control=True))  # fmt: skip
        mine += _against_steps(arm, network, RISE)
        mine += _straighter_than_steps(arm, network)
        parts += _outside(mine, _regime(arm, network))
    return parts


def _against_steps(arm: Arm, network: str, threshold: float) -> list[Part]:
    """What the best λ > 0 gives in accuracy over λ = 0 at its best step; both best by their mean."""
    parts = []
    for value, words in (("running", "training accuracy"), ("test_accuracy", "test accuracy")):
        steps = _steps(arm, network, value)
        decayed = _decayed(arm.cells(network, value, collapsed=True))
        step, best = _best(steps), _best(decayed)
        at = f", λ = {best:g} against λ = 0 with step {step:g}" if steps and decayed else ""
        gain = _difference(decayed[best], steps[step]) if steps and decayed else ()
        parts.append(Part(f"{network}: {words}, best λ less best step{at}", gain, "above", threshold))
    return parts


def _straighter_than_steps(arm: Arm, network: str) -> list[Part]:
    """The same for LSS, both at their best test accuracy."""
    parts = []
    step = _best(_steps(arm, network, "test_accuracy"))
    best = _best(_decayed(arm.cells(network, "test_accuracy", collapsed=True)))
    for suffix, gauge in _gauges(network):
        steps, decayed = _steps(arm, network, f"lss{suffix}"), arm.cells(network, f"lss{suffix}")
        fall = _difference(_ln(steps.get(step, {})), _ln(decayed.get(best, {})))
        parts.append(Part(f"{network}{gauge}: ln(LSS of the best step at λ = 0 / of the best λ)", fall, "above", 0.0))
    return parts


def _steps(arm: Arm, network: str, value: str) -> Cells:
    """Step size → seed → value at λ = 0; nothing where only the arm's own step size was run."""
    steps = arm.steps(network, value)
    return steps if len(steps) > 1 else {}


def _c4(arm: Arm) -> list[Part]:
    accuracy = arm.cells("resnet", "running")
    best = _best(accuracy)
    at = "" if best is None else f" at λ = {best:g}, where training accuracy is largest"
    parts = []
    for value, words in _METRICS:
        ots = arm.cells("resnet", value)
        both = sorted(ots.keys() & accuracy.keys())
        seeds = _common(*(cells[d] for cells in (ots, accuracy) for d in both)) if len(both) > 2 else []
        ranks = tuple(_rank([ots[d][seed] for d in both], [accuracy[d][seed] for d in both]) for seed in seeds)
        parts += [
            Part(f"ResNet: rank correlation over λ of {words} with training accuracy", ranks, "below", RANK),
            Part(f"ResNet: {words}{at}", _at(ots, best), "below", OTS_ZERO),
        ]
    return _outside(parts, _regime(arm, "resnet"))


def _rank(first: list[float], second: list[float]) -> float:
    """Spearman's ρ; 0 where one of them does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def _c5(arm: Arm) -> list[Part]:
    parts = []
    reduced = [name for name in ("depth", "width", "n_train") if arm.recipe.get(name) is not None]
    smaller = f"not the paper's size ({', '.join(f'{name} {arm.recipe[name]}' for name in reduced)})" if reduced else ""
    fit: list[set[float]] = []
    for network in NETWORKS:
        accuracy = arm.cells(network, "train_accuracy", collapsed=True)
        best = _best(accuracy)
        parts += _outside([Part(f"{network}: largest training accuracy{_where(best)}", _at(accuracy, best), "above",
                                FITTED)], smaller)  # fmt: skip
        fit.append({decay for decay, mean in _means(accuracy).items() if mean >= FITTED})
    both = set.intersection(*fit)

    def kept(network: str, value: str) -> Cells:
        return {decay: seeds for decay, seeds in arm.cells(network, value).items() if decay in both}

    pairs = (
        ("LSS, ResNet − plain, raw", "lss", "lss", "below"),
        ("LSS, ResNet − plain, permuted", "lss", "lss_permuted", "below"),
        ("OTS, ResNet − plain", "ots", "ots", "above"),
        ("OTS, ResNet at unit channels − plain, permuted", "ots_unit", "ots_permuted", "above"),
        ("test accuracy, ResNet − plain", "test_accuracy", "test_accuracy", "above"),
    )
    compared = [
        Part(what, _paired(kept("resnet", one), kept("plain", two)), side, 0.0) for what, one, two, side in pairs
    ]
    return parts + _outside(compared, "" if both or not arm.rows else f"no λ at which both networks fit ({FITTED:.0%})")


def _c6(arm: Arm) -> list[Part]:
    def lost(network: str, value: str) -> tuple[float, ...]:
        return tuple(_over_decays(arm.cells(network, value)).values())

    what = "share of the accuracy lost when a layer's top quarter is copied from the layer before"
    return [
        Part(f"ResNet: {what}", lost("resnet", "copied_lost"), "below", BARELY),
        Part(f"plain, raw: {what}", lost("plain", "copied_lost"), "above", QUICKLY),
        Part(f"plain, permuted: {what}", lost("plain", "aligned_lost"), "above", QUICKLY),
        Part("the same, ResNet − plain, raw", _networks(arm, "copied_lost"), "below", 0.0),
        Part("the same, ResNet − plain, permuted", _networks(arm, "copied_lost", "aligned_lost"), "below", 0.0),
        Part("the same with the top eighth, ResNet − plain, raw", _networks(arm, "copied_lost_eighth"), "below", 0.0,
             control=True),
        Part("top quarter set to zero, ResNet − plain", _networks(arm, "zeroed_lost"), "below", 0.0, control=True),
        Part("ResNet: top quarter of the branch set to zero", lost("resnet", "branch_lost"), "below", BARELY,
             control=True),
    ]  # fmt: skip


def _c7(arm: Arm) -> list[Part]:
    accuracy = {network: _means(arm.cells(network, "train_accuracy")) for network in NETWORKS}
    loss = {network: _means(arm.cells(network, "train_loss")) for network in NETWORKS}
    both = sorted(accuracy["resnet"].keys() & accuracy["plain"].keys())
    fit = [decay for decay in both if min(accuracy[network][decay] for network in NETWORKS) >= FIT]
    equal = [d for d in fit if abs(math.log(max(loss["resnet"][d], _ZERO) / max(loss["plain"][d], _ZERO))) <= ALIKE]
    why = ""
    if both and not equal:
        why = "their training losses differ" if fit else f"no λ at which both networks fit ({FIT:.0%} in training)"

    def compare(value: str) -> tuple[float, ...]:
        cells = [{d: s for d, s in arm.cells(network, value).items() if d in equal} for network in NETWORKS]
        return _paired(*cells)

    kept = "accuracy kept above chance under"
    return _outside(
        [
            Part(f"{kept} noise, ResNet − plain", compare("noise_kept"), "above", 0.0),
            Part(f"{kept} FGSM, ResNet − plain", compare("fgsm_kept"), "above", 0.0),
            Part("ln variation rate under noise, ResNet − plain", compare("variation"), "below", 0.0),
            Part(f"{kept} PGD, ResNet − plain", compare("pgd_kept"), "above", 0.0, control=True),
        ],
        why,
    )


def _c8(arm: Arm) -> list[Part]:
    parts = []
    for suffix, gauge in _gauges("plain"):
        shares = arm.cells("plain", f"last_share{suffix}")
        large = max(_decayed(shares), default=None)
        rise = _difference(shares.get(large, {}), shares.get(0.0, {}))
        parts += [
            Part(f"plain{gauge}: share of the last segment{_where(large)}", _at(shares, large), "above", MOST),
            Part(f"plain{gauge}: the same less that at λ = 0", rise, "above", MORE),
        ]
    return _outside(parts, _regime(arm, "plain"))


def _c9(arm: Arm) -> list[Part]:
    """In all of space, where every seed has tracks; those drawn in a plane are a few of a few seeds."""
    parts = []
    for network, value, what, control in (
        ("resnet", "lsr", "resnet: ln(LSR", False),
        ("plain", "lsr", "plain, raw: ln(LSR", False),
        ("plain", "lsr_permuted", "plain, permuted: ln(LSR", False),
        ("resnet", "plane_lsr", "resnet: ln(length/chord in the plane", True),
        ("plain", "plane_lsr", "plain, raw: ln(length/chord in the plane", True),
    ):
        ratios = _logs(arm.cells(network, value))
        large = max(_decayed(ratios), default=None)
        fall = _difference(ratios.get(0.0, {}), ratios.get(large, {}))
        part = Part(f"{what} at λ = 0 / the same{_where(large)})", fall, "above", FALL, control=control)
        parts += _outside([part], _regime(arm, network))
    return parts


def _c10(arm: Arm) -> list[Part]:
    """What a seed loses by the other's best λ; the best λ are those of the means over seeds."""
    ks = (arm.stages,) if arm.stages else (1, 4)
    tables = {
        (k, network): replace(arm, rows=tuple(r for r in arm.rows if r["stages"] == k)).cells(
            network, "test_accuracy", collapsed=True)
        for k in ks for network in NETWORKS
    }  # fmt: skip
    pairs = [((k, "resnet"), (k, "plain")) for k in ks]
    if arm.stages is None:
        pairs = [((1, network), (4, network)) for network in NETWORKS]
    parts = []
    for first, second in pairs:
        common = sorted(tables[first].keys() & tables[second].keys())
        enough = len(common) >= MIN_DECAYS
        why = "" if enough or not common else f"{len(common)} λ in common, fewer than {MIN_DECAYS}"
        for mine, other in ((first, second), (second, first)):
            cells = {decay: tables[mine][decay] for decay in common}
            best, theirs = _best(cells), _best({decay: tables[other][decay] for decay in common})
            loss = _difference(cells[best], cells[theirs]) if enough else ()
            at = f" ({theirs:g} for {best:g})" if enough else ""
            who = [f"{network}, K = {k}" for k, network in (mine, other)]
            part = Part(f"{who[0]}: accuracy lost with the best λ of {who[1]}{at}", loss, "above", DIFFER)
            # A λ that one of them lacks may be its best: then no loss on the others says nothing.
            unlike = any(
                (r["stages"], r["network"]) in (first, second) for r in arm.rows if r["weight_decay"] not in common
            )
            silent = bool(loss) and unlike and statistics.fmean(loss) <= DIFFER
            parts += _outside([part], why, "as good on the λ in common, but not all λ are" if silent else "")
    return parts


def _c11(arm: Arm) -> list[Part]:
    parts = []
    for network in NETWORKS:
        training = arm.cells(network, "running", collapsed=True)
        test = arm.cells(network, "test_accuracy", collapsed=True)
        both = sorted(training.keys() & test.keys())
        enough = len(both) >= MIN_DECAYS
        best, fitting = (_best({d: cells[d] for d in both}) for cells in (test, training))
        loss = _difference(test[best], test[fitting]) if enough else ()
        at = f" (λ = {fitting:g} for {best:g})" if enough else ""
        why = "" if enough or not both else f"{len(both)} λ, fewer than {MIN_DECAYS}"
        what = f"{network}: test accuracy lost at the λ of the best training accuracy{at}"
        mine = [*_outside([Part(what, loss, "below", ALMOST)], why), *_against_steps(arm, network, 0.0)]
        parts += _outside(mine, _regime(arm, network))
    return parts


def _c12(arm: Arm) -> list[Part]:
    parts = []
    for suffix, gauge in _gauges("plain"):
        lss = _decayed(arm.cells("plain", f"lss{suffix}"))
        for words, cells in (
            ("least LSS over λ > 0", lss),
            (f"least LSS over 0 < λ ≤ {SMALL_DECAY:g}", {d: s for d, s in lss.items() if d <= SMALL_DECAY}),
        ):
            best = _best(cells, least=True)
            parts.append(Part(f"plain{gauge}: {words}{_where(best)}", _at(cells, best), "below", SMALL))
    return parts


def _c13(arm: Arm) -> list[Part]:
    parts = []
    for network in NETWORKS:
        for suffix, gauge in _gauges(network):
            first, last = (_logs(arm.cells(network, f"lss_{at}{suffix}")) for at in ("first", "last"))
            ahead = {
                decay: dict(
                    zip(_common(first[decay], last[decay]), _difference(first[decay], last[decay]), strict=True)
                )
                for decay in first.keys() & last.keys()
            }
            decayed = _over_decays(_decayed(ahead))
            parts += [
                Part(f"{network}{gauge}: ln(LSS of the first stage / of the last), λ > 0", tuple(decayed.values()),
                     "above", 0.0),
                Part(f"{network}{gauge}: the same less that at λ = 0", _difference(decayed, ahead.get(0.0, {})),
                     "above", 0.0),
            ]  # fmt: skip
    return parts


def _c14(arm: Arm) -> list[Part]:
    parts = []
    norm = arm.recipe.get("norm", "none")
    normalised = "" if norm == "none" else "with normalisation the norm of a weight acts on no output"
    for network in NETWORKS:
        accuracy = _means(arm.cells(network, "test_accuracy"))
        chosen = max((d for d, mean in accuracy.items() if mean >= max(accuracy.values()) - USABLE), default=None)
        none = f"every λ > 0 costs more than {USABLE:.0%} of test accuracy" if chosen == 0 else ""
        mine = []
        for space, words in (("span", "in the data's span"), ("isotropic", "in all of space")):
            value = f"curl_{space}{'_trace_free' if network == 'plain' else ''}"
            curl = _logs(arm.cells(network, value))
            sizes = _means(arm.cells(network, f"curl_{space}_size"))
            still = f"the stage does nothing{_where(chosen)}" if sizes.get(chosen, 1.0) < MOVES else ""
            free = curl.get(0.0, {})
            least = _best(_decayed(curl), least=True)
            where = f"{network}, κ {words}"
            shuffled = [row for row in arm.shuffled if row["recipe"]["learning_rate"] == arm.recipe["learning_rate"]]
            control = _logs(arm.cells(network, value, rows=shuffled)) if shuffled else {}
            mine += _outside(
                [
                    Part(f"{where}: ln(κ at λ = 0 / κ{_where(chosen)})", _difference(free, curl.get(chosen, {})),
                         "above", HALF),
                    Part(f"{where}: ln(κ untrained / κ{_where(chosen)})",
                         _difference(_ln(arm.before(network, value)), curl.get(chosen, {})), "above", HALF,
                         control=True),
                    Part(f"{where}: ln(κ at λ = 0 / κ{_where(chosen)}), shuffled labels",
                         _difference(control.get(0.0, {}), control.get(chosen, {})), "above", HALF, control=True),
                ],
                none,
                still,
            )  # fmt: skip
            mine.append(Part(f"{where}: ln(κ at λ = 0 / κ{_where(least)}), where κ is least",
                             _difference(free, curl.get(least, {})), "above", HALF, control=True))  # fmt: skip
        parts += _outside(mine, normalised, _regime(arm, network))
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


def _ours(*names: str, networks: Sequence[str] = NETWORKS) -> Callable[[Arm], str]:
    """The same of an arm: the range over λ of the means over seeds."""

    def text(arm: Arm) -> str:
        words = []
        for network in networks:
            for name in names:
                value = _VALUES[name]
                means = _means(arm.cells(network, value, collapsed=value in ("running", "test_accuracy"))).values()
                if means:
                    words.append(f"{network}, {_LABELS[name]}: {min(means):.3g} … {max(means):.3g}")
        return "; ".join(words)

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
_VALUES = {  # our values under the names of the paper's tables; its training accuracies are those while training
    "lss_mean": "lss",
    "ots_share": "ots",
    "train_accuracy": "running",
    "test_accuracy": "test_accuracy",
    "segment_share_10": "last_share",
}
_MNIST = (("mnist", 1),)
_K1, _K4 = (("cifar10", 1), ("cifar100", 1)), (("cifar10", 4), ("cifar100", 4))
_BOTH = (("cifar10", None), ("cifar100", None))
_ALL = _MNIST + _K1 + _K4

CLAIMS = (
    Claim("C1", "LSS falls during training under weight decay, for both architectures", "Fig. 2", _ALL, _c1,
          lambda dataset, stages: "a curve" if (dataset, stages) not in _K1
          else "at the end about 6.1 (plain) and 2.2 (resnet)", _ours("lss_mean")),
    Claim("C2", "the ResNet reaches LSS ≈ 1 and OTS ≈ 1 at a suitable λ", "Fig. 3", _MNIST, _c2,
          _words("LSS ≈ 1, OTS ≈ 1"), _ours("lss_mean", "ots_share", networks=("resnet",))),
    Claim("C3", "past a threshold in λ LSS drops sharply and accuracies rise together; past λ = 0.1 both fall",
          "Fig. 4, Tables 4–5", _K1, _c3, _paper("lss_mean", "train_accuracy", "test_accuracy"),
          _ours("lss_mean", "train_accuracy", "test_accuracy")),
    Claim("C4", "the ResNet's OTS falls towards 0 as its training accuracy rises", "Tables 4–5", _K1, _c4,
          _paper("ots_share", "train_accuracy", networks=("resnet",)),
          _ours("ots_share", "train_accuracy", networks=("resnet",))),
    Claim("C5", "training accuracy near 100 % for both; the ResNet's scores are closer to 1 and its test accuracy is "
          "higher", "Figs 5–6, Tables 6–7", _K4, _c5, _paper("lss_mean", "ots_share", "test_accuracy"),
          _ours("lss_mean", "ots_share", "test_accuracy")),
    Claim("C6", "without a layer's most important units the ResNet loses little and the plain network much", "Fig. 7",
          _ALL, _c6, _words("curves")),
    Claim("C7", "under noise and FGSM the ResNet's accuracy falls more slowly, and its states vary less", "Fig. 8",
          _ALL, _c7, _words("curves")),
    Claim("C8", "at large λ the plain network puts most of its length into the last segment", "Tables 2–3", _K1, _c8,
          _paper("segment_share_10", networks=("plain",)), _ours("segment_share_10", networks=("plain",))),
    Claim("C9", "tracks drawn in a plane are straighter at large λ than at small λ", "Figs 9–16", _ALL, _c9,
          _words("pictures")),
    Claim("C10", "the best λ differs between K = 1 and K = 4, and between the architectures", "Tables 4–7",
          _K1 + _K4 + _BOTH, _c10, _words("by its tables")),
    Claim("C11", "training and test accuracy are best at almost the same λ, so that λ tunes both", "Section 4",
          _ALL, _c11, _paper("train_accuracy", "test_accuracy"), _ours("train_accuracy", "test_accuracy")),
    Claim("C12", "the plain network, too, reaches a very small LSS, even at a relatively small λ", "Section 5.2",
          _MNIST, _c12, _words("in words"), _ours("lss_mean", networks=("plain",))),
    Claim("C13", "the last of four stages, which has most parameters, is straightened more easily than the first",
          "Section 5.4", _K4, _c13, _words("in words")),
    Claim("C14", "weight decay eliminates the part of the velocity that is no gradient", "eq. 15", _ALL, _c14,
          _words("an argument")),
)  # fmt: skip
assert all(dataset in NAMES for claim in CLAIMS for dataset, _ in claim.sets)
