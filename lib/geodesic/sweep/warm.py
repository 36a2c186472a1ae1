"""The warm parent of a worker's kernels: it has imported what an experiment needs, and each kernel is a fork of it.

The imports of a run take seconds of processor time, a fork takes milliseconds; on small runs that is most of the cost.
`Parent` is the worker's side; `python -m geodesic.sweep.warm` is the parent, which serves until the worker is gone. Its
kernels watch it and end with it.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

# Torch's optimisers import torch._dynamo, the digits come from scikit-learn, figures are drawn as SVG.
_IMPORTS = (
    "ipykernel.ipkernel", "ipykernel.kernelapp", "geodesic.experiment", "geodesic.plots",
    "torch._dynamo", "sklearn.datasets", "matplotlib.backends.backend_svg", "lap",
)  # fmt: skip
_LIMIT = 1 << 16  # bytes of a request
_PATIENCE = 300.0  # seconds in which the parent must answer
_LAUNCHER = ["-m", "ipykernel_launcher"]


class Parent:
    """A process that forks kernels; those that cannot be forked are refused, and the caller starts them afresh."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "geodesic.sweep.warm"],
                stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(environment),
            )  # fmt: skip
        self._lock = threading.Lock()
        self._channel.settimeout(_PATIENCE)
        try:
            self._able = self._channel.recv(_LIMIT) == b"able"
        except OSError:
            self._able = False

    def fork(self, command: Sequence[str], cwd: str, output: int, keep_open: Sequence[int]) -> "Kernel | None":
        """Fork a kernel; None if this command, or this process, is not one to be forked.

        Args:
            command: what Jupyter would execute.
            cwd: its current folder.
            output: file descriptor of what it says to a terminal.
            keep_open: further file descriptors that it inherits.
        """
        if not self._able or command[0] != sys.executable or list(command[1:3]) != _LAUNCHER:
            return None
        alive, theirs = os.pipe()  # reads end-of-file once nobody holds the other end
        try:
            request = json.dumps({"arguments": command[3:], "cwd": cwd}).encode()
            with self._lock:
                socket.send_fds(self._channel, [request], [output, theirs, *keep_open])
                pid = int(self._channel.recv(_LIMIT) or 0)
        except OSError:
            pid = 0
        finally:
            os.close(theirs)
        if not pid:
            self._able = False
            os.close(alive)
            return None
        return Kernel(pid, alive)


class Kernel:
    """A forked kernel, with the part of subprocess.Popen that Jupyter uses; the exit status is not known."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int, alive: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._alive = alive

    def poll(self) -> int | None:
        """None while the kernel lives."""
        if self.returncode is None and select.select([self._alive], [], [], 0)[0]:
            os.close(self._alive)
            self.returncode = 0
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the kernel's end."""
        if self.returncode is None:
            select.select([self._alive], [], [], timeout)
        return self.poll() or 0

    def send_signal(self, number: int) -> None:
        """Signal the kernel's process group."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def main() -> None:
    """Import, then fork a kernel for every request, until the worker hangs up."""
    os.environ["JPY_PARENT_PID"] = str(os.getpid())  # whom the kernels watch; read when ipykernel is imported
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for module in _IMPORTS:
        with contextlib.suppress(ImportError):  # the kernel that needs it will say so
            importlib.import_module(module)
    channel = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the kernels: their pipes say when they end
    # A fork keeps one thread only: locks that another held would stay locked.
    able = len(os.listdir("/proc/self/task")) == 1
    channel.send(b"able" if able else b"unable")
    while able:
        message, descriptors, _, _ = socket.recv_fds(channel, _LIMIT, 16)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            channel.close()
            _become_kernel(json.loads(message), *descriptors[:2])
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(str(pid).encode())


def _become_kernel(request: Mapping[str, Any], output: int, alive: int) -> None:
    """Serve as the kernel, in a process group of its own; never returns."""
    del alive  # stays open as long as this process lives
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.chdir(request["cwd"])
        import numpy as np
        from ipykernel import kernelapp

        np.random.seed()  # noqa: NPY002 (else every kernel would begin with the same global state)
        kernelapp.launch_new_instance(argv=request["arguments"])
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
