"""Work in other processes of this machine, which end with this one and leave Ctrl-C to it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def mapped(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int, chunk: int
) -> Iterator[Iterator[Result]]:
    """The results for `items`, in order; on an exception, Ctrl-C among them, what waits is given up.

    Args:
        function: importable by its name, like whatever it is given.
        chunk: items that a process gets at a time.
    """
    # Spawned processes inherit no threads or locks, which forked ones of a program that uses torch would.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_exit_with_parent) as pool:
        try:
            with started_deaf_to_ctrl_c():
                results = pool.map(function, items, chunksize=chunk)
            yield results
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def started_deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that are started within never hear Ctrl-C, which a terminal sends to them, too: we answer it.

    One that ignored it by itself would still print a traceback when it came while it was importing.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _exit_with_parent() -> None:
    """End this worker when the process that started it is gone; a killed one cannot end its pool."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
