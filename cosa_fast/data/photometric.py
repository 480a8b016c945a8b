"""Photometry of the training views: strengths of the nine operations, and how PIL applies them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torchvision.transforms.v2 import functional as F

from cosa_fast.data.augment import Operation


def enhance_factor(magnitude: int) -> float:
    """Factor of Color, Contrast, Brightness and Sharpness: 0.28 to 1.72 for magnitude 1 to 9 (1 is no change)."""
    return 0.18 * magnitude + 0.1


def solarize_threshold(magnitude: int) -> int:
    """Values from here on are inverted: 25 to 230, the integer part of 25.6 times the magnitude."""
    return 256 * magnitude // 10


def posterize_bits(magnitude: int) -> int:
    """Leading bits that are kept: 4 to 1, four minus the integer part of 0.4 times the magnitude."""
    return 4 - 2 * magnitude // 5


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur of standard deviation `sigma` pixels; 0 leaves the image as it is."""
    return image.filter(ImageFilter.GaussianBlur(sigma)) if sigma > 0 else image


def strengthen(image: Image.Image, operation: int, magnitude: int) -> Image.Image:
    """Apply one `Operation` to an RGB image."""
    match operation:
        case Operation.IDENTITY:
            return image
        case Operation.AUTO_CONTRAST:
            return F.autocontrast(image)
        case Operation.EQUALIZE:
            return F.equalize(image)
        case Operation.SOLARIZE:
            return F.solarize(image, solarize_threshold(magnitude))
        case Operation.COLOR:
            return F.adjust_saturation(image, enhance_factor(magnitude))
        case Operation.CONTRAST:
            return F.adjust_contrast(image, enhance_factor(magnitude))
        case Operation.BRIGHTNESS:
            return F.adjust_brightness(image, enhance_factor(magnitude))
        case Operation.SHARPNESS:
            return F.adjust_sharpness(image, enhance_factor(magnitude))
        case Operation.POSTERIZE:
            return F.posterize(image, posterize_bits(magnitude))
        case _:
            raise AssertionError(f"operation {operation}")


def blur_kernel(sigma: float) -> NDArray[np.float32]:
    """(taps,) weights of PIL's Gaussian blur along one axis, (1,) for `sigma` 0.

    PIL approximates a Gaussian by three box filters whose fractional width gives them the variance sigma² together
    (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", 2011).
    """
    variance = sigma**2 / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([edge, *[1.0] * (2 * whole + 1), edge]) if edge > 0 else np.ones(2 * whole + 1)
    box /= box.sum()
    return np.convolve(np.convolve(box, box), box).astype(np.float32)


def sharpness_kernel(factor: float) -> NDArray[np.float32]:
    """(3, 3) weights of PIL's Sharpness: the image blended with its 3x3 smoothing by `factor`."""
    smooth = np.ones((3, 3)) / 13
    smooth[1, 1] = 5 / 13
    identity = np.zeros((3, 3))
    identity[1, 1] = 1
    return (factor * identity + (1 - factor) * smooth).astype(np.float32)
