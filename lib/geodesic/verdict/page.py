"""The verdicts as a reader sees them: a sentence for each claim, a table of all, and every test as a strip of dots.

HTML that takes its ink from the page, so that it serves light and dark themes; the look is in book.css under .verdict.
Used by book/verdict.md.
"""

import html
from collections.abc import Iterable, Sequence
from itertools import groupby
from string import ascii_uppercase

from geodesic.verdict.judge import CONFIDENCE, NAMES, OUTCOMES, Arm, Claim, Part, Verdict

SYMBOLS: dict[str, str] = dict(zip(OUTCOMES, ("✓", "◐", "✗", "?", "–"), strict=True))
_TIGHT = "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
_WIDTH, _HEIGHT, _MARGIN = 150, 18, 6  # of a strip, in pixels


class HTML(str):
    """Text that a notebook shows as a page does."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "HTML"

    def _repr_html_(self) -> str:
        return str(self)


def place(arm: Arm) -> str:
    """Data set and K."""
    return f"{NAMES.get(arm.dataset, arm.dataset)}, K = {arm.stages or '1 and 4'}"


def letters(verdicts: Iterable[Verdict]) -> dict[tuple[str, int | None, str], str]:
    """A letter for every arm that has records, in the order of the table; after Z come AA, AB, …"""
    keys = dict.fromkeys(_key(one.arm) for one in sorted(verdicts, key=_rank) if one.arm.rows)
    names = [*ascii_uppercase, *(first + second for first in ascii_uppercase for second in ascii_uppercase)]
    return dict(zip(keys, names, strict=False))


def sentence(claim: Claim, verdicts: Sequence[Verdict]) -> str:
    """What is said of a claim, in one sentence: "LSS falls …: shown on MNIST, K = 1 (A, B); refuted on …"."""
    names = letters(verdicts)
    mine = [one for one in sorted(verdicts, key=_rank) if one.claim.name == claim.name]
    said = []
    for outcome in OUTCOMES:
        here = [one for one in mine if one.verdict == outcome]
        parts = []
        for where, group in groupby(here, key=lambda one: place(one.arm)):
            known = [names[_key(one.arm)] for one in group if one.arm.rows]
            parts.append(where + (f" ({', '.join(known)})" if known else ""))
        if parts:
            said.append(f"{outcome} on {_and(parts)}")
    return f"{claim.says[0].upper()}{claim.says[1:]}: {'; '.join(said)}."


def answer(verdicts: Sequence[Verdict]) -> str:
    """The claims by what is said of them wherever they can be tested: "shown: C2; refuted: C12; …"."""
    groups: dict[str, list[str]] = {}
    for claim in {one.claim.name: one.claim for one in verdicts}.values():
        mine = [one for one in verdicts if one.claim.name == claim.name and one.verdict != "not tested"]
        found = {one.verdict for one in mine}
        differing = len(found) > 1
        words = "not tested" if not found else "different from arm to arm" if differing else found.pop()
        groups.setdefault(words, []).append(claim.name)
    order = ("shown", "mixed", "refuted", "undecided", "different from arm to arm", "not tested")
    return "; ".join(f"{words}: {', '.join(groups[words])}" for words in order if words in groups)


def sentences(verdicts: Sequence[Verdict], link: str = "#verdict-{}") -> HTML:
    """A list of them, each with a link to its tests."""
    claims = {one.claim.name: one.claim for one in verdicts}.values()
    items = "".join(
        f'<li><a href="{link.format(claim.name.lower())}">{claim.name}</a>. {_text(sentence(claim, verdicts))}</li>'
        for claim in claims
    )
    return HTML(f'<div class="picture verdict"><ul class="sentences">{items}</ul></div>')


def overview(verdicts: Sequence[Verdict], link: str = "#verdict-{}") -> HTML:
    """A row for each claim, a column for each arm that has records; empty where the claim says nothing.

    A second, small symbol is the verdict without the correction, where it differs.
    """
    names = letters(verdicts)
    arms = {_key(one.arm): one.arm for one in sorted(verdicts, key=_rank) if one.arm.rows}
    groups = [(where, len(list(group))) for where, group in groupby(arms.values(), key=place)]
    head = "".join(
        f'<th colspan="{size}" scope="colgroup">{_text(where).replace(" = ", _TIGHT)}</th>' for where, size in groups
    )
    columns = "".join(f'<th scope="col" title="{_text(arm.name)}">{names[key]}</th>' for key, arm in arms.items())
    body = []
    for claim in {one.claim.name: one.claim for one in verdicts}.values():
        found = {_key(one.arm): one for one in verdicts if one.claim.name == claim.name}
        cells = "".join(_cell(found.get(key)) for key in arms)
        says = f'<a href="{link.format(claim.name.lower())}">{claim.name}</a> {_text(claim.says)}'
        body.append(f'<tr><th scope="row">{says}</th>{cells}</tr>')
    key = " ".join(f"<span>{_badge(outcome)} {outcome}</span>" for outcome in OUTCOMES)
    legend = "".join(
        f"<li><b>{names[one]}</b> {_text(place(arm))}: {_text(arm.name)}</li>" for one, arm in arms.items()
    )
    table = (
        f'<table><thead><tr><th rowspan="2" scope="col">claim</th>{head}</tr><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
        if arms
        else "<p>No arm has enough runs yet.</p>"
    )
    return HTML(f'<div class="picture verdict">{table}<p class="key">{key}</p><ul class="legend">{legend}</ul></div>')


def missing(verdicts: Iterable[Verdict]) -> str:
    """Which claims have no runs at all on which data set and K, in one phrase."""
    found: dict[str, list[str]] = {}
    for one in verdicts:
        if not one.arm.rows:
            found.setdefault(place(one.arm), []).append(one.claim.name)
    return "; ".join(f"{where} ({', '.join(names)})" for where, names in found.items()) or "nothing"


def details(verdicts: Sequence[Verdict], name: str) -> HTML:
    """The tests of a claim, an arm at a time, folded: strip, number, outcome; then those that could not be made."""
    names = letters(verdicts)
    mine = [one for one in sorted(verdicts, key=_rank) if one.claim.name == name]
    folds = []
    for one in mine:
        if not one.arm.rows:
            continue
        alone = "" if one.alone == one.verdict else f" (each test by itself: {one.alone})"
        title = f"{names[_key(one.arm)]}, {place(one.arm)}, {one.arm.name}: {one.verdict}{alone}"
        folds.append(
            f"<details><summary>{_badge(one.verdict)} {_text(title)}</summary>{_numbers(one)}{_tests(one)}</details>"
        )
    absent = [place(one.arm) for one in mine if not one.arm.rows]
    if absent:
        folds.append(f"<p>No runs: {_text('; '.join(absent))}.</p>")
    return HTML(f'<div class="picture verdict">{"".join(folds)}</div>')


def strip(part: Part) -> str:
    """A dot for every seed, the interval of their mean, the threshold; the claimed side is shaded.

    Each strip has its own scale, for each test has its own unit; an interval longer than the strip is cut.
    """
    low, high = min((*part.values, part.threshold)), max((*part.values, part.threshold))
    room = 0.4 * (high - low) or max(abs(high), 1.0) * 0.1
    low, high = low - room, high + room

    def x(value: float) -> float:
        share = (value - low) / (high - low)
        return round(_MARGIN + min(1.0, max(0.0, share)) * (_WIDTH - 2 * _MARGIN), 1)

    middle, line = _HEIGHT / 2, x(part.threshold)
    start, width = (line, _WIDTH - line) if part.side == "above" else (0, line)
    shapes = [f'<rect x="{start:g}" width="{width:g}" height="{_HEIGHT}" class="side"/>']
    if part.n > 1:
        first, last = (x(end) for end in part.interval)
        shapes.append(f'<path d="M{first} {middle}H{last}" class="interval"/>')
    shapes.append(f'<path d="M{line} 0V{_HEIGHT}" class="threshold"/>')
    shapes += [f'<circle cx="{x(value)}" cy="{middle}" r="2.5"/>' for value in part.values]
    words = f"{', '.join(f'{value:.3g}' for value in part.values)}; wanted {part.side} {part.threshold:.3g}"
    return (
        f'<svg role="img" aria-label="{words}" viewBox="0 0 {_WIDTH} {_HEIGHT}" class="{part.outcome.split()[0]}">'
        f"{''.join(shapes)}</svg>"
    )


def _tests(verdict: Verdict) -> str:
    lines, absent = [], {}
    for part in verdict.parts:
        if not part.values or (part.n == 1 and not part.tested):
            absent.setdefault(part.why, []).append(part.what + (" (control)" if part.control else ""))
            continue
        sign = {"above": "&gt;", "below": "&lt;"}[part.side]
        number = f"{part.mean:.3g}" + (f" ± {part.sd:.2g}" if part.n > 1 else "")
        what = _text(part.what) + (" <i>control</i>" if part.control else "")
        outcome = f"{_badge(part.outcome)} {part.outcome}"
        if part.why:
            outcome += f"<br><small>{_text(part.why)}</small>"
        elif part.alone != part.outcome:
            outcome += f"<br><small>by itself {part.alone}</small>"
        lines.append(
            f'<tr><th scope="row">{what}</th><td>{sign} {part.threshold:.3g}</td><td>{strip(part)}</td>'
            f"<td>{number}<br><small>{part.n} seeds</small></td><td>{outcome}</td></tr>"
        )
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("test", "wanted", f"seeds, {CONFIDENCE:.0%} interval", "mean ± sd", "outcome")
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>" if lines else ""
    rest = "".join(f"<p>Not tested ({_text(why)}): {_text('; '.join(what))}.</p>" for why, what in absent.items())
    return table + rest


def _numbers(verdict: Verdict) -> str:
    """The paper's numbers beside ours."""
    claim, arm = verdict.claim, verdict.arm
    paper, ours = claim.paper(arm.dataset, arm.stages), claim.ours(arm)
    text = f"<b>In the paper</b> ({_text(claim.where)}): {_text(paper)}."
    return f"<p>{text}{f' <b>Here</b>: {_text(ours)}.' if ours else ''}</p>"


def _cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return "<td></td>"
    alone = "" if verdict.alone == verdict.verdict else f"<small>{SYMBOLS[verdict.alone]}</small>"
    words = verdict.verdict + (f", each test by itself {verdict.alone}" if alone else "")
    return f'<td title="{words}">{_badge(verdict.verdict)}{alone}<span class="visually-hidden">{words}</span></td>'


def _badge(outcome: str) -> str:
    return f'<span class="badge-{outcome.split()[0]}" aria-hidden="true">{SYMBOLS[outcome]}</span>'


def _key(arm: Arm) -> tuple[str, int | None, str]:
    return arm.dataset, arm.stages, arm.name


def _rank(verdict: Verdict) -> tuple[int, int]:
    """Data sets in the order of NAMES, K in ascending order, arms that compare K last; arms stay in their order."""
    return list(NAMES).index(verdict.arm.dataset), verdict.arm.stages or 99


def _text(words: str) -> str:
    return html.escape(words, quote=True)


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
