"""Devices by name, checked before anything is sent there, and the processor's own. Used wherever a user names one."""

import functools
import platform
import re
from pathlib import Path

import torch

KINDS = ("cpu", "cuda")  # both have float64, and the code has been written for both


def find(name: str | torch.device) -> torch.device:
    """The device of that name. Convolutions on a CUDA device are set to true float32, as scores need them.

    Raises:
        ValueError: for a name torch does not know, a kind of device other than these, or one that is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one that torch knows; pass 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type not in KINDS:
        raise ValueError(f"device {str(device)!r} has no float64 or was never tried; pass device='cpu' or 'cuda'")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device {str(name)!r} is not there: {count} CUDA devices are; pass device='cpu' or leave it out"
        )
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # torch's default rounds their inputs to 10 bits
    return device


@functools.cache
def processor() -> str:
    """The processor's model as Linux names it, else the kind of machine."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()
