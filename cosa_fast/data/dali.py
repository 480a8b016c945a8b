"""The fast loading backend: one DALI pipeline, on the CPU or with decoding and everything after on the GPU."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from cosa_fast.config import AugmentConfig, LoaderConfig
from cosa_fast.data.augment import Geometry, Operation, Plan
from cosa_fast.data.photometric import (
    blur_kernel,
    enhance_factor,
    posterize_bits,
    sharpness_kernel,
    solarize_threshold,
)
from cosa_fast.data.torch_loader import read_image


def views(plan: Plan, config: LoaderConfig, start: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Weak and strong views, each (B, 3, S, S) float32, normalised, of batch `start`, `start + 1`, ... for ever.

    On a CUDA `device` the tensors never leave it.

    Raises:
        ValueError: a file cannot be decoded or has another size than when it was indexed.
    """
    on_gpu = device.type == "cuda"
    pipeline = _pipeline(
        _Source(plan, start),
        plan.config,
        on_gpu,
        batch_size=plan.batch_size,
        num_threads=max(1, config.workers),
        device_id=torch.cuda.current_device() if on_gpu and device.index is None else device.index,
        prefetch_queue_depth=config.prefetch,
    )
    iterator = DALIGenericIterator(pipeline, ["weak", "strong", "shape"], prepare_first_batch=False)
    for iteration in itertools.count(start):
        positions = plan.draws(iteration).positions
        try:
            (batch,) = next(iterator)
        except RuntimeError as error:
            _find_unreadable(plan, iteration, config.prefetch)
            error.add_note("The batch: " + ", ".join(plan.paths[position] for position in positions))
            raise
        if not np.array_equal(batch["shape"][:, :2], plan.sizes[positions]):
            _find_unreadable(plan, iteration, 0)
        yield batch["weak"], batch["strong"]


class _Inputs(NamedTuple):
    """What the pipeline is fed: arrays with one entry per image, and inside the pipeline their nodes."""

    path: Any
    """Bytes of the file's path."""
    window_start: Any
    """(2,) y, x of the window of the file that is decoded."""
    window_shape: Any
    """(2,) its height and width."""
    roi_start: Any
    """(2,) y, x in the window where the visible part starts, mirrored images: on the right."""
    roi_end: Any
    """(2,) and where it ends."""
    size: Any
    """(2,) height and width of the visible part in the crop."""
    corner: Any
    """(1, 2) y, x of its corner in the crop."""
    blurred: Any
    blur_kernel: Any
    """(taps, 1)."""
    operation: Any
    factor: Any
    """Of Color, Contrast and Brightness."""
    sharpness_kernel: Any
    """(3, 3)."""
    solarize_threshold: Any
    posterize_mask: Any


@dataclass(frozen=True)
class _Source:
    """Feeds batch `start`, `start + 1`, ... DALI asks ahead, by number: prefetching loses nothing on resume."""

    plan: Plan
    start: int

    def __call__(self, step: int) -> _Inputs:
        draws = self.plan.draws(self.start + step)
        window_start, window_shape, roi_start, roi_end = _decode_window(draws.geometry)
        box = draws.geometry.valid_box
        magnitudes = draws.magnitude.tolist()
        factors = [enhance_factor(magnitude) for magnitude in magnitudes]
        return _Inputs(
            path=[np.frombuffer(os.fsencode(self.plan.paths[position]), np.uint8) for position in draws.positions],
            window_start=window_start,
            window_shape=window_shape,
            roi_start=roi_start,
            roi_end=roi_end,
            size=np.ascontiguousarray(box[:, [1, 3]] - box[:, [0, 2]], np.float32),
            corner=np.ascontiguousarray(box[:, None, [0, 2]], np.int32),
            blurred=draws.blur > 0,
            blur_kernel=[blur_kernel(sigma)[:, None] for sigma in draws.blur],
            operation=draws.operation.astype(np.int32),
            factor=np.array(factors, np.float32),
            sharpness_kernel=np.stack([sharpness_kernel(factor) for factor in factors]),
            solarize_threshold=np.array([solarize_threshold(magnitude) for magnitude in magnitudes], np.uint8),
            posterize_mask=np.array([256 - (256 >> posterize_bits(magnitude)) for magnitude in magnitudes], np.uint8),
        )


def _decode_window(geometry: Geometry) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The part of each file to decode, and what of it to resize: (B, 2) y and x each.

    Returns:
        start, shape: int32, the window of the file around the visible part that the resize filter reaches.
        begin, end: float32, corners of the visible part in the window; mirrored images have their x swapped.
    """
    low, high = geometry.source_box[:, [0, 2]], geometry.source_box[:, [1, 3]]
    reach = np.maximum(1, geometry.source / geometry.resized) + 1
    start = np.maximum(0, np.floor(low - reach))
    stop = np.minimum(geometry.source, np.ceil(high + reach))
    begin, end = low - start, high - start
    flip = geometry.flip
    begin[flip, 1], end[flip, 1] = end[flip, 1], begin[flip, 1]
    return (
        np.ascontiguousarray(start, np.int32),
        np.ascontiguousarray(stop - start, np.int32),
        np.ascontiguousarray(begin, np.float32),
        np.ascontiguousarray(end, np.float32),
    )


@pipeline_def(enable_conditionals=True)
def _pipeline(source: _Source, config: AugmentConfig, on_gpu: bool) -> tuple[DataNode, DataNode, DataNode]:
    """(weak, strong, shape of the file) per sample; the views on the GPU if `on_gpu`."""
    inputs = _Inputs(*fn.external_source(source, num_outputs=len(_Inputs._fields)))
    encoded = fn.io.file.read(inputs.path)  # type: ignore[attr-defined]
    image: Any = fn.decoders.image_slice(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.DALIImageType.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        start=inputs.window_start,
        shape=inputs.window_shape,
        axis_names="HW",
    )
    image = fn.resize(image, size=inputs.size, roi_start=inputs.roi_start, roi_end=inputs.roi_end, antialias=True)
    image = fn.multi_paste(image, output_size=(config.crop, config.crop), out_anchors=inputs.corner)
    if inputs.blurred:
        # Mirroring at the border composes over PIL's three passes; for boxes of three pixels it is what PIL does.
        kernel = inputs.blur_kernel.gpu() if on_gpu else inputs.blur_kernel
        image = fn.filter(image, kernel, border="reflect_1001")
        image = fn.filter(image, fn.transpose(kernel, perm=[1, 0]), border="reflect_1001")
    weak = _normalise(image, config)
    strong = _normalise(_strengthen(image, inputs, on_gpu), config)
    return weak, strong, fn.peek_image_shape(encoded, adjust_orientation=False)


def _strengthen(image: Any, inputs: _Inputs, on_gpu: bool) -> Any:
    """`photometric.strengthen` in DALI's operators."""
    white = types.Constant(255, dtype=types.DALIDataType.UINT8)
    operation, factor = inputs.operation, inputs.factor
    if operation == Operation.AUTO_CONTRAST.value:
        image = _auto_contrast(image)
    elif operation == Operation.EQUALIZE.value:
        # DALI equalizes like OpenCV, whose table leaves out the darkest value where PIL's leaves out the brightest.
        image = white - fn.equalize(white - image)
    elif operation == Operation.SOLARIZE.value:
        image = image ^ (image >= inputs.solarize_threshold) * white
    elif operation == Operation.COLOR.value:
        image = _saturate(image, factor)
    elif operation == Operation.CONTRAST.value:
        image = fn.contrast(image, contrast=factor, contrast_center=fn.reductions.mean(_grey(image)).cpu())
    elif operation == Operation.BRIGHTNESS.value:
        image = fn.brightness(image, brightness=factor)
    elif operation == Operation.SHARPNESS.value:
        image = fn.filter(image, inputs.sharpness_kernel.gpu() if on_gpu else inputs.sharpness_kernel)
    elif operation == Operation.POSTERIZE.value:
        image = image & inputs.posterize_mask
    return image


# On the CPU DALI rounds float to 8 bits by a call of roundf per value, 2.5 ms for 448x448 pixels. `fn.brightness` from
# 8 to 8 or 16 bits takes a tenth of that, so these two do without the float in between.


def _auto_contrast(image: Any) -> Any:
    """Stretch each channel from its darkest and brightest value to 0 and 255; a flat channel stays as it is."""
    # As a sequence of three grey frames, because `fn.brightness` takes a factor per frame.
    frames = fn.reshape(_reorder(image, "CHW"), layout="FHW")
    low, high = (reduce(frames, axes=[1, 2]).cpu() for reduce in (fn.reductions.min, fn.reductions.max))
    flat = low == high
    scale = 255 / (high - low + flat * types.Constant(255, dtype=types.DALIDataType.UINT8))
    frames = fn.brightness(
        fn.expand_dims(frames, axes=3, new_axis_names="C"),
        brightness=fn.per_frame(scale),
        brightness_shift=fn.per_frame(scale * low * (flat ^ True) / -255),  # in units of 255
    )
    return _reorder(fn.reshape(fn.squeeze(frames, axes=3), layout="CHW"), "HWC")


def _saturate(image: Any, factor: Any) -> Any:
    """Blend the image with its grey one; `factor` is the image's share."""
    wide = types.DALIDataType.INT16
    colour = fn.brightness(image, brightness=factor, dtype=wide)
    return fn.cast_like(colour + fn.brightness(_grey(image), brightness=1 - factor, dtype=wide), image)


def _reorder(image: DataNode, layout: str) -> DataNode:
    """What `fn.transpose` does, up to four times as fast for 8-bit images on the CPU."""
    return fn.crop_mirror_normalize(image, dtype=types.DALIDataType.UINT8, output_layout=layout)


def _normalise(image: DataNode, config: AugmentConfig) -> DataNode:
    """8-bit HWC to normalised float32 CHW."""
    return fn.crop_mirror_normalize(
        image,
        mean=[255 * channel for channel in config.mean],
        std=[255 * channel for channel in config.std],
        dtype=types.DALIDataType.FLOAT,
    )


def _grey(image: DataNode) -> DataNode:
    return fn.color_space_conversion(image, image_type=types.DALIImageType.RGB, output_type=types.DALIImageType.GRAY)


def _find_unreadable(plan: Plan, iteration: int, ahead: int) -> None:
    """Say which file of batches `iteration` to `iteration + ahead` is at fault; DALI's own message does not.

    Raises:
        ValueError: with the name of the first unreadable file, if there is one.
    """
    for batch in range(iteration, iteration + ahead + 1):
        for position in plan.draws(batch).positions:
            height, width = plan.sizes[position]
            read_image(plan.paths[position], (int(height), int(width)))
