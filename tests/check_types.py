"""Fail if pyright finds more errors in a module than it did; write the lower number down where it finds fewer.

type_errors.json has the numbers; a module that is not in it has none. After a merge that brought errors which are to
stay for now, `--accept` writes all numbers as they are: the diff shows what was accepted.
"""

import argparse
import collections
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ROOT / "tests" / "type_errors.json"


def found() -> dict[str, list[str]]:
    """The errors of each module, a line each."""
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    try:
        told = json.loads(run.stdout)
    except ValueError:
        raise SystemExit(f"pyright did not answer: {run.stderr.strip() or run.stdout.strip()}") from None
    if not told["summary"]["filesAnalyzed"]:
        raise SystemExit("pyright looked at no file; see [tool.basedpyright] in pyproject.toml")
    errors = collections.defaultdict(list)
    for one in told["generalDiagnostics"]:
        if one["severity"] == "error":
            name = Path(one["file"]).relative_to(ROOT).as_posix()
            message = one["message"].splitlines()[0]
            errors[name].append(f"{name}:{one['range']['start']['line'] + 1}: {message} [{one.get('rule', 'syntax')}]")
    return errors


def judged(errors: dict[str, list[str]], known: dict[str, int]) -> tuple[list[str], dict[str, int]]:
    """The lines of the modules that have more errors than they had, and the numbers to write down."""
    worse = {name for name, lines in errors.items() if len(lines) > known.get(name, 0)}
    lines = [line for name in sorted(worse) for line in [*errors[name], f"{name}: {known.get(name, 0)} errors before"]]
    lower = {name: min(number, len(errors.get(name, []))) for name, number in known.items()}
    return lines, {name: number for name, number in sorted(lower.items()) if number}


def main() -> int:
    parser = argparse.ArgumentParser(description="Fail if pyright finds more errors in a module than it did.")
    parser.add_argument("--accept", action="store_true", help="write the numbers down as they are")
    accept = parser.parse_args().accept
    errors, known = found(), json.loads(KNOWN.read_text())
    worse, numbers = judged(errors, known)
    if accept:
        worse, numbers = [], {name: len(lines) for name, lines in sorted(errors.items())}
    if numbers != known:
        KNOWN.write_text(json.dumps(numbers, indent=1) + "\n")
    for line in worse:
        sys.stderr.write(f"{line}\n")
    sys.stdout.write(f"pyright: {sum(map(len, errors.values()))} errors, {sum(numbers.values())} allowed\n")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
