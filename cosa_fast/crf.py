"""Dense CRF (Kraehenbuehl & Koltun, NIPS 2011): the paper's CoSA*. Serial, or in processes beside the network.

Importing this module imports neither torch nor pydensecrf: the worker processes stay small.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cosa_fast.processes import started_deaf_to_ctrl_c

Image = NDArray[np.uint8]
Labels = NDArray[np.uint8]
Probabilities = NDArray[np.float32]

NEGLIGIBLE = 1e-5
"""Probabilities are raised to this before the logarithm; a class that stays below it in a whole image is left out."""


@dataclass(frozen=True, slots=True)
class CrfParameters:
    """Mean-field iterations, and the two Gaussian kernels: of the position, and of position and colour together."""

    iterations: int
    position_std: float
    """Pixels."""
    position_weight: float
    bilateral_position_std: float
    """Pixels."""
    bilateral_colour_std: float
    """8-bit RGB values."""
    bilateral_weight: float


CRF_PRESETS: dict[Literal["release", "standard"], CrfParameters] = {
    # The authors' evaluation; ToCo's (tools/infer_seg_voc.py) has the same kernels with 10 iterations.
    "release": CrfParameters(1, 1, 1, 121, 5, 4),
    # DeepLab v2 with ResNet-101 as kazuto1011/deeplab-pytorch (configs/voc12.yaml) and much weakly supervised work
    # have it.
    "standard": CrfParameters(10, 1, 3, 67, 3, 4),
}


@dataclass(frozen=True, slots=True)
class CrfItem:
    """One image of `CrfPool.map`."""

    key: str
    """Its name in errors."""
    image: Image
    """(H, W, 3) uint8 RGB."""
    probabilities: Probabilities
    """(K, H, W) float32 in [0, 1]. A class that is zero throughout (not in the image's labels) is never chosen."""


_INSTALL = "`pip install pydensecrf2`"
if sys.version_info >= (3, 13):
    _INSTALL = "`pip install setuptools 'cython>=3'`, then `pip install --no-build-isolation pydensecrf2`"


def require_crf() -> None:
    """Check that pydensecrf can be imported, before hours of work.

    Raises:
        ValueError: it cannot.
    """
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the dense CRF needs pydensecrf ({error}): {_INSTALL}, or go without (eval.crf: none)"
        ) from None


def dense_crf(image: Image, probabilities: Probabilities, parameters: CrfParameters) -> Labels:
    """(H, W) uint8 class of each pixel after mean-field inference.

    Args:
        image: (H, W, 3) uint8 RGB.
        probabilities: (K, H, W) float32 in [0, 1], channel 0 the background; the unary terms are their -log.

    Raises:
        ValueError: wrong type, shape, or size of one beside the other; NaN or a value outside [0, 1]; no pydensecrf.
    """
    require_crf()
    classes = _possible_classes(image, probabilities)
    # pydensecrf asks for a writable image, though it only reads it.
    return _infer(np.require(image, requirements=["C", "W"]), probabilities[classes], classes, parameters)


def _possible_classes(image: Image, probabilities: Probabilities) -> list[int]:
    """Check the two arrays; the classes that reach `NEGLIGIBLE` somewhere.

    The others cannot win: mean-field messages to a class are at most the kernels' weights times its own probability.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"the image is {image.dtype} of shape {image.shape}: the CRF takes (height, width, 3) uint8")
    shape = probabilities.shape
    if probabilities.dtype != np.float32 or len(shape) != 3 or 0 in shape or shape[0] > 256:
        raise ValueError(
            f"the probabilities are {probabilities.dtype} of shape {shape}: the CRF takes (classes, height, width) "
            "float32, of 256 classes at most"
        )
    if shape[1:] != image.shape[:2]:
        raise ValueError(
            f"the image has height and width {image.shape[:2]} but its probabilities {shape[1:]}: resize them first"
        )
    largest, smallest = probabilities.max(axis=(1, 2)), float(probabilities.min())
    if np.isnan(smallest):
        raise ValueError("the probabilities hold NaN")
    if smallest < 0 or largest.max() > 1.001:
        raise ValueError(
            f"the probabilities range from {smallest:.3g} to {largest.max():.3g}: the CRF takes values from 0 to 1 "
            "(scores need a softmax, sums over views their mean)"
        )
    possible: list[int] = np.flatnonzero(largest >= NEGLIGIBLE).tolist()
    if not possible:
        raise ValueError(f"every probability is below {NEGLIGIBLE}: the CRF takes probabilities that add up to 1")
    return possible


def _infer(image: Image, probabilities: Probabilities, classes: Sequence[int], parameters: CrfParameters) -> Labels:
    """Labels from the probabilities of `classes`, which are overwritten."""
    import pydensecrf.densecrf as densecrf

    height, width = image.shape[:2]
    if len(classes) == 1:
        return np.full((height, width), classes[0], np.uint8)
    unary = probabilities.reshape(len(classes), -1)
    np.clip(unary, NEGLIGIBLE, 1, out=unary)
    np.negative(np.log(unary, out=unary), out=unary)
    crf = densecrf.DenseCRF2D(width, height, len(classes))
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(sxy=parameters.position_std, compat=parameters.position_weight)
    crf.addPairwiseBilateral(
        sxy=parameters.bilateral_position_std,
        srgb=parameters.bilateral_colour_std,
        rgbim=image,
        compat=parameters.bilateral_weight,
    )
    best = np.asarray(crf.inference(parameters.iterations)).argmax(axis=0)
    return np.array(classes, np.uint8)[best].reshape(height, width)


class CrfPool:
    """`dense_crf` in processes, of one thread each, while the caller computes the next images.

    A context manager. On an exception the images in hand are given up; the workers also end when this process is
    killed. pydensecrf keeps Python's lock, hence processes, and has no threads of its own.
    """

    def __init__(self, processes: int, parameters: CrfParameters, ahead: int = 8) -> None:
        """
        Args:
            processes: worker processes; they start with the first images.
            ahead: at most `processes` + `ahead` images are in hand at any time, 4 bytes a class and pixel each.

        Raises:
            ValueError: pydensecrf is missing.
        """
        require_crf()
        # Spawned workers inherit neither our threads nor the CUDA context.
        context = multiprocessing.get_context("spawn")
        reader, self._lifeline = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(
            processes, mp_context=context, initializer=_start_worker, initargs=(reader,)
        )
        self._parameters = parameters
        self._limit = processes + ahead
        self._free: deque[_SharedMemory] = deque()
        self._blocks: list[_SharedMemory] = []

    def __enter__(self) -> CrfPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._lifeline.close()  # what the workers are at is of no use any more
        self._executor.shutdown(cancel_futures=True)
        self._lifeline.close()
        for block in self._blocks:
            block.close()

    def map(self, items: Iterable[CrfItem]) -> Iterator[Labels]:
        """The (H, W) uint8 labels of each item, in order.

        Items are taken as results are asked for: what `items` computes in between overlaps with the workers.

        Raises:
            ValueError: an item cannot be used, or a worker died; with the item's key.
        """
        pending: deque[_InHand] = deque()
        try:
            for item in items:
                pending.append(self._submit(item))
                if len(pending) >= self._limit:
                    yield self._result(pending.popleft())
            while pending:
                yield self._result(pending.popleft())
        finally:
            for given_up in pending:
                given_up.done.cancel()
                # A worker may be at it.
                given_up.done.add_done_callback(partial(self._release, given_up.block))

    def _submit(self, item: CrfItem) -> _InHand:
        try:
            classes = _possible_classes(item.image, item.probabilities)
        except ValueError as error:
            raise ValueError(f"dense CRF of {item.key}: {error}") from None
        block = self._free.popleft() if self._free else self._new_block()
        memory = block.grown_to(_bytes(len(classes), item.image.shape))
        image, probabilities, labels = _layout(memory, len(classes), item.image.shape)
        image[:] = item.image
        for row, number in enumerate(classes):
            probabilities[row] = item.probabilities[number]
        try:
            with started_deaf_to_ctrl_c():  # a submission starts a worker if none is idle
                future = self._executor.submit(_work, block.path, item.image.shape, classes, self._parameters)
        except BrokenProcessPool:
            raise _died(item.key) from None
        return _InHand(item.key, future, block, labels)

    def _release(self, block: _SharedMemory, _: object = None) -> None:
        self._free.append(block)

    def _new_block(self) -> _SharedMemory:
        self._blocks.append(_SharedMemory())
        return self._blocks[-1]

    def _result(self, work: _InHand) -> Labels:
        _wait_for(work.key, work.done)
        labels = work.labels.copy()
        self._release(work.block)
        return labels


@dataclass(frozen=True, slots=True)
class _InHand:
    """An image that a worker has, or will have."""

    key: str
    done: Future[None]
    block: _SharedMemory
    labels: Labels
    """Its result, in `block`."""


def _wait_for(key: str, done: Future[None]) -> None:
    try:
        done.result()
    except BrokenProcessPool:
        raise _died(key) from None
    except Exception as error:  # pydensecrf's, or no memory
        raise ValueError(f"dense CRF of {key}: {type(error).__name__}: {error}") from error


def _died(key: str) -> ValueError:
    return ValueError(f"dense CRF of {key}: a worker process was killed (out of memory?): use fewer threads")


# What goes to the workers, and the labels that come back. Through a pipe the former took 90 ms of CPU time for 21
# classes at 640x428 pixels and 350 ms for 81, beside 270 and 590 ms for the inference itself with one iteration; this
# takes 4 and 15 ms. And a worker that ends in the middle of writing the latter left us waiting for the rest for ever.


class _SharedMemory:
    """Memory that a worker can map by its path, as large as it ever had to be; the kernel frees it with its users."""

    def __init__(self) -> None:
        self._file: IO[bytes] | Any
        if hasattr(os, "memfd_create"):  # not /dev/shm, which is small in containers and kills who overfills it
            self._file = os.fdopen(os.memfd_create("cosa-fast-crf"), "r+b")
            self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        else:
            self._file = tempfile.NamedTemporaryFile(prefix="cosa-fast-crf")  # noqa: SIM115
            self.path = self._file.name
        self._memory: mmap.mmap | None = None

    def grown_to(self, size: int) -> mmap.mmap:
        """Of `size` bytes at least."""
        if self._memory is None or len(self._memory) < size:
            os.ftruncate(self._file.fileno(), size)
            self._memory = mmap.mmap(self._file.fileno(), size)
        return self._memory

    def close(self) -> None:
        self._file.close()


def _bytes(classes: int, shape: Sequence[int]) -> int:
    return shape[0] * shape[1] * (4 * classes + 3 + 1)


def _layout(memory: mmap.mmap, classes: int, shape: Sequence[int]) -> tuple[Image, Probabilities, Labels]:
    """Views of an image of this (H, W, 3) shape, of its (classes, H, W) probabilities and of its (H, W) labels."""
    pixels = shape[0] * shape[1]
    probabilities = np.frombuffer(memory, np.float32, classes * pixels)
    image = np.frombuffer(memory, np.uint8, 3 * pixels, offset=4 * classes * pixels)
    labels = np.frombuffer(memory, np.uint8, pixels, offset=(4 * classes + 3) * pixels)
    return image.reshape(shape), probabilities.reshape(classes, *shape[:2]), labels.reshape(shape[:2])


# In the workers.

_mapped: dict[str, mmap.mmap] = {}


def _start_worker(lifeline: Connection) -> None:
    m_trim_threshold, m_mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        # Keep freed memory: fresh pages for each image's matrices took a quarter to a half of the time.
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()  # nothing is ever sent: it returns when the parent closes its end or dies
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(path: str, shape: tuple[int, int, int], classes: Sequence[int], parameters: CrfParameters) -> None:
    memory = _mapped.get(path)
    if memory is None or len(memory) < _bytes(len(classes), shape):
        with open(path, "r+b") as handle:
            memory = _mapped[path] = mmap.mmap(handle.fileno(), 0)
    image, probabilities, labels = _layout(memory, len(classes), shape)
    labels[:] = _infer(image, probabilities, classes, parameters)
