"""The paper's claims C1–C10: for each its tests on rows of records, their thresholds, and the paper's own numbers.

The tests were written down before the CIFAR records existed; those of MNIST were known. What a test is and how a
verdict follows from it is said in `judge`.

Used by book/verdict.md. Source of the claims: arXiv:2102.09235v2, Figs 2–16 and Tables 2–7.
"""

import math
import statistics
from collections.abc import Callable, Sequence

from scipy import stats

from geodesic import report
from geodesic.verdict.judge import NETWORKS, Arm, Cells, Claim, Part

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
