"""Sweeps: what a grid means, and that nothing is lost or done twice whatever is killed.

The runs are real kernels on real Dask workers. Most execute a notebook of a few lines that notes in a file when it
starts and ends, so that a test can count, and waits in between until a test opens a gate: nothing depends on how fast
the machine is. `slow` marks the grid of 200 runs.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed
import geodesic
import nbformat
import psutil
import pytest
from geodesic import experiment, records, store, sweep
from geodesic.__main__ import main
from geodesic.sweep import dispatch, kernel, progress, worker
from PIL import Image
from safetensors import safe_open

EXPERIMENT = records.ROOT / "notebooks" / "experiment.ipynb"
GRIDS = sorted((records.ROOT / "notebooks" / "grids").glob("*.toml"))
PATIENCE = 600  # seconds, on a machine however busy
SMALL = """
epochs = 1
batch_size = 64
width = 8
n_train = 200
eval_points = 50
ots_points = [20]
"""
NOTED = """
import os, time
with open(log, "a") as file: file.write(f"start {seed} {os.getpid()}\\n")
while seed >= held and not os.path.exists(log + ".gate"): time.sleep(0.02)
if task: exec(task)
with open(log, "a") as file: file.write(f"end {seed} {os.getpid()}\\n")
"""
SHOWN = """from IPython.display import JSON
JSON({'square': seed**2} | {key: os.environ.get(key) for key in ('OMP_NUM_THREADS', 'MALLOC_TRIM_THRESHOLD_')})"""


def write_notebook(path, parameters, *cells):
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    book = nbformat.v4.new_notebook(
        cells=[*([tagged] if parameters else []), *map(nbformat.v4.new_code_cell, cells)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(book, path)


@pytest.fixture
def noted(tmp_path):
    """Write a grid over the noting notebook, whose runs from the seed `held` on wait; returns the path of the grid."""

    def write(text, name="grid"):
        parameters = f"seed = 0\nscale = 1.0\nheld = 1000\ntask = ''\nlog = {str(tmp_path / 'log')!r}"
        write_notebook(tmp_path / "noted.ipynb", parameters, NOTED, SHOWN)
        path = tmp_path / f"{name}.toml"
        path.write_text(f'notebook = "noted.ipynb"\nout = "out"\n{text}')
        return path

    return write


def open_gate(folder):
    (folder / "log.gate").touch()


@pytest.fixture
def digits(tmp_path):
    """Write a grid over the experiment notebook, small settings included; returns the path of the grid."""

    def write(text, settings=SMALL):
        path = tmp_path / "digits.toml"
        path.write_text(f'notebook = "{EXPERIMENT}"\nout = "out"\n[settings]{settings}{text}')
        return path

    return write


def notes(folder):
    """What the runs noted: (start or end, seed) → how often."""
    counts = {}
    if (folder / "log").exists():
        for line in (folder / "log").read_text().splitlines():
            word, seed, _ = line.split()
            counts[word, int(seed)] = counts.get((word, int(seed)), 0) + 1
    return counts


def kernels(folder, *seeds):
    """Process ids of the kernels that noted something, or of those with these seeds."""
    if not (folder / "log").exists():
        return set()
    lines = [line.split() for line in (folder / "log").read_text().splitlines()]
    return {int(pid) for _, seed, pid in lines if not seeds or int(seed) in seeds}


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
    return value


def wait_for_end(pids):
    for pid in pids:
        wait_for(lambda pid=pid: not psutil.pid_exists(pid) or dead(pid), f"the end of process {pid}")


def dead(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def start(*arguments, **options):
    """A command of the project in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def stop(*processes):
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


@contextlib.contextmanager
def dask(folder, workers, environment=None):
    """A scheduler and workers on the loopback address: the address, and the scheduler's process."""
    file = folder / "scheduler.json"
    command = ("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard")
    started = [start(*command, "--scheduler-file", file)]
    try:
        address = wait_for(lambda: file.exists() and json.loads(file.read_text())["address"], "the scheduler")
        light = {"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False"}
        options = {"env": light | (environment or {}), "cwd": records.ROOT}
        command = ("distributed.cli.dask_worker", address, "--nthreads", 1, "--no-dashboard")
        started.extend(start(*command, **options) for _ in range(workers))
        yield address, started[0]
    finally:
        stop(*started)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The options of a sweep on two workers that the tests share; those that kill start their own."""
    with dask(tmp_path_factory.mktemp("cluster"), 2) as (address, _):
        yield ["--scheduler", address, "--threads", "1"]


# What a grid means


def test_runs_are_the_product_of_the_axes_in_the_order_of_the_file(noted):
    grid = sweep.read(noted("[settings]\nscale = 2\n[axes]\nseed = [2, 1]\ntask = ['', 'pass']"))
    assert [(run.settings["seed"], run.settings["task"]) for run in grid.runs] == [
        (2, ""), (2, "pass"), (1, ""), (1, "pass"),
    ]  # fmt: skip
    assert {run.settings["scale"] for run in grid.runs} == {2.0}
    assert grid.runs[1].label == "seed=2 task=pass"


def test_tables_replace_what_the_file_shares_and_count_a_run_once(noted):
    """Table 1: seeds 0, 1 (fixed seed replaced by an axis); table 2: seed 1, as the file fixes it, scale 1 and 2."""
    grid = sweep.read(noted("[settings]\nseed = 1\n[[runs]]\naxes.seed = [0, 1]\n[[runs]]\naxes.scale = [1, 2]"))
    assert [(run.settings["seed"], run.settings["scale"]) for run in grid.runs] == [(0, 1.0), (1, 1.0), (1, 2.0)]


def test_an_experiment_has_the_name_that_the_command_run_gives_it(digits):
    """The settings that are left out are those of Settings, not those of the notebook's cell."""
    (run,) = sweep.read(digits("weight_decay = 0")).runs
    settings = experiment.Settings(epochs=1, batch_size=64, width=8, n_train=200, eval_points=50, ots_points=(20,))
    assert run.settings == settings.to_dict()
    assert run.name == records.name(settings.to_dict())


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_committed_grids_can_be_read(path):
    assert len(sweep.read(path).runs) >= 2


def test_every_committed_mnist_record_is_a_run_of_its_grid():
    grid = sweep.read(records.ROOT / "notebooks" / "grids" / "mnist.toml")
    assert grid.out.resolve() == (records.RESULTS / "mnist").resolve()
    assert {path.stem for path in grid.out.glob("*.json")} <= {run.name for run in grid.runs}


@pytest.mark.parametrize("changed", ["data.py", "sweep/grid.py"])
def test_a_changed_library_makes_a_kept_plan_void(noted, tmp_path, monkeypatch, changed):
    """Whichever of its folders the change is in."""
    path, copy = noted("[axes]\nseed = [0]"), tmp_path / "geodesic"
    shutil.copytree(Path(geodesic.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = sweep.read(path).digest
    monkeypatch.setattr(store, "__file__", str(copy / "store.py"))
    monkeypatch.setattr(store, "library", store.library.__wrapped__)  # which is asked once a process
    assert sweep.read(path).digest == before
    with open(copy / changed, "a") as file:
        file.write("\n")
    assert sweep.read(path).digest != before


def test_a_changed_notebook_makes_a_kept_plan_void(noted, tmp_path):
    path = noted("[axes]\nseed = [0, 1]")
    sweep.keep_plan(sweep.read(path))
    assert [run.settings["seed"] for run in sweep.read(path).runs] == [0, 1]
    write_notebook(tmp_path / "noted.ipynb", "seed = 0\nother = 1", "pass")
    assert [run.settings for run in sweep.read(path).runs] == [
        {"notebook": "noted", "seed": seed, "other": 1} for seed in (0, 1)
    ]


def test_time_is_estimated_from_records_of_like_runs(digits, tmp_path):
    """Two records of 10 epochs: 3 and 5 s outside training, 2 and 4 s an epoch; medians 4 + 20 · 3 = 64 s."""
    path = digits(
        "[axes]\nweight_decay = [0.1]\nnetwork = ['resnet', 'plain']", SMALL.replace("epochs = 1", "epochs = 20")
    )
    grid = sweep.read(path)
    like = next(run for run in grid.runs if run.settings["network"] == "resnet")
    for seed, (outside, epoch) in enumerate(((3, 2), (5, 4))):
        time = {"seconds": outside + 10 * epoch, "training_seconds": 10 * epoch}
        record = {"settings": like.settings | {"epochs": 10, "seed": seed}, "status": "ok", "final": None}
        records.write(record | {"provenance": time}, grid.out)
    assert progress.estimate(grid) == {like.name: pytest.approx(64)}


def test_what_is_left_is_told_from_like_runs_and_from_the_pace():
    """a took twice what was expected: b will, too, 2 · 30 s; c, without like runs, takes the mean of what ended."""
    assert progress.remaining(["b", "c"], {"a": 20.0}, {"a": 10.0, "b": 30.0}) == 60 + 20
    assert progress.remaining(["b", "c"], {}, {"b": 30.0}) == 30 + 30
    assert progress.remaining(["b", "c"], {}, {}) is None


# Bad input: one line, nothing begun


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[axes]\nwieght_decay = [1]", "unknown setting wieght_decay; did you mean weight_decay?"),
        ("[axes]\nlambda_value = [1]", "unknown setting lambda_value; there are: weight_decay, decay, epochs"),
        ("[axis]\nseed = [1]", "unknown entry axis; did you mean axes?"),
        ("[[runs]]\nsetting.seed = 1", "table 1 of [[runs]]: unknown entry setting; did you mean settings?"),
        ("[axes]\nseed = []", "axis seed is empty; give it a value or leave it out"),
        ("[axes]\nseed = 3", "axis seed = 3 must be a list of values"),
        ("[axes]\nseed = [0, 1.5]", "seed = 1.5 must be a whole number"),
        ("[axes]\nseed = [true]", "seed = True must be a whole number"),
        ("[settings]\nweight_decay = 'big'", "weight_decay = 'big' must be a number"),
        ("[settings]\nweight_decay = [0.1, 0.2]", "must be a number; put it under axes"),
        ("[settings]\nots_points = [1.5]", "ots_points = [1.5] must be a list of whole numbers"),
        ("[settings]\nseed = 1\n[axes]\nseed = [2]", "seed is both a fixed setting and an axis"),
        ("[settings]\ndevice = 'cuda'", "device says where to run, not what; give it on the command line as --device"),
        ("[axes]\nweight_decay = [-1]", "weight_decay=-1.0 must be finite and at least 0"),
        ("[settings]\nnetwork = 'vgg'", "network='vgg' is unknown"),
        ("runs = []", "[[runs]] is empty"),
        ("runs = 3", "runs must be [[runs]], not 3"),
        ("axes = 3", "axes must be a table, not 3"),
        ("[axes", "is not TOML"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "grid.toml"
    path.write_text(f'notebook = "{EXPERIMENT}"\n{text}')
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("", "has no cell tagged `parameters`; tag the cell"),
        ("seed = open", "holds more than plain `name = value`"),
        ("dataset = network = 1", "unknown setting seed; there are: dataset, network"),
        ("dataset = network = weight_decay = epochs = seed = 0", "lacks augment, batch_size"),
    ],
)
def test_a_notebook_that_cannot_take_parameters_is_refused(tmp_path, capsys, parameters, message):
    write_notebook(tmp_path / "odd.ipynb", parameters, "pass")
    (tmp_path / "grid.toml").write_text('notebook = "odd.ipynb"\n[axes]\nseed = [0]')
    assert main(["sweep", str(tmp_path / "grid.toml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('notebook = "none.ipynb"', "no notebook "),
        ('notebook = "grid.toml"', "is not a notebook"),
        ("", "names no notebook"),
        ("notebook = 3", "notebook must be a string, not 3"),
    ],
)
def test_a_grid_without_a_notebook_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "grid.toml").write_text(text)
    assert main(["sweep", str(tmp_path / "grid.toml")]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_grid_is_named(capsys):
    assert main(["sweep", "none.toml"]) == 2
    assert "no grid none.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dataset": "mars"}, ValueError, "data set 'mars' is unknown"),
        ({"dataset": "mnist"}, FileNotFoundError, "no intact MNIST under /nowhere"),
        ({"n_train": 9999}, ValueError, "n_train=9999 is not within"),
        ({"ots_points": [5000]}, ValueError, "ots_points=.5000,.: the first must not be more than the 360"),
        ({"batch_size": 5000}, ValueError, "batch_size=5000 is more than the 1437 training points"),
        ({"stages": 4}, ValueError, "stages=4"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_found_before_any_run(settings, error, message):
    with pytest.raises(error, match=message):
        sweep.check([{"ots_points": [20]}, {"ots_points": [20]} | settings], "/nowhere", "cpu", False)


def test_a_scheduler_that_does_not_answer_is_named(noted, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "_ANSWER", 1.0)
    assert main(["sweep", str(noted("[axes]\nseed = [0]")), "--scheduler", "tcp://127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert "no Dask scheduler answers at tcp://127.0.0.1:1 within 1 s" in error
    assert error.count("\n") == 1


def test_a_worker_of_another_version_is_refused(noted, tmp_path, capsys):
    """The worker imports a copy of the package whose version was changed."""
    package = tmp_path / "old" / "geodesic"
    shutil.copytree(Path(geodesic.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text('__version__ = "0.0.9"\n')
    with dask(tmp_path, 1, {"PYTHONPATH": str(tmp_path / "old")}) as (address, _):
        assert main(["sweep", str(noted("[axes]\nseed = [0]")), "--scheduler", address]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "differs: geodesic 0.0.9 (client: 0.1.0); install the same there" in error
    assert notes(tmp_path) == {}


def test_a_worker_that_does_not_see_the_folder_is_found(tmp_path):
    assert "cannot use the sweep's folders" in worker.inspect(str(tmp_path / "no.token"), ".")["problem"]
    (tmp_path / "a.token").touch()
    assert worker.inspect(str(tmp_path / "a.token"), ".")["problem"] == ""


# Runs


def test_an_experiment_is_computed_once_and_equals_a_direct_run(digits, cluster, tmp_path, capsys, monkeypatch):
    """Two runs through kernels, papermill and Dask; their numbers are those of the library, bit for bit."""
    path = digits("[axes]\nnetwork = ['resnet', 'plain']")
    assert main(["sweep", str(path), "--dry-run"]) == 0
    assert "2 runs: 0 recorded, 2 to compute" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(["sweep", str(path), *cluster]) == 0
    said = capsys.readouterr()
    assert said.out == "2 runs: 0 reused, 2 computed, 0 failed\n"
    assert "2 runs: 0 recorded, 2 to compute on 2 workers" in said.err
    assert "[2/2] computed" in said.err
    for run in sweep.read(path).runs:
        record = records.read(tmp_path / "out" / f"{run.name}.json")
        assert record["final"] == experiment.run(experiment.Settings.from_dict(run.settings))["final"]
        executed = nbformat.read(tmp_path / "out" / "notebooks" / f"{run.name}.ipynb", 4)
        outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
        assert any(f"{record['status']} after" in output.get("text", "") for output in outputs)
        assert any("<svg" in str(output.get("data", "")) for output in outputs)
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []
    monkeypatch.setattr(dispatch, "execute", lambda *_: pytest.fail("executed again"))
    assert main(["sweep", str(path)]) == 0
    assert capsys.readouterr().out == "2 runs: 2 reused, 0 computed, 0 failed\n"


FAULTS = {
    0: "pass",
    1: "raise ValueError('as planned')",
    2: "os.kill(os.getpid(), 9)",
    3: "bytearray(1 << 62)",
}
HANG = "import ctypes; ctypes.PyDLL(None).sleep(1000)"  # and holds the interpreter's lock


def test_failures_become_rows_and_the_others_go_on(noted, cluster, tmp_path, capsys):
    """An exception, a dead kernel and no memory are told apart; the fourth run ends."""
    path = noted(f"[settings]\ntask = {json.dumps(f'exec({FAULTS!r}[seed])')}\n[axes]\nseed = [1, 2, 3, 0]")
    assert main(["sweep", str(path), *cluster[:2], "--threads", "3"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "4 runs: 0 reused, 1 computed, 3 failed"
    rows = {run.settings["seed"]: tmp_path / "out" / "failures" / f"{run.name}.json" for run in sweep.read(path).runs}
    found = {seed: json.loads(row.read_text()) for seed, row in rows.items() if row.exists()}
    assert {seed: row["status"] for seed, row in found.items()} == {1: "error", 2: "died", 3: "error"}
    assert found[1]["last_lines"][-1] == "ValueError: as planned"
    assert found[3]["last_lines"][-1] == "MemoryError: "
    (record,) = records.load(tmp_path / "out")
    # Dask's nanny sets the second; it would cost a training run a third of its time.
    assert record["final"] == {"square": 0, "OMP_NUM_THREADS": "3", "MALLOC_TRIM_THRESHOLD_": None}


def test_a_hung_run_is_stopped_at_its_timeout(noted, cluster, tmp_path, capsys):
    path = noted(f"[settings]\ntask = {json.dumps(HANG)}\n[axes]\nseed = [0]")
    assert main(["sweep", str(path), *cluster, "--timeout", "10"]) == 1
    assert "timeout" in capsys.readouterr().out
    (row,) = (tmp_path / "out" / "failures").iterdir()
    assert json.loads(row.read_text())["last_lines"][-1] == "stopped after 10 s"
    wait_for_end(kernels(tmp_path))


def test_a_kernel_that_has_not_started_when_its_time_is_up_is_stopped_too(tmp_path):
    write_notebook(tmp_path / "a.ipynb", "n = 0", HANG)
    options = {"timeout": 0.01, "environment": dict(os.environ), "cwd": str(tmp_path)}
    assert kernel.execute(str(tmp_path / "a.ipynb"), tmp_path / "b.ipynb", {}, **options).why == "timeout"


def test_a_forked_kernel_is_a_kernel_like_any_other(tmp_path):
    """Same outputs, another process group, a global random state of its own, and dead when its time is up."""
    imports = "import os\nimport numpy as np\nfrom IPython.display import JSON"
    write_notebook(tmp_path / "a.ipynb", "hang = False", imports,
                   "JSON([os.getpid(), os.getpgid(0), np.random.rand(), os.environ['OMP_NUM_THREADS'], os.getcwd()])",
                   f"if hang: {HANG}")  # fmt: skip
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    options = {"timeout": float(PATIENCE), "environment": os.environ | threads, "cwd": str(tmp_path), "warm": True}
    found = [kernel.execute(str(tmp_path / "a.ipynb"), tmp_path / "b.ipynb", {}, **options) for _ in range(2)]
    assert [one.why for one in found] == ["", ""]
    (pid, group, random, count, folder), (_, _, other, _, _) = (one.displayed for one in found)
    assert (group, count, folder) == (pid, "1", str(tmp_path))
    assert random != other
    (parent,) = kernel._parents.values()
    assert parent._able  # they were forked, not started afresh
    late = kernel.execute(str(tmp_path / "a.ipynb"), tmp_path / "b.ipynb", {"hang": True}, **options | {"timeout": 4.0})
    assert late.why == "timeout"


def test_retries_give_a_failed_run_another_chance(noted, cluster, tmp_path, capsys):
    once = "import pathlib; p = pathlib.Path(log + '.once'); seen = p.exists(); p.touch(); assert seen"
    path = noted(f"[settings]\ntask = {json.dumps(once)}\n[axes]\nseed = [7]")
    assert main(["sweep", str(path), *cluster, "--retries", "1"]) == 0
    assert capsys.readouterr().out == "1 runs: 0 reused, 1 computed, 0 failed\n"
    assert notes(tmp_path) == {("start", 7): 2, ("end", 7): 1}
    assert list((tmp_path / "out" / "failures").iterdir()) == []


def test_a_diverged_network_is_a_failure_that_is_not_repeated(digits, cluster, capsys, monkeypatch):
    path = digits("learning_rate = 1e6\nschedule = 'constant'")
    assert main(["sweep", str(path), *cluster, "--retries", "3"]) == 1
    first = capsys.readouterr().out
    assert "diverged" in first
    assert "training loss by epoch: " in first
    assert first.splitlines()[-1] == "1 runs: 0 reused, 0 computed, 1 failed"
    monkeypatch.setattr(dispatch, "execute", lambda *_: pytest.fail("executed again"))
    assert main(["sweep", str(path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 runs: 0 reused, 0 computed, 1 failed"


def test_half_written_files_are_ignored_and_cleared_away(noted, cluster, tmp_path, capsys):
    path = noted("[axes]\nseed = [0, 1]")
    first, second = sweep.read(path).runs
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    partial = tmp_path / "out" / "checkpoints" / f"{first.name}.4711.partial"
    partial.write_text("half")
    (tmp_path / "out" / f"{first.name}.json").write_text('{"settings": {"seed": 0')
    made = {"provenance": {"code": second.code}, "status": "ok", "final": None}
    other = {"settings": second.settings | {"scale": 9.0}} | made
    (tmp_path / "out" / f"{second.name}.json").write_text(json.dumps(other))  # of other settings
    assert main(["sweep", str(path), *cluster]) == 0
    said = capsys.readouterr()
    assert said.out == "2 runs: 0 reused, 2 computed, 0 failed\n"
    assert "2 to compute (2 again: their records are damaged" in said.err
    assert not partial.exists()
    assert [record["final"]["square"] for record in records.load(tmp_path / "out")] in ([0, 1], [1, 0])


# What makes a record void


def keep(grid, **provenance):
    """Write a record of every run by hand."""
    for run in grid.runs:
        about = {"geodesic": "0.1.0", "seconds": 1.0, "code": run.code} | provenance
        about = {key: value for key, value in about.items() if value is not None}
        records.write({"settings": run.settings, "status": "ok", "final": None, "provenance": about}, grid.out)


def recorded(path):
    grid = sweep.read(path)
    return [worker.recorded(grid.out, run) is not None for run in grid.runs]


@pytest.mark.parametrize(("version", "same"), [("0.1.0", True), ("0.1.7", True), ("0.2.0", False), ("1.1.0", False)])
def test_versions_that_differ_in_their_first_two_numbers_do_not_share_records(digits, version, same):
    path = digits("")
    keep(sweep.read(path), geodesic=version, code=None)  # experiment.run writes the version only
    assert recorded(path) == [same]


def test_a_changed_notebook_makes_its_records_void(noted, tmp_path):
    path = noted("[axes]\nseed = [0, 1]")
    keep(sweep.read(path))
    assert recorded(path) == [True, True]
    book = nbformat.read(tmp_path / "noted.ipynb", 4)
    book.cells.append(nbformat.v4.new_markdown_cell("Words change no number."))
    nbformat.write(book, tmp_path / "noted.ipynb")
    assert recorded(path) == [True, True]
    book.cells[1].source += "\npass"
    nbformat.write(book, tmp_path / "noted.ipynb")
    assert recorded(path) == [False, False]


def test_changed_images_make_their_records_void(digits, tmp_path, monkeypatch):
    """The record of an image folder holds until one of its images is another; without the folder nothing is known."""
    monkeypatch.setenv("GEODESIC_CACHE", str(tmp_path / "cache"))
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "images" / place).mkdir(parents=True)
        Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "images" / place / "0.png")
    path = digits(f"dataset = 'folder:{tmp_path / 'images'}'")
    (run,) = sweep.read(path).runs
    keep(sweep.read(path), data_fingerprint=run.data)
    assert recorded(path) == [True]
    Image.new("RGB", (8, 8), (3, 2, 1)).save(tmp_path / "images" / "train" / "a" / "0.png")
    assert recorded(path) == [False]
    (tmp_path / "images").rename(tmp_path / "away")
    assert recorded(path) == [True]


# What is killed


def test_a_lock_ends_with_the_last_process_that_inherited_it(tmp_path):
    """A parent takes it and is killed; its child, which sleeps, still holds it; then the child is killed too."""
    code = (
        "import os, sys, subprocess\nfrom geodesic.sweep import worker\nfrom pathlib import Path\n"
        "with worker.lock(Path(sys.argv[1])) as held:\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], pass_fds=[held],"
        " stdout=subprocess.DEVNULL)\n"
        "    print(child.pid, flush=True)\n    child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    assert not free(tmp_path / "lock")
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: free(tmp_path / "lock"), "the lock of two dead processes")


def free(path):
    with worker.lock(path) as held:
        return held is not None


def test_a_worker_killed_in_mid_run_costs_that_run_only(noted, tmp_path):
    """Two workers of a running cluster; the one with seed 0 is killed: its kernel ends, the run begins again.

    The scheduler keeps back what no worker can begin: of six runs at most two a worker are with the workers.
    """
    path = noted("[settings]\nheld = 0\n[axes]\nseed = [0, 1, 2, 3, 4, 5]")
    names = {run.settings["seed"]: run.name for run in sweep.read(path).runs}
    with dask(tmp_path, 2) as (address, _):
        sweeping = start("geodesic", "sweep", path, "--scheduler", address)
        wait_for(lambda: {("start", 0), ("start", 1)} <= notes(tmp_path).keys(), "the first runs")
        with distributed.Client(address) as client:
            assert sum(map(len, client.processing().values())) <= 4
        (kernel,) = kernels(tmp_path, 0)
        os.kill(int((tmp_path / "out" / "locks" / names[0]).read_text().split()[1]), signal.SIGKILL)
        wait_for_end([kernel])
        open_gate(tmp_path)
        out, error = sweeping.communicate(timeout=PATIENCE)
    assert out == "6 runs: 0 reused, 6 computed, 0 failed\n", error
    counts = notes(tmp_path)
    assert [counts["end", seed] for seed in range(6)] == [1] * 6
    assert counts["start", 0] == 2
    assert sum(counts["start", seed] for seed in range(6)) == 7
    assert sorted(record["final"]["square"] for record in records.load(tmp_path / "out")) == [0, 1, 4, 9, 16, 25]


def test_a_killed_client_is_restarted_where_it_was(noted, tmp_path):
    """Killed after two of five runs: they are reused, none is computed twice, and no process of it stays behind."""
    path = noted("[settings]\nheld = 2\n[axes]\nseed = [0, 1, 2, 3, 4]")
    first = start("geodesic", "sweep", path, "--workers", 2)
    wait_for(lambda: {("start", 2), ("start", 3)} <= notes(tmp_path).keys(), "two runs, and the beginning of two more")
    wait_for(lambda: len(list((tmp_path / "out").glob("*.json"))) == 2, "two records")
    offspring = [process.pid for process in psutil.Process(first.pid).children(recursive=True)]
    stop(first)
    wait_for_end(offspring)
    open_gate(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json")}
    second = start("geodesic", "sweep", path, "--workers", 2)
    out, error = second.communicate(timeout=PATIENCE)
    assert out == "5 runs: 2 reused, 3 computed, 0 failed\n", error
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [notes(tmp_path)["end", seed] for seed in range(5)] == [1] * 5


def test_after_a_power_cut_a_run_continues_from_its_last_epoch(digits, tmp_path):
    """Every process is killed at once; the epochs in the checkpoint are in the record, wall times included.

    The notebook is the experiment's, but waits after the second epoch until the gate opens.
    """
    path = digits("", SMALL.replace("epochs = 1", "epochs = 4"))
    book = nbformat.read(EXPERIMENT, 4)
    place = next(i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", []))
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(WAITING.format(gate=str(tmp_path / "log.gate"))))
    nbformat.write(book, tmp_path / "waiting.ipynb")
    path.write_text(path.read_text().replace(str(EXPERIMENT), "waiting.ipynb"))
    (run,) = sweep.read(path).runs
    checkpoint = tmp_path / "out" / "checkpoints" / f"{run.name}.safetensors"
    first = start("geodesic", "sweep", path, "--workers", 1, "--threads", 1)
    wait_for(checkpoint.with_suffix(".waiting").exists, "the second epoch")
    everything = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    for process in everything:
        process.kill()
    stop(first)
    wait_for_end([process.pid for process in everything])
    with safe_open(checkpoint, "pt") as file:
        history = json.loads(file.metadata()["history"])
    assert len(history) == 3  # untrained, and two epochs
    (tmp_path / "out" / f"{run.name}.4711.partial").write_text("half a record")
    open_gate(tmp_path)
    second = start("geodesic", "sweep", path, "--workers", 1, "--threads", 1)
    out, error = second.communicate(timeout=PATIENCE)
    assert out == "1 runs: 0 reused, 1 computed, 0 failed\n", error
    record = records.read(tmp_path / "out" / f"{run.name}.json")
    assert [entry["seconds"] for entry in record["epochs"][:3]] == [entry["seconds"] for entry in history]
    for kept, entry in zip(record["epochs"], history, strict=False):
        assert kept["train"]["loss"] == pytest.approx(entry["train"]["loss"], rel=1e-4)  # a record rounds
    assert len(record["epochs"]) == 5
    assert not checkpoint.exists()
    assert list((tmp_path / "out").glob("*.partial")) == []


WAITING = """
import time
from pathlib import Path
from geodesic import checkpoints as states, training  # `checkpoints` is a parameter of the notebook

training._SAVE_EVERY = -1

def save(path, network, optimiser, generator, progress, identity, _save=states.save):
    _save(path, network, optimiser, generator, progress, identity)
    if progress.epoch == 2:
        path.with_suffix(".waiting").touch()
        while not Path({gate!r}).exists():
            time.sleep(0.02)

states.save = save
"""


def test_a_killed_scheduler_ends_the_sweep_in_one_line_and_loses_nothing(noted, tmp_path):
    path = noted("[settings]\nheld = 1\n[axes]\nseed = [0, 1, 2]")
    with dask(tmp_path, 1) as (address, scheduler):
        client = start("geodesic", "sweep", path, "--scheduler", address)
        wait_for(lambda: ("start", 1) in notes(tmp_path), "the second run")
        scheduler.kill()
        _, error = client.communicate(timeout=PATIENCE)
    assert client.returncode == 2
    assert "the scheduler went away" in error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert len(list((tmp_path / "out").glob("*.json"))) == 1
    wait_for_end(kernels(tmp_path))
    open_gate(tmp_path)
    last = start("geodesic", "sweep", path, "--workers", 1)
    out, error = last.communicate(timeout=PATIENCE)
    assert out.endswith(" 0 failed\n"), error
    assert len(list(records.load(tmp_path / "out"))) == 3
    assert [notes(tmp_path)["end", seed] for seed in range(3)] == [1] * 3


def test_two_sweeps_on_one_folder_share_the_work(noted, tmp_path):
    """Each holds one run, and with it the other away from that run, until both have begun."""
    path = noted("[settings]\nheld = 0\n[axes]\nseed = [0, 1, 2, 3]")
    both = [start("geodesic", "sweep", path, "--workers", 1) for _ in range(2)]
    wait_for(lambda: len(notes(tmp_path)) == 2, "a run of each sweep")
    open_gate(tmp_path)
    outs = [one.communicate(timeout=PATIENCE) for one in both]
    assert [one.returncode for one in both] == [0, 0], outs
    counts = [[int(part.split()[0]) for part in out.split(": ")[1].split(", ")] for out, _ in outs]
    assert [sum(one) for one in counts] == [4, 4]
    assert sum(computed for _, computed, _ in counts) == 4
    assert min(computed for _, computed, _ in counts) >= 1
    assert notes(tmp_path) == {(word, seed): 1 for word in ("start", "end") for seed in range(4)}


def test_a_full_disk_fails_the_run_and_leaves_nothing_half(digits, tmp_path):
    """No process may write a file beyond 12 kB, and a record has 19: as on a full disk, write() itself refuses."""
    path = digits("")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # noqa: E731
    full = start("geodesic", "sweep", path, "--workers", 1, "--threads", 1, preexec_fn=limit)
    out, error = full.communicate(timeout=PATIENCE)
    assert full.returncode == 1, error
    assert "OSError: [Errno 27] File too large" in out
    assert list((tmp_path / "out").glob("*.json")) == []
    assert list((tmp_path / "out").glob("**/*.partial")) == []
    again = start("geodesic", "sweep", path, "--workers", 1, "--threads", 1)
    out, error = again.communicate(timeout=PATIENCE)
    assert out == "1 runs: 0 reused, 1 computed, 0 failed\n", error
    assert len(list(records.load(tmp_path / "out"))) == 1


def test_a_finished_grid_of_200_is_recognised_in_two_seconds(digits, tmp_path):
    """Processor time, which other work on the machine does not stretch; the records are written by hand."""
    path = digits(f"[axes]\nseed = {list(range(200))}")
    grid = sweep.read(path)
    provenance = {"geodesic": worker.versions()["geodesic"], "seconds": 1.0}
    padding = {"status": "ok", "final": None, "epochs": [[0.0] * 4000], "provenance": provenance}
    for run in grid.runs:
        records.write({"settings": run.settings} | padding, grid.out)
    sweep.keep_plan(grid)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(
        [sys.executable, "-m", "geodesic", "sweep", path], capture_output=True, text=True, check=True
    ).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert out == "200 runs: 200 reused, 0 computed, 0 failed\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_gpus_are_dealt_out_to_the_workers_in_turn(monkeypatch):
    import distributed

    job = worker.Job("", {}, "", "", None, {}, "", "", "", True, 1.0, None, ("2", "5"), {})
    seen = []
    for name in ("0", "1", "2"):
        monkeypatch.setattr(distributed, "get_worker", lambda name=name: type("Worker", (), {"name": name}))
        seen.append(worker._environment(job)["CUDA_VISIBLE_DEVICES"])
    assert seen == ["2", "5", "2"]


@pytest.mark.slow
def test_200_runs_survive_a_worker_and_two_clients(noted, tmp_path):
    """Kill a worker, then the client, twice over; in the end every run is done, and hardly one was done twice."""
    path = noted(f"[axes]\nseed = {list(range(200))}")
    killed = 0
    for _ in range(2):
        done = len(list((tmp_path / "out").glob("*.json")))
        client = start("geodesic", "sweep", path, "--workers", 2)
        wait_for(lambda done=done: len(list((tmp_path / "out").glob("*.json"))) >= done + 20, "20 more records")
        children = psutil.Process(client.pid).children()
        next(child for child in children if "spawn_main" in " ".join(child.cmdline())).kill()
        killed += 1
        wait_for(lambda done=done: len(list((tmp_path / "out").glob("*.json"))) >= done + 40, "20 more records")
        stop(client)
        killed += 2
    last = start("geodesic", "sweep", path, "--workers", 2)
    out, error = last.communicate(timeout=1800)
    assert out.endswith(" 0 failed\n"), error
    assert sorted(record["final"]["square"] for record in records.load(tmp_path / "out")) == [n**2 for n in range(200)]
    ends = [notes(tmp_path)["end", seed] for seed in range(200)]
    assert min(ends) == 1
    assert sum(ends) <= 200 + killed
