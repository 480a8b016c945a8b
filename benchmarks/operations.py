"""What is measured: each operation with its providers, its shapes, and the least it has to move and compute.

I/O and exponentials are counted by hand, per operation, as the least that any program must do: each input read once,
each output written once, one exponential (or logarithm) where the formula has one. Divided by the time they give what
a provider achieves; divided by the machine's ceilings, the time below which no version can get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import cosa_kernels
import torch
from cosa_kernels import reference
from cosa_kernels.implementation import Impl
from cosa_kernels.ops.confidence_histogram import confidence_histogram
from torch import Tensor

from benchmarks import release
from benchmarks.shapes import Shape

THRESHOLD = 0.5
SCALES = (1.0, 0.5, 1.5)
"""Of the teacher's views, each with its mirror image."""
BINS = 256
STEPS = 60
"""Of the fit's EM."""


class Work(NamedTuple):
    """The least to be done in one mode."""

    bytes: float
    exps: float = 0.0


@dataclass(frozen=True)
class Case:
    """An operation on given inputs."""

    providers: dict[str, Callable[[], Any]]
    """Each returns a loss, or a tuple of tensors where there is no gradient."""
    leaf: Tensor | None
    """What gets the gradient; None: there is only a forward pass."""
    work: dict[str, Work]
    agree: frozenset[str] = frozenset({"eager", "compile", "ours"})
    """Providers that compute the same function; the others do what the release does instead."""
    slack: float = 0.0
    """Relative error that the method itself may have."""
    results: tuple[str, ...] = ("result",)
    """Names of what is returned where there is no gradient."""
    compilable: bool = True
    """Whether torch.compile of the eager formula makes sense."""


@dataclass(frozen=True)
class Inputs:
    """Random inputs, the same on every device: drawn on the CPU, rounded to `dtype`, handed over as `given`."""

    device: str
    dtype: torch.dtype
    given: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def place(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).to(self.device, self.given)

    def normal(self, *shape: int) -> Tensor:
        return self.place(2.0 * torch.randn(shape, generator=self.generator))

    def leaf(self, *shape: int) -> Tensor:
        return self.normal(*shape).requires_grad_()

    def present(self, shape: Shape) -> Tensor:
        """(B, C): one or two classes per image, up to five of many (as in VOC and COCO)."""
        most = min(shape.classes, 2 if shape.classes < 40 else 5)
        labels = torch.zeros(shape.batch, shape.classes)
        for image in labels:
            count = int(torch.randint(1, most + 1, (), generator=self.generator))
            image[torch.randperm(shape.classes, generator=self.generator)[:count]] = 1.0
        return labels.to(self.device)

    def cams(self, present: Tensor, size: tuple[int, int]) -> Tensor:
        """A blob for each present class, normalised to [0, 1]; zero for the others."""
        y, x = (torch.linspace(0, 1, side) for side in size)
        center, width = (torch.rand(*present.shape, 2, 1, generator=self.generator) for _ in range(2))
        rows, columns = (
            ((axis - center[:, :, i]) / (0.15 + 0.3 * width[:, :, i])) ** 2 for i, axis in enumerate((y, x))
        )
        maps = torch.exp(-rows[..., :, None] - columns[..., None, :])
        maps = maps - maps.amin(dim=(2, 3), keepdim=True)
        maps = maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6)
        return self.place(maps * present.cpu()[..., None, None])

    def box(self, shape: Shape) -> Tensor:
        """(B, 4): up to a quarter of each side is padding."""
        side = torch.tensor(shape.high)
        shares = 0.25 * torch.rand(shape.batch, 2, generator=self.generator)
        start = (shares * side).long()
        return torch.stack([start[:, 0], side[0].expand(len(start)), start[:, 1], side[1].expand(len(start))], 1).to(
            self.device
        )


def raw_cross_entropy(shape: Shape, inputs: Inputs) -> Case:
    channels = shape.classes + 1
    logits = inputs.leaf(shape.batch, channels, *shape.low)
    present, box = inputs.present(shape), inputs.box(shape)
    cams = [inputs.cams(present, shape.low) for _ in range(shape.targets)]
    xi = torch.tensor(THRESHOLD, device=inputs.device)
    # The release merges its CAMs at full resolution and passes them on so.
    full = [reference.upsample(maps, shape.high) for maps in cams]
    keywords: dict[str, Any] = {"size": shape.high, "valid_box": box}

    def eager() -> Tensor:
        losses = [reference.raw_cross_entropy(logits, maps, xi, **keywords) for maps in cams]
        return torch.stack(losses).sum()

    def as_released() -> Tensor:
        with torch.no_grad():
            targets = [release.pseudo_labels(maps, present, box) for maps in full]
        return release.balanced_cross_entropy(logits, targets)

    # I/O: read logits and each target's CAMs at low resolution; full: write the gradient of the logits.
    # Exponentials: one per channel and pixel; a logarithm per pixel, and one per pixel and target (perplexity).
    e = logits.element_size()
    read = shape.low_pixels * (channels + shape.targets * shape.classes) * e
    exps = shape.high_pixels * (channels + 1 + shape.targets)
    return Case(
        {
            "eager": eager,
            "ours": lambda: cosa_kernels.raw_cross_entropy(logits, cams, [xi] * len(cams), **keywords),
            "release": as_released,
        },
        logits,
        _loss_work(read, exps, logits),
    )


def upsample_cross_entropy(shape: Shape, inputs: Inputs) -> Case:
    channels = shape.classes + 1
    logits = inputs.leaf(shape.batch, channels, *shape.low)
    # Regions of a few dozen pixels a side, a tenth of them unlabelled.
    coarse = tuple(max(1, side // 32) for side in shape.high)
    regions = torch.randint(0, channels, (shape.batch, 1, *coarse), generator=inputs.generator).float()
    regions[torch.rand(regions.shape, generator=inputs.generator) < 0.1] = 255.0
    target = torch.nn.functional.interpolate(regions, size=shape.high, mode="nearest")[:, 0].byte().to(inputs.device)
    # I/O: read logits and labels (one byte each); full: write the gradient of the logits.
    # Exponentials: one per channel and pixel; a logarithm per pixel.
    read = shape.low_pixels * channels * logits.element_size() + shape.high_pixels
    return Case(
        {
            "eager": lambda: reference.upsample_cross_entropy(logits, target),
            "ours": lambda: cosa_kernels.upsample_cross_entropy(logits, target),
        },
        logits,
        _loss_work(read, shape.high_pixels * (channels + 1), logits),
    )


def csc_info_nce(shape: Shape, inputs: Inputs) -> Case:
    vectors = inputs.leaf(shape.batch, shape.classes, *shape.low)
    maps = inputs.cams(inputs.present(shape), shape.low)
    labels, perplexity = reference.cam_pseudo_labels(maps, THRESHOLD)
    keywords: dict[str, Any] = {"temperature": 0.1, "scope": shape.scope}
    # I/O: read vectors, labels (one byte), perplexity (float32); full: write the gradient of the vectors.
    # Exponentials: one per ordered pair of anchors in scope. (Without an N x N tensor the gradient needs another one.)
    anchors = (perplexity <= 1.0).flatten(1).sum(dim=1).double()
    pairs = float((anchors**2).sum() if shape.scope == "image" else anchors.sum() ** 2)
    read = vectors.nbytes + 5 * shape.low_pixels
    return Case(
        {
            "eager": lambda: reference.csc_info_nce(vectors, labels, perplexity, **keywords),
            "ours": lambda: cosa_kernels.csc_info_nce(vectors, labels, perplexity, **keywords),
        },
        vectors,
        _loss_work(read, pairs, vectors),
    )


def teacher_targets(shape: Shape, inputs: Inputs) -> Case:
    """All that the teacher's views are for: the threshold's histogram, labels and their reliability, and the SPL.

    `ours` merges the maps of the present classes and knows no others; `full` merges and reads (B, C, H, W).
    """
    present, box = inputs.present(shape), inputs.box(shape)
    classes = _listed(present)
    cams, mirrored, unflipped = _views(shape, shape.classes, inputs)
    seg, seg_mirrored, seg_unflipped = _views(shape, shape.classes + 1, inputs)
    xi = torch.tensor(THRESHOLD, device=inputs.device)

    def from_all_classes(impl: Impl) -> tuple[Tensor, Tensor, Tensor]:
        merged = cosa_kernels.merge_cams(cams, mirrored, class_labels=present, size=shape.high, impl=impl)
        return read(merged, None, impl)

    def from_present_classes() -> tuple[Tensor, Tensor, Tensor]:
        index = classes.clamp(min=0)[..., None, None]
        few, few_mirrored = ([view.take_along_dim(index, dim=1) for view in views] for views in (cams, mirrored))
        merged = cosa_kernels.merge_cams(few, few_mirrored, class_labels=classes >= 0, size=shape.high)
        return read(merged, classes, "auto")

    def read(merged: Tensor, names: Tensor | None, impl: Impl) -> tuple[Tensor, Tensor, Tensor]:
        counts = confidence_histogram(merged, bins=BINS, valid_box=box, impl=impl)
        _, perplexity = cosa_kernels.cam_pseudo_labels(merged, xi, classes=names, valid_box=box, impl=impl)
        views = [*seg, *seg_mirrored]
        spl = cosa_kernels.seg_pseudo_labels(views, present, size=shape.high, grid=shape.low, impl=impl)
        # Its reciprocal is continuous at the threshold; the labels, made with it, would flip there with the rounding.
        return counts.double(), perplexity.reciprocal(), spl

    def as_released() -> tuple[Tensor, Tensor]:
        labels = release.pseudo_labels(release.merge_cams(cams, unflipped, present, shape.high), present, box)
        probabilities = release.seg_pseudo_labels(seg, seg_unflipped, present, shape.high)
        return labels, reference.upsample(probabilities, shape.low)

    # I/O: of the CAMs' views read the present classes; write labels (one byte) and reliability of each pixel. Of the
    # segmentation's views read background and present classes; write all at low resolution.
    # Exponentials: a logarithm per pixel; those of a softmax at the four pixels that each output of the low resolution
    # mixes.
    e = cams[0].element_size()
    shown = float(present.sum())
    taken = 2 * e * sum(view[0, 0].numel() for view in cams) * (2 * shown + shape.batch)
    written = 5 * shape.high_pixels + 4 * shape.low_pixels * (shape.classes + 1)
    exps = shape.high_pixels + 4 * shape.low[0] * shape.low[1] * (shown + shape.batch)
    return Case(
        {
            "eager": lambda: from_all_classes("reference"),
            "ours": from_present_classes,
            "full": lambda: from_all_classes("auto"),
            "release": as_released,
        },
        None,
        {"forward": Work(taken + written, exps)},
        frozenset({"eager", "compile", "ours", "full"}),
        results=("histogram", "reliability", "segmentation pseudo-labels"),
    )


def _listed(present: Tensor) -> Tensor:
    """(B, P) int64: the classes of a multi-hot (B, C), ascending, then -1."""
    most = max(1, int(present.sum(dim=1).max()))
    rows = [[*row.nonzero()[:, 0].tolist(), *[-1] * most][:most] for row in present]
    return torch.tensor(rows, device=present.device)


def seg_to_cam_loss(shape: Shape, inputs: Inputs) -> Case:
    # Above 0, where the release's ReLU changes nothing.
    cam_logits = inputs.place(torch.rand(shape.batch, shape.classes, *shape.low, generator=inputs.generator))
    cam_logits.requires_grad_()
    present = inputs.present(shape)
    seg, mirrored, unflipped = _views(shape, shape.classes + 1, inputs)
    views = [*seg, *mirrored]

    def as_released() -> Tensor:
        with torch.no_grad():
            probabilities = release.seg_pseudo_labels(seg, unflipped, present, shape.high)
        return release.seg_to_cam_loss(cam_logits, probabilities)

    # I/O: read the CAM logits and background and present classes of the segmentation's views; full: write the
    # gradient of the CAM logits. Exponentials: those of a softmax at the four pixels that each output mixes; an
    # exponential and a logarithm per CAM logit.
    shown = float(present.sum()) + shape.batch
    read = cam_logits.nbytes + 2 * cam_logits.element_size() * sum(view[0, 0].numel() for view in seg) * shown
    exps = 4 * shape.low[0] * shape.low[1] * shown + 2 * cam_logits.numel()
    return Case(
        {
            "eager": lambda: reference.seg_to_cam_loss(cam_logits, views, present, size=shape.high),
            "ours": lambda: cosa_kernels.seg_to_cam_loss(cam_logits, views, present, size=shape.high),
            "release": as_released,
        },
        cam_logits,
        _loss_work(read, exps, cam_logits),
        frozenset({"eager", "compile", "ours", "release"}),
    )


def fit_bimodal_threshold(shape: Shape, inputs: Inputs) -> Case:
    """On the confidences of `shape.low_pixels` positions, histogram included."""
    count = shape.low_pixels
    below = 0.15 + 0.08 * torch.randn(int(0.7 * count), generator=inputs.generator)
    above = 0.6 + 0.15 * torch.randn(count - len(below), generator=inputs.generator)
    values = inputs.place(torch.cat([below, above]).clamp(0.0, 1.0))
    wide = torch.promote_types(values.dtype, torch.float32)

    def eager() -> Tensor:
        slot = (values * BINS).long().clamp(0, BINS - 1)
        counts = torch.zeros(BINS, dtype=wide, device=values.device)
        return reference.fit_bimodal_threshold(counts.scatter_add_(0, slot, torch.ones_like(values, dtype=wide)))

    # I/O: read the values. Exponentials: the EM's, per step, mode and bin.
    return Case(
        {
            "eager": eager,
            "ours": lambda: cosa_kernels.fit_bimodal_threshold(values=values, bins=BINS, iterations=STEPS),
            "release": lambda: torch.tensor(release.fit_thresholds(values)),
            "sklearn": lambda: torch.tensor(release.fit_two_modes(values)),
        },
        None,
        {"forward": Work(values.nbytes, 2 * BINS * STEPS)},
        agree=frozenset({"eager", "ours", "sklearn"}),
        slack=0.015,  # one bin
        compilable=False,  # a loop of sixty steps: minutes to compile
    )


def _views(shape: Shape, channels: int, inputs: Inputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The network's maps per scale; those of the mirrored image flipped back; and the same as they were."""
    sides = [tuple(max(1, round(scale * side)) for side in shape.low) for scale in SCALES]
    plain = [inputs.normal(shape.batch, channels, *side) for side in sides]
    mirrored = [inputs.normal(shape.batch, channels, *side) for side in sides]
    return plain, mirrored, [view.flip(-1).contiguous() for view in mirrored]


def _loss_work(read: float, exps: float, leaf: Tensor) -> dict[str, Work]:
    """Of a loss whose gradient can come with it: the backward pass reads it and writes it scaled."""
    return {
        "forward": Work(read, exps),
        "full": Work(read + leaf.nbytes, exps),
        "backward": Work(2 * leaf.nbytes),
    }


BUILD: dict[str, Callable[[Shape, Inputs], Case]] = {
    function.__name__: function
    for function in (
        raw_cross_entropy,
        upsample_cross_entropy,
        csc_info_nce,
        teacher_targets,
        seg_to_cam_loss,
        fit_bimodal_threshold,
    )
}


def build(name: str, shape: Shape, inputs: Inputs, with_compile: bool = False) -> Case:
    """The operation's case; `with_compile`: with torch.compile of the eager formula among the providers."""
    case = BUILD[name](shape, inputs)
    if not (with_compile and case.compilable):
        return case
    torch._dynamo.reset()
    eager = case.providers["eager"]
    return replace(case, providers={"eager": eager, "compile": torch.compile(eager, dynamic=False), **case.providers})
