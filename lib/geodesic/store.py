"""Files that are whole or not there, digests, and locks: each once, for records, checkpoints, caches and sweeps.

Nothing here imports torch, so that a sweep's workers and a finished sweep stay quick.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # of what is being written, or was when its process died


class Note(UserWarning):
    """What somebody should know of a file that was passed over; the command line says it in one line."""


# ------------------------------------------------------------------------------------------------------------- writing
def write(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file; a reader sees the whole of it or what was there before, even after a power cut.

    Raises:
        OSError: if it cannot be written; what was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process has several threads, and a folder that several machines share sees one process number twice.
    partial = path.with_name(f"{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return path


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write a small JSON file, as `write` does."""
    return write(path, json.dumps(value, indent=1))


def clear_partial(folder: str | os.PathLike[str], stem: str) -> None:
    """Remove what killed processes were writing to the file of that stem; only for who holds its lock."""
    for partial in Path(folder).glob(f"{stem}.*{PARTIAL}"):
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writable(folder: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """Make a folder and try it before hours are spent on what will be written there; what stayed empty goes again.

    Args:
        folder: made if it is not there.
        what: the folder's use, for the message.

    Raises:
        OSError: if nothing can be written there.
    """
    folder = Path(folder)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f"{secrets.token_hex(8)}.trial"
        try:
            trial.write_bytes(b"\0" * 4096)  # a full disk refuses the content, not the name
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        _remove_empty(made)
        reason = error.strerror or str(error)
        raise OSError(f"{folder}, the folder of {what}, cannot be written to ({reason}); choose another") from error
    try:
        yield folder
    finally:
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _sync_folder(folder: Path) -> None:
    """Make a renaming durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------------------------- digests
def digest(*parts: str | bytes | os.PathLike[str]) -> str:
    """16 hexadecimal digits of SHA-256 of texts, bytes, and the contents of files, one after another."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, os.PathLike):
            total.update(Path(part).read_bytes())
        else:
            total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()[:16]


@functools.cache
def library() -> str:
    """Digest of this package's source as it lies on disk: names and contents of all its modules."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    return digest(*(part for file in files for part in (file.relative_to(root).as_posix(), file)))


# --------------------------------------------------------------------------------------------------------------- locks
@contextlib.contextmanager
def lock(path: str | os.PathLike[str], *, remove: bool = False) -> Iterator[int | None]:
    """Hold a lock and yield its file descriptor, or yield None if somebody else holds it.

    The system takes it back when the last process that inherited the descriptor ends, however it ends. The file says
    who took it last; it may be deleted when nothing runs.

    Args:
        path: a file of its own.
        remove: delete the file on release; not for a descriptor that is handed on to another process.

    Raises:
        OSError: on a file system without locks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (the stack closes it)
            stack.callback(file.close)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if _is(path, file.fileno()):  # else its holder has just removed it: a lock on it locks nothing
                break
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
        try:
            yield file.fileno()
        finally:
            if remove:
                path.unlink(missing_ok=True)


def _is(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        there, here = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
