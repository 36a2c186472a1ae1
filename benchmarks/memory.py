"""Highest memory of a process from a chosen moment on, for the benchmarks."""

from pathlib import Path


def reset_peak() -> int:
    """Let the peak begin at what is resident now; returns those bytes.

    getrusage cannot serve: a process that was started by another begins with that one's peak.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes()


def peak_bytes() -> int:
    """Highest number of resident bytes since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
