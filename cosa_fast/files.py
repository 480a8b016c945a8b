"""Files that appear whole or not at all, and errors that name the file and the fix."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Write `content`, or let it write the file it is given, beside `path`, then rename over `path`.

    Raises:
        ValueError: the disk is full or the folder cannot be written; `path` keeps its former content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(describe_os_error(error, path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def describe_os_error(error: OSError, path: Path) -> str:
    """What went wrong with `path`, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left to write {path}: free some, then run again (what was written before is kept)"
    return f"cannot write {path}: {error.strerror or error}"


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that `finally` cleans up; torchrun sends it when another process fails.

    In the main thread only.
    """
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def sigterm_later() -> Iterator[None]:
    """Let SIGTERM take effect after what must not be interrupted.

    In the main thread only.
    """
    came = []
    former = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
        if came:
            signal.raise_signal(signal.SIGTERM)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Check for `needed` free bytes before hours of work.

    Raises:
        ValueError: the file system of `folder` has less.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 2**20:.0f} MiB free but {purpose} needs {needed / 2**20:.0f} MiB: "
            "free some space or choose another `results` folder"
        )


def read_json(path: Path, what: str, fix: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read the {what} {path} ({error.strerror}): {fix}") from None
    except ValueError:
        raise ValueError(f"the {what} {path} is not valid JSON: {fix}") from None
    if not isinstance(content, dict):
        raise ValueError(f"the {what} {path} does not hold a JSON object: {fix}")
    return content


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the kernel releases it however the process ends.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is working in {folder}: wait for it or stop it first") from None
        yield
