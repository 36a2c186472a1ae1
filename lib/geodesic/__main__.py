"""The command line: `python -m geodesic run --dataset mnist --network resnet --weight-decay 1e-3`."""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geodesic import experiment, records


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, dispatch, and turn an error of the caller into one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="geodesic", description="Train networks and score their data tracks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"geodesic: {error}", file=sys.stderr)
        return 2


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="train and score one network",
        description="Train and score one network and write its record. A run whose record exists is not repeated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(command=_run)
    for field in dataclasses.fields(experiment.Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            help=field.metadata["help"],
            default=field.default,
            **_kind(typing.get_type_hints(experiment.Settings)[field.name]),
        )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the record")
    parser.add_argument("--root", help="folder of the data; None takes $GEODESIC_DATA, else ./data")
    parser.add_argument("--download", action="store_true", help="fetch missing data from its public address")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--checkpoints", type=Path, help="folder of unfinished runs, continued after an interruption")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _kind(hint: Any) -> dict[str, Any]:
    """Options of add_argument for a setting's type; a type that may be None is that type."""
    members = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    kind = members[0] if type(None) in typing.get_args(hint) else hint
    if kind == tuple[int, ...]:
        return {"type": int, "nargs": "*", "metavar": "N"}
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}


def _run(options: argparse.Namespace) -> int:
    names = [field.name for field in dataclasses.fields(experiment.Settings)]
    settings = experiment.Settings.from_dict({name: getattr(options, name) for name in names})
    path = options.out / f"{records.name(settings.to_dict())}.json"
    if path.exists():
        record, what = records.read(path), "reused"
    else:
        record = experiment.run(
            settings,
            root=options.root,
            device=options.device,
            download=options.download,
            checkpoints=options.checkpoints,
            show=not options.quiet,
        )
        path, what = records.write(record, options.out), "written"
    print(f"{_summary(record)}\nrecord {what}: {path}")
    return 0


def _summary(record: records.Record) -> str:
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


if __name__ == "__main__":
    sys.exit(main())
