"""The scores of any model, stage by stage, beside those of controls: one call, one report. Handed on by `measure`.

| symbol | identifier | meaning |
|---|---|---|
| x_0, x_L | ends[0], ends[1] | states of the points at the two ends of a stage |
| κ | curl_share | share of the stage's displacement that is not a gradient (see `probes`) |
"""

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from geodesic import probes, records
from geodesic._gauged import Aligned
from geodesic._meters import Control, Ends, Kept, Meter, Straightness, measure, radial, scattered
from geodesic.networks import Network
from geodesic.watch import View, Watched, placed, points, undisturbed, watch

if TYPE_CHECKING:
    import pandas

CONTROLS = ("untrained", "scattered", "radial")
COLUMNS = ("stage", "subject", "blocks", "n", "lsr_mean", "lss_mean", "ots_share", "ots_n", "curl_share")  # shown
_OWN_BLOCKS = "stages.*.blocks.*"  # of a network of our own
_TRIED = 8  # points of the first batch that show which stages there are
_BATCH = 64  # points at a time of a tensor that is no loader
_CURL_POINTS, _CURL_PROBES = 16, 4  # points at which Jacobians are taken, probes of each
_PATH_POINTS = 1000  # whole tracks of a plain stage that are kept: half fit the gauge, half are scored in it
_NEAR = 0.005  # differences of a score below this are none


@dataclass(frozen=True)
class Report:
    """Scores of a model and of its controls, and what they allow to say."""

    rows: list[dict[str, Any]]  # one a stage × subject; the scores are named as in a record's stage
    notes: list[str]  # a sentence or two each

    def frame(self) -> "pandas.DataFrame":
        """A tidy table with the column names of `records.frame`, one row a stage × subject.

        Raises:
            ModuleNotFoundError: without pandas.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Report.frame needs pandas: pip install pandas") from error
        return pandas.DataFrame(self._flat())

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can say: rows with every score, of OTS at every n; and the notes."""
        return {"rows": self.rows, "notes": self.notes}

    def __str__(self) -> str:
        table = [COLUMNS, *([_shown(row.get(key)) for key in COLUMNS] for row in self._flat())]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join([*(line.rstrip() for line in lines), "", *(f"- {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{key}</th>' for key in COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_shown(row.get(key)))}</td>" for key in COLUMNS) + "</tr>"
            for row in self._flat()
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<table><caption>Scores of every stage beside its controls</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table><ul>{notes}</ul>"
        )

    def _flat(self) -> list[dict[str, Any]]:
        where = ("stage", "subject", "blocks")
        return [
            {key: row[key] for key in where} | records._tidy({k: v for k, v in row.items() if k not in where})
            for row in self.rows
        ]


def score(
    model: nn.Module,
    loader: Iterable[Any],
    blocks: str | Sequence[str] = "layer?.*",
    view: View = None,
    *,
    ots_points: Sequence[int] = (1000,),
    controls: Sequence[str] = ("scattered", "radial"),
    untrained: Callable[[], nn.Module] | None = None,
    generator: torch.Generator | None = None,
) -> Report:
    """Line-shape scores, optimal transport scores and curl shares of any model, beside those of controls.

    A stage is a run of blocks that keep the shape of the state. One with a single block has no line-shape scores, for
    every such track is straight. A stage without identity maps (VGG, an MLP) has a further row, "model, aligned": its
    scores with the units of every state named as those of the state before (see `tracks.align`), fitted on the first
    half of up to 1000 points and taken on the other half. κ is taken on all directions, at the first 16 points; of an
    aligned stage it is free of the trace.

    Controls: "scattered", the model's steps in random directions; "radial", x_0 and its multiples, straight and optimal
    by construction; "untrained", the same blocks of another model. One pass through the model, and one through the
    untrained one. Memory: one batch, and for each subject the ends of the first max(ots_points) tracks of every stage.

    Args:
        model: see `watch.watch`; it is left as it was. Of a network of our own the blocks are known.
        loader: batches of points: tensors, tuples of which the first item is taken, or mappings of named arguments
            ("label" and "labels" are left out); or all points as one tensor. It is gone through twice with "untrained".
        blocks: names or patterns, as for `watch.watch`.
        view: what of a block's output is the state, as for `watch.watch`.
        ots_points: sizes of the nested subsets for the transport score; those that there are points for, or else all.
        controls: of "untrained", "scattered", "radial".
        untrained: makes the model that the control "untrained" needs.
        generator: CPU generator of random directions and probes; None takes seed 0.

    Raises:
        ValueError: for an unknown control, no factory for "untrained", an untrained model of other stages, sizes below
            2, no batches, and what `Watched.read` refuses.
        TypeError: for what is no model.
    """
    _check(controls, untrained, ots_points, loader)
    draws = generator or torch.Generator().manual_seed(0)
    blocks = _OWN_BLOCKS if isinstance(model, Network) else blocks
    watched = watch(model, blocks, view)
    first, batches = _peek(loader)
    plain = _plain(watched, placed(first, watched.model))
    moved = [name for name in controls if name != "untrained"]
    found, ends, paths = _pass(watched, batches, ots_points, moved, any(plain), draws)
    subjects = {"model": found["stages"]} | {name: found[name]["stages"] for name in moved}
    notes = [_described(k, stage, plain[k]) for k, stage in enumerate(watched.stages)]
    notes += watched.notes
    curls = {"model": _curls(watched, ends, plain, draws, notes)}
    if "untrained" in controls:
        assert untrained is not None
        fresh = watch(untrained(), blocks, view)
        again, start, _ = _pass(fresh, _peek(loader)[1], ots_points, [], False, draws)
        if fresh.stages != watched.stages:
            raise ValueError("the untrained model has other stages than the model; make one of the same architecture")
        subjects["untrained"] = again["stages"]
        curls["untrained"] = _curls(fresh, start, plain, draws, [])
    curls["radial"] = [{"curl_share": 0.0}] * len(plain)
    rows = []
    for k, stage in enumerate(watched.stages):
        for name in ("model", *controls):
            scores = subjects[name][k] | (curls[name][k] if name in curls else {"curl_share": None})
            if len(stage.blocks) == 1:
                scores = {key: None if key[:3] in ("lsr", "lss") else value for key, value in scores.items()}
            rows.append({"stage": k + 1, "subject": name, "blocks": len(stage.blocks)} | scores)
            if name == "model" and plain[k] and (aligned := _aligned(watched, k, paths, ends, draws, notes)):
                rows.append({"stage": k + 1, "subject": "model, aligned", "blocks": len(stage.blocks)} | aligned)
    return Report(rows, notes + _forbidden(rows, controls))


def _pass(
    watched: Watched,
    batches: Iterable[Any],
    sizes: Sequence[int],
    controls: Iterable[str],
    keep: bool,
    draws: torch.Generator,
) -> tuple[dict[str, Any], Kept, Kept]:
    """What the meters saw, and the states that they kept."""
    moves = {"scattered": scattered(draws), "radial": radial}
    ends, paths = Ends(sizes), Kept(_PATH_POINTS, ends=False)
    others: list[Meter] = [Control(name, moves[name], Straightness(), Ends(sizes)) for name in controls]
    if keep:
        others.append(paths)
    seen = ((placed(x, watched.model), None) for x in batches)
    return measure(watched, seen, Straightness(), ends, *others), ends, paths


def _check(controls: Sequence[str], untrained: Any, sizes: Sequence[int], loader: Any) -> None:
    if unknown := [name for name in controls if name not in CONTROLS]:
        raise ValueError(f"control {unknown[0]!r} is unknown; there are: {', '.join(CONTROLS)}")
    if "untrained" in controls and untrained is None:
        raise ValueError("the control 'untrained' needs a model; pass untrained=, a function that makes one")
    if "untrained" in controls and isinstance(loader, Iterator):
        raise ValueError("the control 'untrained' goes through the loader a second time; pass one that can begin again")
    if not sizes or min(sizes) < 2:
        raise ValueError(f"ots_points={tuple(sizes)} must be sizes of at least 2")


def _peek(loader: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """The first points, and all batches."""
    batches = iter(loader.split(_BATCH) if isinstance(loader, Tensor) else loader)
    first = next(batches, None)
    if first is None:
        raise ValueError("the loader is empty; pass one with at least one batch")

    def all_of_them() -> Iterator[Any]:
        yield _inputs(first)
        for batch in batches:
            yield _inputs(batch)

    x = _inputs(first)
    n = points(x)
    few = lambda t: t[:_TRIED] if isinstance(t, Tensor) and t.ndim and len(t) == n else t  # noqa: E731
    return {key: few(t) for key, t in x.items()} if isinstance(x, Mapping) else few(x), all_of_them()


def _inputs(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in ("label", "labels")}
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def _plain(watched: Watched, x: Any) -> list[bool]:
    """Of every stage, whether some block of it has weights and no identity map around them."""
    watched.read(x)
    carries = watched.identity_maps(x) if points(x) > 1 else {}
    return [not all(carries.get(name, True) for name in stage.blocks) for stage in watched.stages]


def _curls(
    watched: Watched, ends: Kept, plain: Sequence[bool], draws: torch.Generator, notes: list[str]
) -> list[dict[str, Any]]:
    """κ of every stage, or None and a note that says why."""
    return [
        {"curl_share": None} if plain[k] else _curl(watched, k, None, start[0], draws, notes)
        for k, start in enumerate(ends.stages)
    ]


def _curl(
    watched: Watched, k: int, aligned: Aligned | None, x: Tensor, draws: torch.Generator, notes: list[str]
) -> dict[str, Any]:
    try:
        blocks = watched.maps(k)
        x = x[:_CURL_POINTS]
        if aligned is not None:
            blocks, x = aligned.seen(blocks), aligned.state(0, x)
        with undisturbed(watched.model), _differentiable():
            where = {"spaces": ("isotropic",), "block_spaces": (), "psd_points": 0}
            (found,) = probes.curl_of_stage(blocks, x, _CURL_PROBES, draws, **where)["map"].values()
    except (ValueError, RuntimeError, NotImplementedError) as error:  # what a kernel cannot do it says in its own way
        notes.append(f"Stage {k + 1}: κ was not measured ({str(error).splitlines()[0]}).")
        return {"curl_share": None}
    share = found["share" if aligned is None else "trace_free_share"]
    return {"curl_share": share, "curl_chance": found["chance"], "curl_size": found["size"]}


@contextmanager
def _differentiable() -> Iterator[None]:
    """Attention by kernels that know forward derivatives, which the fused ones do not."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _aligned(
    watched: Watched, k: int, paths: Kept, ends: Kept, draws: torch.Generator, notes: list[str]
) -> dict[str, Any] | None:
    """Scores of a plain stage in the permuted gauge."""
    shape, track = watched.stages[k].shape, paths.stages[k]
    half = track.shape[1] // 2
    if len(shape) not in (1, 3) or half < 2:
        notes.append(f"Stage {k + 1}: not aligned, for want of points or of an axis of units, (n, units, …).")
        return None
    aligned, rest = Aligned(track[:, :half].float()), track[:, half:].float()
    found = aligned.scores(rest, rest[[0, -1]], [rest.shape[1]])
    scores = {"n": rest.shape[1]} | found["permuted"] | {"ots": [found["ots"]]}
    return scores | _curl(watched, k, aligned, ends.stages[k][0], draws, notes)


def _described(k: int, stage: Any, plain: bool) -> str:
    names = stage.blocks if len(stage.blocks) < 3 else (stage.blocks[0], "…", stage.blocks[-1])
    said = f"Stage {k + 1}: {', '.join(names)}, states of shape {stage.shape}."
    if len(stage.blocks) == 1:
        said += " One block: every track is straight, so there are no line-shape scores."
    if plain:
        said += (
            " It has blocks without identity maps: the units of its states bear no common name from block to block, so "
            "relabelling and rescaling them moves the raw scores and no answer of the model. Read the aligned ones."
        )
    return said


def _forbidden(rows: Sequence[dict[str, Any]], controls: Sequence[str]) -> list[str]:
    """What the controls forbid to conclude."""
    at = {(row["stage"], row["subject"]): row for row in rows}
    stages = sorted({row["stage"] for row in rows})

    def as_good(control: str, read: Callable[[Mapping[str, Any]], float | None], sign: int) -> list[str]:
        def better(k: int) -> bool:
            mine, other = read(at[k, "model"]), read(at[k, control])
            return mine is not None and other is not None and sign * (other - mine) >= -_NEAR

        return [str(k) for k in stages if better(k)]

    asked = [
        ("OTS", lambda row: row["ots"][-1]["share"], 1),
        ("LSS", lambda row: row["lss_mean"], -1),
        ("κ", lambda row: row["curl_share"], -1),
    ]
    notes = []
    for control in controls:
        same = [(name, as_good(control, read, sign)) for name, read, sign in asked]
        said = ", ".join(f"{name} (stage {', '.join(where)})" for name, where in same if where)
        if said and control != "radial":
            notes.append(
                f"The control {control!r} scores as well as the model in {said}: there the score says nothing of what "
                "the model learnt."
            )
    if "radial" in controls:
        notes.append("The control 'radial' scales its input and is perfect by construction: no score alone is a merit.")
    return notes


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
