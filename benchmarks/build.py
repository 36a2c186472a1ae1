"""How long the book takes to build: cold, and again after each kind of change; and every chapter's own seconds.

    python benchmarks/build.py            # some eight minutes on two cores

The last commit is cloned to a temporary folder and built there with this environment, as `make book` builds: first with
nothing but the sources, then untouched, then after a sentence more in a chapter's text, then after a line more in its
code, which executes that chapter again. Seconds are of the wall; each chapter's are those that its cells took in the
cold build. Written to results/benchmarks/build.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from geodesic import records
from jupyter_cache import get_cache

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = "continuity"


def build(folder: Path) -> float:
    """Seconds of one `make book`, the environment being there."""
    environment = os.environ | {"PYTHONPATH": str(folder / "lib")}
    start = time.perf_counter()
    tool = str(Path(sys.executable).with_name("jupyter-book"))
    for command in ([sys.executable, "book/_ext/stale.py"], [tool, "build", "-W", "-n", "--keep-going", "."]):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return round(time.perf_counter() - start, 1)


def chapters(folder: Path) -> dict[str, float]:
    """Seconds that the cells of each chapter took."""
    found = get_cache(folder / "_build" / ".jupyter_cache").list_cache_records()
    return {Path(one.uri).stem: round(one.data["execution_seconds"], 1) for one in sorted(found, key=lambda r: r.uri)}


def add(path: Path, before: str, line: str) -> None:
    """One more line in a chapter, before the first that starts like this."""
    text = path.read_text(encoding="utf-8")
    if before not in text:
        raise ValueError(f"{path} has no {before!r}: choose another place for the change")
    path.write_text(text.replace(before, line + before, 1), encoding="utf-8")


def main() -> int:
    """Build four times, print the table and write it down."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    load, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "book"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        chapter = folder / "book" / f"{CHAPTER}.md"

        def clock(what: str) -> None:
            rows.append({"build": what, "seconds": build(folder)})
            print(f"{what:<30}{rows[-1]['seconds']:>8.1f} s", flush=True)

        clock("cold")
        seconds = chapters(folder)
        clock("nothing changed")
        add(chapter, "\n## ", "\nA sentence more.\n")
        clock("text of a chapter changed")
        add(chapter, "import ", "# a line more\n")
        clock("code of a chapter changed")
    for name, spent in seconds.items():
        print(f"  {name:<28}{spent:>8.1f} s")
    report = {
        "chapter": CHAPTER,
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "builds": rows,
        "chapters": seconds,
        "provenance": records.provenance("cpu", sum(row["seconds"] for row in rows)),
    }
    target = ROOT / "results" / "benchmarks" / "build.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
