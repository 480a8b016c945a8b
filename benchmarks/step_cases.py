"""What `benchmarks.step` measures: presets, synthetic batches, and a trainer per variant."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, release
from cosa_fast.config import Config, RuntimeConfig, load_config
from cosa_fast.data.batch import Batch
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.multi_scale import multi_scale
from cosa_fast.runtime import resolve
from cosa_fast.training.guidance import Guidance
from cosa_fast.training.schedule import poly_lr
from cosa_fast.training.step import Settings, make_trainer

Phase = Literal["warmup", "c2s", "guided"]
Variant = Literal["release", "fp32", "bf16", "fp32_compile", "bf16_compile", "bf16_graphs", "fp8_compile"]
Step = Callable[[int, Batch], dict[str, Tensor]]

PHASES: dict[Phase, int] = {"warmup": 0, "c2s": 1, "guided": 2}
"""The iteration that stands for each phase, in the schedule of `Preset.settings`."""
RUNTIMES: dict[Variant, dict[str, str]] = {
    "fp32": {"precision": "fp32", "compile": "off"},
    "bf16": {"precision": "bf16", "compile": "off"},
    "fp32_compile": {"precision": "fp32", "compile": "on"},
    "bf16_compile": {"precision": "bf16", "compile": "on"},
    "bf16_graphs": {"precision": "bf16", "compile": "graphs"},
    "fp8_compile": {"precision": "fp8", "compile": "on"},
}


@dataclass(frozen=True)
class Preset:
    """A configuration at a size."""

    name: str
    files: tuple[str, ...]
    classes: int
    batch: int
    present: tuple[int, ...]
    """Classes of the first, second, ... image, repeated: their number decides what merging and sharpening cost."""
    crop: int | None = None
    model: str | None = None
    accumulate: int = 1
    starts: tuple[int, int] = (PHASES["c2s"], PHASES["guided"])
    """First iterations of c2s and of guidance."""

    @property
    def config(self) -> Config:
        """The files', with the phases from `starts` on and without fetched weights."""
        config = load_config(*(common.ROOT / "config" / name for name in self.files))
        train = {"c2s_start": self.starts[0], "guidance_start": self.starts[1]}
        train |= {"batch_size": self.batch, "accumulate": self.accumulate}
        changes = {
            "train": config.train.model_copy(update=train),
            "augment": config.augment.model_copy(update={} if self.crop is None else {"crop": self.crop}),
            "model": config.model.model_copy(
                update={"pretrained": False} | ({} if self.model is None else {"name": self.model})
            ),
        }
        return config.model_copy(update=changes)

    @property
    def settings(self) -> Settings:
        config = self.config
        return Settings(config.augment, config.cosa, config.optim, config.train)

    def with_batch(self, batch: int) -> Preset:
        """The same at another batch size."""
        if batch == self.batch:
            return self
        return dataclasses.replace(self, name=f"{self.name.rpartition('_b')[0] or self.name}_b{batch}", batch=batch)

    def network(self) -> CosaNet:
        """On the CPU, with the same random weights each time."""
        torch.manual_seed(0)
        return CosaNet(self.config.model, self.classes, self.config.augment.crop, pretrained=False)


# VOC images show one class or two, COCO's three.
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("minivoc", ("config.yaml",), 10, 16, (1, 2, 1, 2)),
        Preset("voc_b4", ("voc.yaml",), 20, 4, (1, 1, 2, 2)),
        Preset("coco_b8", ("coco.yaml",), 80, 8, (1, 3, 2, 5)),
    )
}
TINY = {
    "minivoc": Preset("minivoc", ("config.yaml",), 10, 2, (1, 2), crop=48),
    "voc_b4": Preset("voc_b4", ("voc.yaml",), 20, 2, (1, 2), crop=64, model="vit_tiny_patch16_224"),
    "coco_b8": Preset("coco_b8", ("coco.yaml",), 80, 2, (2, 3), crop=64, model="vit_tiny_patch16_224"),
}


def synthetic_batch(preset: Preset, device: str, seed: int = 0) -> Batch:
    """Noise of the preset's size; every fourth crop has a padded border, and the labels are those of a real batch."""
    generator = torch.Generator().manual_seed(seed)
    batch, side = preset.batch, preset.config.augment.crop
    weak, strong = torch.randn(2, batch, 3, side, side, generator=generator)
    counts = [preset.present[image % len(preset.present)] for image in range(batch)]
    present = torch.full((batch, max(counts)), -1)
    labels = torch.zeros(batch, preset.classes)
    box = torch.tensor([[0, side, 0, side]]).repeat(batch, 1)
    box[::4, 1] = 3 * side // 4
    for image, count in enumerate(counts):
        chosen = torch.randperm(preset.classes, generator=generator)[:count].sort().values
        present[image, :count] = chosen
        labels[image, chosen] = 1.0
    values = {"weak": weak, "strong": strong, "labels": labels, "present": present, "valid_box": box}
    known = {field.name for field in dataclasses.fields(Batch)}  # older commits, measured as "before", lack some
    made = Batch(**{name: value for name, value in values.items() if name in known}, index=torch.arange(batch))
    return made.to(torch.device(device))


def make_step(preset: Preset, variant: Variant, device: str, net: CosaNet | None = None) -> Step:
    """A fresh training of the variant, of `preset.network()` if no other is given; every call gives the same."""
    net = net or preset.network()
    if variant == "release":
        return ReleaseStep(preset, net.to(device))
    runtime = resolve(RuntimeConfig.model_validate({"device": device} | RUNTIMES[variant]))
    return make_trainer(net, preset.settings, runtime, Guidance(preset.config.cosa.guidance)).step


class ReleaseStep:
    """The authors' way, from its description: fp32, explicit attention, the teacher in every phase, full resolution.

    Left out, in its favour: the bilateral filter on the CPU, the metrics and their waits, the barrier. Its losses are
    not the paper's (`benchmarks.release`).
    """

    def __init__(self, preset: Preset, net: CosaNet) -> None:
        self.online = net.train()
        for module in self.online.modules():
            if isinstance(module, Attention):
                module.fused_attn = False  # type: ignore[misc]  # "Final" is for TorchScript
        self.assignment = copy.deepcopy(self.online).requires_grad_(False)
        self.config, optim = preset.config, preset.config.optim
        self.optimizer = torch.optim.AdamW(
            [p for p in self.online.parameters() if p.requires_grad],
            lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay,
        )  # fmt: skip

    def __call__(self, iteration: int, batch: Batch) -> dict[str, Tensor]:
        """One step; the losses of a phase that has not begun are multiplied by 0."""
        cosa, optim, train = self.config.cosa, self.config.optim, self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = poly_lr(iteration, optim.lr, train.iterations, optim.warmup, optim.power)
        size = (batch.weak.shape[-2], batch.weak.shape[-1])
        with torch.no_grad():
            views = multi_scale(self.assignment, batch.weak, cosa.scales, cosa.flip)
            cams = self._merged(views.cams, views.mirrored_cams, batch, size)
            aux_cams = self._merged(views.aux_cams, views.mirrored_aux_cams, batch, size)
            count = len(cosa.scales)
            mirrored = [view.flip(-1) for view in views.seg[count:]]
            seg = release.seg_pseudo_labels(list(views.seg[:count]), mirrored, batch.labels, size)
            targets = [release.pseudo_labels(maps, batch.labels, batch.valid_box) for maps in (cams, aux_cams)]
        out = self.online(batch.strong)
        classes = [
            nn.functional.multilabel_soft_margin_loss(logits, batch.labels) for logits in (out.logits, out.aux_logits)
        ]
        c2s, s2c = release.balanced_cross_entropy(out.seg, targets), release.seg_to_cam_loss(out.cams, seg)
        on = [float(iteration >= start) for start in (train.c2s_start, train.guidance_start)]
        loss = sum(classes) + on[0] * cosa.lambda_c2s * c2s + on[1] * cosa.lambda_s2c * s2c
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for theirs, ours in zip(self.assignment.parameters(), self.online.parameters(), strict=True):
                theirs.mul_(cosa.momentum).add_(ours, alpha=1.0 - cosa.momentum)
        return {"loss": loss.detach()}

    def _merged(
        self, views: tuple[Tensor, ...], mirrored: tuple[Tensor, ...], batch: Batch, size: tuple[int, int]
    ) -> Tensor:
        return release.merge_cams(list(views), [view.flip(-1) for view in mirrored], batch.labels, size)


@cache
def tflop_per_image(preset: Preset) -> dict[str, float]:
    """10^12 operations of the networks for one image: teacher per scale, student forward and backward.

    Counted on meta tensors; a multiplication with its addition is two. What is not a matrix product is left out.
    """
    config, counts = preset.config, {}
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        net = CosaNet(config.model, preset.classes, config.augment.crop, pretrained=False)
        image = torch.empty(1, 3, config.augment.crop, config.augment.crop)
        with torch.no_grad():
            for scale in config.cosa.scales:
                with FlopCounterMode(display=False) as counter:
                    multi_scale(net.eval(), image, (scale,), config.cosa.flip)
                counts[f"teacher x{scale:g}"] = counter.get_total_flops() / 1e12
        with FlopCounterMode(display=False) as counter:
            out = net.train()(torch.cat([image, image]))  # batch norm wants more than one value
        counts["student"] = counter.get_total_flops() / 2e12
        with FlopCounterMode(display=False) as counter:
            (out.logits.sum() + out.aux_logits.sum() + out.seg.sum() + out.cams.sum()).backward()
        counts["backward"] = counter.get_total_flops() / 2e12
    return counts


def tflop(preset: Preset, phase: Phase) -> float:
    """10^12 operations that the networks need for one step of this phase: vain work does not count."""
    counts = tflop_per_image(preset)
    parts = [count for part, count in counts.items() if phase != "warmup" or not part.startswith("teacher")]
    return preset.batch * sum(parts)
