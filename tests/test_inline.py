"""Runs in process: no notebook, papermill or Dask; the records of any sweep; a budget that is kept."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from geodesic import experiment, records, sweep
from geodesic.__main__ import main
from geodesic.sweep import inline
from safetensors.torch import save_file

SETTINGS = {"epochs": 2, "batch_size": 64, "n_train": 200, "width": 8, "ots_points": [50], "eval_points": 50}


@pytest.fixture
def grid(tmp_path):
    """Six short runs."""

    def write(**settings):
        path = tmp_path / "grid.toml"
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in (SETTINGS | settings).items())
        notebook = Path(__file__).parents[1] / "notebooks" / "experiment.ipynb"
        axes = '[axes]\nseed = [0, 1, 2]\nnetwork = ["resnet", "plain"]'
        path.write_text(f'notebook = "{notebook}"\nout = "records"\n[settings]\n{lines}\n{axes}\n', encoding="utf-8")
        return path

    return write


def run(path, *options):
    return main(["sweep", str(path), "--in-process", "--quiet", *map(str, options)])


def test_the_records_are_those_of_experiment_run(grid, tmp_path, capsys):
    """On two processes; a second call finds everything done."""
    path = grid()
    assert run(path, "--processes", 2) == 0
    assert "6 runs: 0 reused, 6 computed, 0 failed" in capsys.readouterr().out
    assert run(path) == 0
    assert "6 runs: 6 reused, 0 computed, 0 failed" in capsys.readouterr().out
    found = list(records.load(tmp_path / "records"))
    want = experiment.run(experiment.Settings.from_dict(found[0]["settings"]))
    assert (found[0]["status"], found[0]["final"]) == (want["status"], json.loads(json.dumps(want["final"])))
    assert not list((tmp_path / "records" / "checkpoints").glob("*"))


def test_where_one_process_trains_the_others_score_what_it_leaves(grid, tmp_path, capsys, monkeypatch):
    """As on a CUDA device; one kind of run diverges and has nothing to score."""
    monkeypatch.setattr(inline, "_trains_apart", lambda options: True)
    path = grid()
    path.write_text(
        path.read_text() + "[[runs]]\n[[runs]]\nsettings = { learning_rate = 1e6, schedule = 'constant' }\n"
    )
    assert run(path, "--processes", 2) == 1
    assert "12 runs: 0 reused, 6 computed, 6 failed" in capsys.readouterr().out
    found = {records.name(record["settings"]): record for record in records.load(tmp_path / "records")}
    assert sorted(record["status"] for record in found.values()).count("diverged") == 6
    one = next(record for record in found.values() if record["status"] == "ok")
    want = experiment.run(experiment.Settings.from_dict(one["settings"]))
    assert one["final"] == json.loads(json.dumps(want["final"]))
    assert not list((tmp_path / "records" / "checkpoints").glob("*"))


def test_nothing_of_the_books_tools_is_needed(grid):
    """With papermill, Dask and Jupyter forbidden in every process of the sweep."""
    code = textwrap.dedent("""
        import sys
        TOOLS = {"papermill", "dask", "distributed", "nbformat", "jupyter_client", "ipykernel"}
        class Forbid:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in TOOLS:
                    raise ImportError(f"{name} is forbidden here")
        sys.meta_path.insert(0, Forbid())
    """)
    path = grid()
    (path.parent / "sitecustomize.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "geodesic", "sweep", str(path), "--in-process", "--processes", "1", "--quiet"]
    environment = {"PYTHONPATH": f"{path.parent}:{Path(sweep.__file__).parents[2]}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "6 computed, 0 failed" in done.stdout, done.stderr
    assert done.returncode == 0


def test_a_budget_ends_the_sweep_and_the_same_command_goes_on(grid, tmp_path, capsys):
    """With no time at all nothing is begun; with time for some, what is under way is kept as a checkpoint."""
    path = grid(epochs=100000)
    assert run(path, "--budget", 0, "--processes", 1) == 0
    assert "0 computed, 0 failed, 6 left for the same command" in capsys.readouterr().out
    for budget in (8, 30, 90):  # on a busy machine a process may need all of a short one to start
        assert run(path, "--budget", budget, "--processes", 1) == 0
        assert "0 computed, 0 failed, 6 left for the same command" in capsys.readouterr().out
        if kept := list((tmp_path / "records" / "checkpoints").glob("*.safetensors")):
            break
    assert len(kept) == 1
    assert not list((tmp_path / "records").glob("*.json"))


def test_no_run_is_begun_that_is_not_expected_to_end(grid, tmp_path):
    """What ended here tells; a kind that nobody knows is tried."""
    runs = sweep.read(grid()).runs
    clock = inline._Clock(inline.time.monotonic(), 10.0, {runs[0].name: 100.0}, tmp_path)
    assert not clock.enough_for(runs[0])
    assert clock.enough_for(runs[1])  # another network: never seen
    clock.learn(inline.Outcome(runs[0].name, "computed", seconds=1.0))
    assert clock.enough_for(runs[0])
    clock.learn(inline.Outcome(runs[1].name, "computed", seconds=50.0))
    assert not clock.enough_for(runs[1])


def test_a_run_that_is_nearly_over_needs_little_of_the_budget(grid, tmp_path):
    """Nine of ten epochs are in its checkpoint: a tenth of what the whole run takes is left."""
    run = sweep.read(grid(epochs=10)).runs[0]
    clock = inline._Clock(inline.time.monotonic(), 10.0, {run.name: 50.0}, tmp_path)
    assert not clock.enough_for(run)
    save_file({"w": torch.zeros(1)}, records.checkpoint(run.settings, tmp_path), {"epoch": "9"})
    assert clock.enough_for(run)


def test_the_order_is_that_of_the_settings_asked_for(grid):
    runs = sweep.read(grid()).runs
    found = inline.ordered(runs, ["network", "seed"])
    assert [(run.settings["network"], run.settings["seed"]) for run in found] == [
        (network, seed) for network in ("plain", "resnet") for seed in range(3)
    ]
    assert inline.ordered(runs, []) == list(runs)
    with pytest.raises(ValueError, match="--order speed: no such setting; there are: augment"):
        inline.ordered(runs, ["speed"])


def test_runs_that_diverge_are_told_and_the_others_go_on(grid, capsys):
    """At a step size at which every network diverges all six are tried, the sweep says so and ends with 1."""
    path = grid(learning_rate=1e6, schedule="constant")
    assert run(path, "--processes", 1) == 1
    out = capsys.readouterr().out
    assert "diverged" in out
    assert "6 failed" in out


def test_refuses_another_notebook(tmp_path, capsys):
    (tmp_path / "own.ipynb").write_text(
        json.dumps({"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["a = 1\n"]}]}),
        encoding="utf-8",
    )
    (tmp_path / "grid.toml").write_text('notebook = "own.ipynb"\n[axes]\na = [1, 2]\n', encoding="utf-8")
    assert run(tmp_path / "grid.toml") == 2
    assert "--in-process runs the book's experiment" in capsys.readouterr().err
