"""Papermill with a kernel that cannot outstay its time: private sockets, its own process group, a hard deadline.

Papermill's own engine opens TCP ports that simultaneous kernels can snatch from each other (nteract/papermill#239), its
timeout is a request that a hung kernel does not hear, and it imports everything anew in every kernel, where ours is a
fork of a warm parent.
"""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from geodesic.sweep.warm import Parent

_START = 300.0  # seconds in which a kernel must answer, on a machine however busy


@dataclass(frozen=True)
class Ended:
    """How the execution of a notebook ended."""

    why: str  # "", or error, timeout, died
    lines: tuple[str, ...]  # the last output, then the error
    displayed: Any  # the last value that the notebook displayed as JSON


def execute(
    notebook: str,
    output: Path,
    parameters: dict[str, Any],
    *,
    timeout: float,
    environment: dict[str, str],
    cwd: str,
    keep_open: Sequence[int] = (),
    warm: bool = False,
) -> Ended:
    """Execute a notebook with papermill; whatever happens in it is in the answer.

    Args:
        notebook: path of the notebook.
        output: where papermill writes it, after every cell.
        parameters: for its parameters cell.
        timeout: seconds until the kernel and all that it started is killed.
        environment: of the kernel.
        cwd: its current folder.
        keep_open: file descriptors that the kernel inherits.
        warm: fork the kernel from a parent that has imported what an experiment needs.
    """
    with tempfile.TemporaryDirectory(prefix="geodesic-") as folder, tempfile.TemporaryFile() as stderr:
        manager = _Manager(transport="ipc", connection_file=f"{folder}/kernel.json")
        manager.parent_of_kernels = _parent(environment) if warm and sys.platform == "linux" else None
        launch = {"env": environment, "cwd": cwd, "pass_fds": keep_open, "stderr": stderr, "stdout": stderr}
        why, lines = "", []
        with _deadline(manager, timeout) as late:
            try:
                papermill.execute_notebook(
                    notebook, output, parameters, engine_name="geodesic", progress_bar=False,
                    manager=manager, launch=launch, start_timeout=_START,
                )  # fmt: skip
            except PapermillExecutionError as error:
                why, lines = "error", error.traceback or [f"{error.ename}: {error.evalue}"]
            except DeadKernelError:
                why, lines = "died", ["the kernel died: killed from outside, a crash, or out of memory"]
            except Exception as error:
                why, lines = "error", [f"{type(error).__name__}: {error}"]
        if late.is_set():
            why, lines = "timeout", [f"stopped after {timeout:g} s"]
        stderr.seek(0)
        said = stderr.read().decode(errors="replace") if why == "died" else ""
    outputs = _outputs(output)
    texts = [one.text for one in outputs if one.output_type == "stream"]
    shown = [one.data["application/json"] for one in outputs if "application/json" in one.get("data", {})]
    return Ended(why, (*texts, said, *lines), shown[-1] if shown else None)


class _Provisioner(LocalProvisioner):
    """Jupyter's local processes, or forks of a warm parent where it can."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> Any:
        kernel = None
        if self.parent.parent_of_kernels is not None:
            output = options["stderr"].fileno()
            kernel = self.parent.parent_of_kernels.fork(cmd, options["cwd"], output, options["pass_fds"])
        if kernel is None:
            return await super().launch_kernel(cmd, **options)
        self.process, self.pid, self.pgid, self.cwd = kernel, kernel.pid, kernel.pid, options["cwd"]
        return self.connection_info


class _Manager(AsyncKernelManager):
    """Jupyter's kernel manager with our provisioner."""

    parent_of_kernels: Parent | None = None

    async def _async_pre_start_kernel(self, **options: Any) -> Any:
        self.kernel_id = self.kernel_id or str(uuid.uuid4())
        self.provisioner = _Provisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**options)


_parents: dict[tuple[tuple[str, str], ...], Parent] = {}
_parents_lock = threading.Lock()


def _parent(environment: dict[str, str]) -> Parent:
    """The warm parent with this environment; threads and GPUs are settled when torch is imported."""
    key = tuple(sorted(environment.items()))
    with _parents_lock:
        if key not in _parents:
            _parents[key] = Parent(environment)
        return _parents[key]


class _Engine(NBClientEngine):
    """Papermill's engine, with a kernel manager and launch options of our own."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
        manager = options["manager"]
        manager.kernel_name = kernel_name
        client = PapermillNotebookClient(nb_man, km=manager, startup_timeout=options["start_timeout"])
        client.execute(cleanup_kc=True, **options["launch"])


papermill_engines.register("geodesic", _Engine)


@contextlib.contextmanager
def _deadline(manager: AsyncKernelManager, timeout: float) -> Iterator[threading.Event]:
    """Kill the kernel's process group when the time is up; the event says that this happened."""
    late, ended = threading.Event(), threading.Event()

    def watch() -> None:
        if ended.wait(timeout):
            return
        late.set()
        while not ended.wait(0.2):  # again and again: the kernel may only be about to start
            if manager.provisioner is not None and manager.provisioner.pgid:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(manager.provisioner.pgid, signal.SIGKILL)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield late
    finally:
        ended.set()
        watcher.join()


def _outputs(path: Path) -> list[Any]:
    """All outputs in a notebook that papermill wrote; none if it could not write it."""
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError):
        return []
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]
