"""The histogram of confidences: against numpy, by hand, and at its edges."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from cosa_kernels.ops import confidence_histogram as module
from cosa_kernels.ops.confidence_histogram import confidence_histogram
from three_way import DEVICE, poisoned_memory

IMPLS = ("reference", "torch", "triton")

SHAPES = {
    # (B, C, H, W)
    "several programs": (2, 3, 45, 67),
    "one pixel": (1, 1, 1, 1),
    "one class": (2, 1, 9, 13),
    "C = 80": (1, 80, 5, 7),
    "C = 150": (2, 150, 3, 3),
}


def counted_by_numpy(cams: torch.Tensor, floor: float, box: torch.Tensor | None) -> list[int]:
    """256 bins over [0, 1] of what lies in them."""
    confidence = cams.float().cpu().numpy().max(axis=1)
    kept = np.zeros(confidence.shape, dtype=bool)
    for image, mask in enumerate(kept):
        y0, y1, x0, x1 = (0, *mask.shape[:1], 0, *mask.shape[1:]) if box is None else box[image].clamp(min=0).tolist()
        mask[y0:y1, x0:x1] = True
    kept &= confidence >= np.float32(floor)
    return np.histogram(confidence[kept], bins=256, range=(0, 1))[0].tolist()


class TestCount:
    """confidence_histogram."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_as_numpy_counts(self, shape: tuple[int, ...], impl: str, dtype: torch.dtype) -> None:
        cams = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        cams[:, ::2] = 0
        cams[0, 0, 0, 0] = 1
        for floor in (0.0, 0.3):
            with poisoned_memory():
                counts = confidence_histogram(cams, floor=floor, impl=impl)
            assert counts.dtype == torch.int64
            assert counts.tolist() == counted_by_numpy(cams, floor, None)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_valid_box(self, impl: str) -> None:
        cams = torch.rand(4, 2, 11, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        # Inside, empty, reaching beyond the image on either side, everything.
        box = torch.tensor([[1, 9, 2, 12], [3, 3, 0, 12], [-2, 50, -1, 7], [0, 11, 0, 12]], device=DEVICE)
        for boxes in (box, box.int()):
            counts = confidence_histogram(cams, floor=0.1, valid_box=boxes, impl=impl)
            assert counts.tolist() == counted_by_numpy(cams, 0.1, box)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_by_hand(self, impl: str) -> None:
        """Bins of [-1, 1] in quarters; what lies beyond counts at the ends, a pixel with a NaN or below the floor does
        not, nor does the floor's own bin vanish."""
        cams = torch.tensor(
            [
                [-9.0, -0.9, -0.5, -0.25, 0.0, 0.7, 1.0, 2.0, math.inf, math.nan, 0.1, -math.inf],
                [-9.5, -1.0, -0.8, -0.30, 0.6, 0.2, 0.3, 0.1, 0.5, 0.9, math.nan, -math.inf],
            ],
            device=DEVICE,
        ).view(1, 2, 3, 4)
        count = functools.partial(confidence_histogram, cams, bins=4, low=-1.0, high=1.0, impl=impl)
        assert count(floor=-math.inf).tolist() == [3, 2, 0, 5]
        assert count(floor=-0.9).tolist() == [1, 2, 0, 5]
        assert count(floor=-0.25).tolist() == [0, 1, 0, 5]
        assert count().tolist() == [0, 0, 0, 5]

    @pytest.mark.parametrize("impl", IMPLS)
    def test_leaves_its_arguments_alone(self, impl: str) -> None:
        cams = torch.rand(2, 3, 4, 5, device=DEVICE, requires_grad=True)
        copy = cams.detach().clone()
        assert not confidence_histogram(cams, impl=impl).requires_grad
        confidence_histogram(cams[:, :1], floor=0.5, impl=impl)
        assert torch.equal(cams, copy)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_strides_do_not_matter(self, impl: str) -> None:
        cams = torch.rand(2, 6, 8, 10, device=DEVICE)
        strided = (
            cams[:, 1::2],
            cams.to(memory_format=torch.channels_last),
            cams.transpose(2, 3),
            cams.expand(2, 6, 8, 10),
        )
        for view in strided:
            assert torch.equal(
                confidence_histogram(view, impl=impl), confidence_histogram(view.contiguous(), impl=impl)
            )

    @pytest.mark.parametrize("impl", ["torch", "triton"])
    def test_operator_is_registered_as_torch_expects(self, impl: str) -> None:
        box = torch.tensor([[0, 3, 0, 3], [1, 3, 1, 3]], device=DEVICE)
        torch.library.opcheck(
            module._count_operator, (torch.rand(2, 3, 4, 4, device=DEVICE), box, 8, 0.0, 1.0, 0.1, impl)
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"cams": torch.zeros(3, 4, 4)}, r"cams must be a floating \(B, C, h, w\) tensor"),
            ({"cams": torch.zeros(1, 0, 4, 4)}, r"\(1, 0, 4, 4\)"),
            ({"valid_box": torch.zeros(3, 4)}, r"valid_box must be an integer \(1, 4\) tensor"),
            ({"bins": 2}, "bins must be at least 4"),
            ({"cams": torch.zeros(1, 1, 4, 4, device=DEVICE), "bins": 12, "impl": "triton"}, "power of two"),
            ({"low": 2.0}, "low < high"),
            ({"cams": torch.zeros(1, 1, 4, 4, device=DEVICE).double(), "impl": "triton"}, "float64"),
        ],
    )
    def test_impossible_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            confidence_histogram(**{"cams": torch.zeros(1, 1, 4, 4), **arguments})
