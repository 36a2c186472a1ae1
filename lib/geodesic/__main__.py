"""The command line: `python -m geodesic run --dataset mnist --network resnet --weight-decay 1e-3`.

`run` is one network, `sweep` a grid of them, `report` what they gave, `aeot` the generative companion. Only the chosen
command's libraries are imported: torch alone takes longer than a finished sweep.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from geodesic import sweep
from geodesic.sweep import dispatch, inline, progress, worker

_SEVERAL = ("seed", "weight_decay", "learning_rate")  # settings of which `run` takes several values


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, dispatch, and turn an error of the caller into one line on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="geodesic", description="Train networks and score their data tracks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add, text, long in _COMMANDS:
        formatter = argparse.ArgumentDefaultsHelpFormatter
        command = commands.add_parser(name, help=text, description=long, formatter_class=formatter)
        if name in arguments[:1]:
            add(command)
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"geodesic: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("geodesic: interrupted; what is finished is kept, the same command continues", file=sys.stderr)
        return 130


def _add_run(parser: argparse.ArgumentParser) -> None:
    from geodesic import experiment

    parser.set_defaults(command=_run)
    for field in dataclasses.fields(experiment.Settings):
        several = field.name in _SEVERAL
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            help=field.metadata["help"] + "; several make a row of runs" * several,
            default=[field.default] if several else field.default,
            **_kind(typing.get_type_hints(experiment.Settings)[field.name]) | ({"nargs": "+"} if several else {}),
        )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the records")
    _add_place(parser)
    parser.add_argument("--checkpoints", type=Path, help="folder of unfinished runs, continued after an interruption")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", help="folder of the data; None takes $GEODESIC_DATA, else ./data")
    parser.add_argument("--download", action="store_true", help="fetch missing data from its public address")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_sweep)
    parser.add_argument("grid", type=Path, help="TOML file: notebook, settings, axes (see notebooks/grids)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and the time they may take, and stop")
    parser.add_argument("--out", type=Path, help="folder of the records; None takes the grid's, else runs/NAME")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="a running Dask scheduler, tcp://host:port")
    parser.add_argument("--workers", type=_at_least(1), help="of this machine; None takes one a core, or one a GPU")
    parser.add_argument("--threads", type=_at_least(1), help="of each run; None shares out the cores")
    parser.add_argument(
        "--timeout", type=_at_least(1, float), default=86400.0, metavar="S", help="seconds a run may take"
    )
    parser.add_argument(
        "--retries", type=_at_least(0), default=0, metavar="N", help="further attempts at a run that failed"
    )
    inside = parser.add_argument_group("on a bare machine: no notebooks, no papermill, no Dask")
    inside.add_argument("--in-process", action="store_true", help="compute the runs in processes of this command")
    inside.add_argument(
        "--processes", type=_at_least(1), help="None takes one a core; beside a CUDA device, where they score, half"
    )
    inside.add_argument(
        "--together", type=_at_least(1), default=8, metavar="N", help="networks in training at a time on a CUDA device"
    )
    inside.add_argument(
        "--budget", type=_at_least(0, float), metavar="S", help="seconds after which the rest is left for later"
    )
    inside.add_argument(
        "--order", nargs="+", default=[], metavar="SETTING", help="begin with the lowest values of these"
    )
    _add_place(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _add_report(parser: argparse.ArgumentParser) -> None:
    from geodesic import report

    parser.set_defaults(command=_report)
    parser.add_argument("folder", type=Path, help="folder of records")
    parser.add_argument("--by", nargs="+", metavar="SETTING", help="group by these; None takes those that vary")
    parser.add_argument("--scores", nargs="+", metavar="SCORE", help="show these; None takes accuracies and scores")
    parser.add_argument("--part", choices=("train", "test"), default="test", help="points the scores are taken on")
    parser.add_argument("--format", choices=report.FORMATS, default="table", help="of the output")
    parser.add_argument("--compare", choices=("paper",), help="set the paper's tables beside the records")


def _add_aeot(parser: argparse.ArgumentParser) -> None:
    from geodesic import aeot
    from geodesic.aeot import runs

    parser.set_defaults(command=_aeot)
    parser.add_argument("--data", choices=list(runs.SETTINGS), default="mnist", help="what to learn")
    parser.add_argument("--methods", nargs="+", choices=aeot.METHODS, help="train these; None takes all")
    parser.add_argument("--seeds", nargs="+", type=_at_least(0), metavar="N", help="None takes the book's: 0 1 2")
    least = {"n": 2, "samples": 16, "steps": 1}
    for name, text in (("n", "training points"), ("samples", "drawn and judged"), ("steps", "of every decoder")):
        parser.add_argument(f"--{name}", type=_at_least(least[name]), metavar="N", help=f"{text}; None: the book's")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the record and of the image grid")
    parser.add_argument("--root", help="folder of the data; None takes $GEODESIC_DATA, else ./data")
    parser.add_argument("--download", action="store_true", help="fetch missing data from its public address")


_COMMANDS: tuple[tuple[str, Callable[[argparse.ArgumentParser], None], str, str], ...] = (
    ("run", _add_run, "train and score one network, or several",
     "Train and score a network, or one for each λ, step size and seed, and write its record. A run whose record is "
     "there is not repeated. On a CUDA device several fully connected networks are trained together, as one stack."),
    ("sweep", _add_sweep, "execute a grid of runs",
     "Execute every run of a grid that has no record yet, each in a notebook of its own, on the cores of this machine "
     "or on a Dask cluster. What was interrupted is continued by the same command."),
    ("report", _add_report, "tabulate records", "Mean ± standard deviation over seeds of the records in a folder."),
    ("aeot", _add_aeot, "generate by optimal transport",
     "Train AE-OT and its rivals, draw from each, score what was drawn, and write a record and, of images, a grid of "
     "them. What was interrupted is continued by the same command."),
)  # fmt: skip


def _at_least(least: int, kind: type = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if (value := kind(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return value

    return parse


def _kind(hint: Any) -> dict[str, Any]:
    """Options of add_argument for a setting's type; a type that may be None is that type."""
    members = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    kind = members[0] if type(None) in typing.get_args(hint) else hint
    if kind == tuple[int, ...]:
        return {"type": int, "nargs": "*", "metavar": "N"}
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}


def _run(options: argparse.Namespace) -> int:
    from geodesic import experiment, records

    names = [field.name for field in dataclasses.fields(experiment.Settings) if field.name not in _SEVERAL]
    fixed = {name: getattr(options, name) for name in names}
    rows = itertools.product(*(getattr(options, name) for name in _SEVERAL))
    settings = [experiment.Settings.from_dict(fixed | dict(zip(_SEVERAL, row, strict=True))) for row in rows]
    missing = []
    for one in settings:
        path = options.out / f"{records.name(one.to_dict())}.json"
        if path.exists():
            print(f"{_summary(records.read(path))}\nrecord reused: {path}")
        else:
            missing.append(one)
    place = {name: getattr(options, name) for name in ("root", "device", "download", "checkpoints")}
    for record in experiment.run_many(missing, **place, show=not options.quiet) if missing else ():
        print(f"{_summary(record)}\nrecord written: {records.write(record, options.out)}", flush=True)
    return 0


def _summary(record: dict[str, Any]) -> str:
    settings, final = record["settings"], record["final"]
    run = f"{settings['dataset']} {settings['network']} λ={settings['weight_decay']:g} seed {settings['seed']}"
    head = f"{run}: {record['status']}"
    if final is None:
        return head
    stages = [
        f"LSS {_number(stage['lss_mean'])}, LSR {_number(stage['lsr_mean'])}"
        + "".join(f", OTS {_number(ots['share'])} at n={ots['n']}" for ots in stage["ots"][-1:])
        for stage in final["test"]["stages"]
    ]
    accuracies = ", ".join(f"{part} accuracy {final[part]['accuracy']:.2%}" for part in ("train", "test"))
    return f"{head}, {accuracies}; test points: {'; '.join(stages)}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _sweep(options: argparse.Namespace) -> int:
    grid = sweep.read(options.grid, options.out, options.root)
    done = {
        run.name: worker.judged(run.name, "reused", record)
        for run in grid.runs
        if (record := worker.recorded(grid.out, run)) is not None
    }
    todo = [run for run in grid.runs if run.name not in done]
    expected = progress.estimate(grid) if todo else {}
    if options.dry_run:
        print(progress.listing(grid, done, expected, options.workers or dispatch.cores()))
        return 0
    with contextlib.suppress(OSError):  # it saves time, no more
        sweep.keep_plan(grid)
    if todo:
        way = inline if options.in_process else dispatch
        names = [field.name for field in dataclasses.fields(way.Options) if field.name != "show"]
        chosen = way.Options(**{name: getattr(options, name) for name in names}, show=not options.quiet)
        todo = inline.ordered(todo, options.order)
        done |= {outcome.name: outcome for outcome in way.execute(grid, todo, chosen, expected)}
    print(progress.conclusion(grid, done))
    return int(any(outcome.status == "failed" for outcome in done.values()))


def _report(options: argparse.Namespace) -> int:
    from geodesic import report

    found = report.rows(options.folder, options.part)
    table = (
        report.compare(found, options.scores) if options.compare else report.table(found, options.by, options.scores)
    )
    print(report.render(table, options.format), end="")
    return 0


def _aeot(options: argparse.Namespace) -> int:
    from torchvision.io import write_png

    from geodesic import data, records
    from geodesic.aeot import runs

    settings = runs.SETTINGS[options.data]
    chosen = {key: getattr(options, key) for key in ("methods", "seeds", "n", "samples") if getattr(options, key)}
    settings = settings | chosen
    if options.steps:
        settings = settings | {"recipe": settings["recipe"] | {"steps": options.steps}}
        settings.pop("rival_steps", None)
    if options.download and "dataset" in settings:
        data.load(settings["dataset"], options.root, download=True)

    def follow(part: dict[str, Any]) -> None:
        print(f"seed {part['seed']} {part['method']}: {part['seconds']:.0f} s", file=sys.stderr, flush=True)

    path = runs.run(settings, options.out, options.root, follow)
    record = records.read(path)
    for name, scores in runs.rows(record):
        print(f"{name}: " + ", ".join(f"{key} {score.mean:.3f} ± {score.sd:.3f}" for key, score in scores.items()))
    print(f"record: {path}")
    if "dataset" in settings:
        write_png(runs.page(record), str(path.with_suffix(".png")))
        print(f"images, {', '.join(settings['methods'])} from the top: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
