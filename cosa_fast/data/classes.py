"""Class names of VOC and COCO, and the colours masks are saved with."""

from __future__ import annotations

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
"""The 20 classes of PASCAL VOC; mask value c + 1 is class c."""

# fmt: off
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis",
    "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush",
)
# fmt: on
"""The 80 categories of MS COCO by category id (the ids themselves run to 90 with gaps)."""

BACKGROUND = 0
IGNORED = 255
"""Mask value of pixels that count neither for nor against any class."""

MAX_CLASSES = IGNORED - 1
"""Masks are 8-bit: 0 is background, 1..254 are classes, 255 is ignored."""


def voc_palette() -> list[int]:
    """The VOC colour map: 256 colours as 768 values r, g, b, r, g, b, ... in 0..255.

    Colour i takes the bits of i in turn for red, green and blue, from each channel's highest bit down.
    """
    colours = []
    for index in range(256):
        for channel in range(3):
            colours.append(sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)))
    return colours
