"""Sums of up-sampled maps at each image's own size, without the memory that whole maps of every class take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.transfer import to_device

Size = tuple[int, int]
"""Height and width."""

BAND_BYTES = {"cpu": 2**21, "cuda": 2**28}
"""Size of a band: on a CPU what its cache holds, on a GPU mostly the whole image."""


def bands(views: Sequence[Tensor], side: Size, sizes: Sequence[Size]) -> Iterator[tuple[slice, Tensor]]:
    """Up-sample the views of some images to S x S, add them and resize each image's sum to its own size, in bands.

    All of it is linear: one matrix product per axis, and no S x S map of every class.

    Args:
        views: per scale, (n, K, h_k, w_k) float32.
        side: S and S.
        sizes: of each image (H, W). The result has the largest H and W; beyond an image's own its values mean nothing.

    Yields:
        Rows from top to bottom, and the (n, rows, K, W) float32 logits in them.
    """
    (count, channels), device = views[0].shape[:2], views[0].device
    lengths = to_device(torch.tensor(sizes, dtype=torch.float64), device)
    height, width = (max(extents) for extents in zip(*sizes, strict=True))
    columns, _ = _upsampling(tuple(view.shape[3] for view in views), side[1], device)
    across = _resized(columns, lengths[:, 1], width).split([view.shape[3] for view in views], dim=2)
    wide = torch.cat(
        [
            # (n, h K, w) times (n, w, W), seen as (n, h, K W)
            (view.transpose(1, 2).flatten(1, 2) @ weights.mT).view(count, view.shape[2], channels * width)
            for view, weights in zip(views, across, strict=True)
        ],
        dim=1,
    )
    rows, order = _upsampling(tuple(view.shape[2] for view in views), side[0], device)
    wide = wide.index_select(1, order)
    down = _resized(rows.index_select(1, order), lengths[:, 0], height)
    band = max(1, BAND_BYTES[device.type] // (4 * count * channels * width))
    for start in range(0, height, band):
        part = slice(start, min(start + band, height))
        weights, sources = down[:, part], slice(None)
        if device.type == "cpu":  # a GPU would have to be waited for
            used = weights.any(dim=0).any(dim=0).nonzero().flatten()
            sources = slice(int(used[0]), int(used[-1]) + 1)
        scores = weights[..., sources] @ wide[:, sources]
        yield part, scores.view(count, part.stop - part.start, channels, width)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _upsampling(lows: tuple[int, ...], side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What bilinear up-sampling of each of `lows` positions to `side` and adding the results does along an axis.

    Returns:
        (side, sum of lows) float32 weights; (sum of lows,) int64, the order of the sources from one end to the other.
    """
    weights = [
        F.interpolate(torch.eye(low, dtype=torch.float64)[None], size=side, mode="linear", align_corners=False)[0].T
        for low in lows
    ]
    places = torch.cat([(torch.arange(low, dtype=torch.float64) + 0.5) / low for low in lows])
    order = places.argsort(stable=True)
    return to_device(torch.cat(weights, dim=1).float(), device), to_device(order, device)


def _resized(weights: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """(n, longest, sources): the (side, sources) rows of `weights` resized bilinearly to each of (n,) lengths.

    Computed on the device, so that images of any number of sizes cost neither copies nor memory.
    """
    side = len(weights)
    places = torch.arange(longest, dtype=torch.float64, device=weights.device) + 0.5
    places = (places * (side / lengths[:, None]) - 0.5).clamp(0, side - 1)
    first = places.floor()
    share = (places - first).float()[..., None]
    first = first.int()
    return torch.lerp(weights[first], weights[(first + 1).clamp(max=side - 1)], share)
