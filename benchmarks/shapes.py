"""The sizes at which the operations are measured, named after where they occur."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Size = Literal["cpu", "cuda", "tiny", "gate"]


@dataclass(frozen=True)
class Shape:
    """An operation's size."""

    name: str
    batch: int
    classes: int
    """Foreground classes C; segmentation logits have C + 1 channels."""
    low: tuple[int, int] = (28, 28)
    """Of the network's maps: stride 16."""
    high: tuple[int, int] = (448, 448)
    """Of the image."""
    targets: int = 1
    """CAM heads whose pseudo-labels the segmentation learns."""
    scope: str = "image"

    @property
    def low_pixels(self) -> int:
        """In the whole batch."""
        return self.batch * self.low[0] * self.low[1]

    @property
    def high_pixels(self) -> int:
        """In the whole batch."""
        return self.batch * self.high[0] * self.high[1]


VOC2, VOC4, VOC16 = (Shape(f"voc_b{batch}", batch, 20) for batch in (2, 4, 16))
COCO2, COCO16 = (Shape(f"coco_b{batch}", batch, 80) for batch in (2, 16))
TINY = Shape("tiny", 1, 3, (3, 2), (24, 16))
# Odd sizes and ratios; and more channels than a warp has lanes.
GATE = Shape("gate", 2, 5, (5, 4), (37, 45))
WIDE = Shape("gate_wide", 1, 80, (3, 2), (33, 29))


def _with_aux(*shapes: Shape) -> list[Shape]:
    """Each with one CAM head, and with the auxiliary one too."""
    return [varied for shape in shapes for varied in (shape, replace(shape, name=f"{shape.name}_aux", targets=2))]


def _batch_scope(shape: Shape) -> Shape:
    return replace(shape, name=f"{shape.name}_batch", scope="batch")


def _cityscapes(batch: int) -> Shape:
    # 19 classes, none of them a background; stride 8.
    return Shape(f"cityscapes_b{batch}", batch, 18, (128, 256), (1024, 2048))


SHAPES: dict[str, dict[Size, list[Shape]]] = {
    "raw_cross_entropy": {
        "cpu": _with_aux(VOC2, COCO2),
        "cuda": _with_aux(VOC4, VOC16, COCO16),
        "tiny": _with_aux(TINY),
        "gate": _with_aux(GATE, WIDE),
    },
    "upsample_cross_entropy": {
        "cpu": [_cityscapes(1)],
        "cuda": [_cityscapes(1), _cityscapes(4)],
        "tiny": [TINY],
        "gate": [GATE, WIDE],
    },
    "csc_info_nce": {
        "cpu": [VOC2, _batch_scope(VOC2)],
        "cuda": [VOC16, _batch_scope(VOC16), _batch_scope(COCO16)],
        "tiny": [TINY],
        "gate": [GATE, _batch_scope(GATE), WIDE],
    },
    "teacher_targets": {"cpu": [VOC2, COCO2], "cuda": [VOC16, COCO16], "tiny": [TINY], "gate": [GATE, WIDE]},
    "seg_to_cam_loss": {"cpu": [VOC2], "cuda": [VOC16, COCO16], "tiny": [TINY], "gate": [GATE, WIDE]},
    # 100 batches of 2 images: the queue of confidences that the release refits at each step.
    "fit_bimodal_threshold": {
        "cpu": [replace(VOC2, name="queue_156800", batch=200)],
        "cuda": [replace(VOC2, name="queue_156800", batch=200)],
        "tiny": [replace(TINY, name="queue_tiny", batch=500)],
        "gate": [replace(TINY, name="queue_gate", batch=4000)],
    },
}


def sweep(size: Size) -> list[Shape]:
    """Shapes of raw_cross_entropy that grow in pixels of an image, in classes or in images, and are named so."""
    sides: tuple[int, ...]
    classes: tuple[int, ...]
    batches: tuple[int, ...]
    if size == "tiny":
        sides, classes, batches = (16, 32), (2, 3), (1, 2)
        base = _square(Shape("", 1, 2), 32)
    elif size == "cpu":
        sides, classes, batches = (112, 224, 448), (5, 20, 80, 150), (1, 2, 4, 8)
        base = _square(Shape("", 1, 20), 224)
    else:
        sides, classes, batches = (112, 224, 448, 896, 1792), (5, 20, 80, 150, 250), (1, 2, 4, 8, 16, 32)
        base = Shape("", 4, 20)
    return [
        *(replace(_square(base, side), name="pixels") for side in sides),
        *(replace(base, name="classes", classes=count) for count in classes),
        *(replace(base, name="batch", batch=count) for count in batches),
    ]


def _square(shape: Shape, side: int) -> Shape:
    return replace(shape, low=(side // 16, side // 16), high=(side, side))
