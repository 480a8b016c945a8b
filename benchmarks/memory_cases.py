"""What `benchmarks.memory` runs: a training step of CoSA, one of CoSA-MS, a batch of the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.fps_methods import SIZES
from benchmarks.step_cases import PHASES, PRESETS, TINY, Preset, make_step, synthetic_batch
from cosa_fast.config import MultistageConfig, load_config
from cosa_fast.inference import cam_label_map, for_inference, label_maps, predict, predict_segmenter
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.segmenter import Segmenter, build_segmenter
from cosa_fast.runtime import Runtime
from cosa_fast.training.multi_stage import SegBatch, SegmenterTrainer

Precision = Literal["fp32", "bf16"]
Training = Literal["minivoc", "voc_b4", "coco_b8"]
Standalone = Literal["ms_resnet101", "ms_wide_resnet38", "ms_swin_base", "ms_swin_large"]
Evaluated = Literal[
    "evaluation_voc",
    "evaluation_coco",
    "evaluation_ms_resnet101",
    "evaluation_ms_wide_resnet38",
    "evaluation_ms_swin_base",
    "evaluation_ms_swin_large",
]
Name = Training | Standalone | Evaluated


class Case(Protocol):
    """One of the pipeline's stages with a batch size."""

    @property
    def name(self) -> str:
        """In the table."""

    @property
    def batch(self) -> int:
        """Images."""

    @property
    def accumulate(self) -> int:
        """Parts of the batch."""

    def network(self, precision: Precision, device: str) -> Any:
        """Random weights, as they should be on the device; made on torch's default one."""

    def ready(self, net: Any, precision: Precision, device: str) -> Callable[[], object]:
        """Move the network to the device; a call of the result does one step or batch."""


def make_case(name: Name, batch: int, accumulate: int, tiny: bool) -> Case:
    """What a name on the command line stands for."""
    presets, (stage, _, what) = TINY if tiny else PRESETS, name.partition("_")
    if name in get_args(Training):
        return CosaStep(replace(presets[name].with_batch(batch), accumulate=accumulate))
    if stage == "ms":
        return SegmenterStep(name, _standalone(name, tiny).model_copy(update={"batch_size": batch}))
    preset = presets["coco_b8" if what == "coco" else "voc_b4"]
    return Evaluation(name, batch, preset, _standalone(what, tiny) if what.startswith("ms_") else None)


def _standalone(file: str, tiny: bool) -> MultistageConfig:
    """The configuration laid over VOC's, with random weights."""
    config = load_config(*(common.ROOT / "config" / f"{name}.yaml" for name in ("voc", file))).multistage
    changes: dict[str, Any] = {"weights": None, "encoder_weights": None}
    if tiny:
        changes |= {"crop": 64} | ({} if config.encoder == "wide_resnet38" else {"encoder": "tu-test_resnet"})
    return config.model_copy(update=changes)


def _machine(precision: Precision, device: str) -> Runtime:
    """As `runtime.resolve` makes it, but on devices that need not exist."""
    return Runtime(torch.device(device), bf16=precision == "bf16", compiles=False)


@dataclass(frozen=True)
class CosaStep:
    """The guided training step of CoSA."""

    preset: Preset

    @property
    def name(self) -> str:
        return self.preset.name.partition("_")[0]

    @property
    def batch(self) -> int:
        return self.preset.batch

    @property
    def accumulate(self) -> int:
        return self.preset.accumulate

    def network(self, precision: Precision, device: str) -> Any:
        return self.preset.network()

    def ready(self, net: Any, precision: Precision, device: str) -> Callable[[], object]:
        step, batch = make_step(self.preset, precision, device, net), synthetic_batch(self.preset, device)
        return lambda: step(PHASES["guided"], batch)


@dataclass(frozen=True)
class SegmenterStep:
    """The training step of CoSA-MS on VOC's classes."""

    name: str
    config: MultistageConfig
    accumulate = 1

    @property
    def batch(self) -> int:
        return self.config.batch_size

    def network(self, precision: Precision, device: str) -> Any:
        return build_segmenter(self.config, 21)

    def ready(self, net: Any, precision: Precision, device: str) -> Callable[[], object]:
        trainer = SegmenterTrainer(net, self.config, _machine(precision, device))
        for group in trainer.optimizer.param_groups:
            group["foreach"] = True  # the default on a GPU; its temporaries are as large as the weights
        pixels = torch.randint(256, (self.batch, 3, self.config.crop, self.config.crop), dtype=torch.uint8)
        batch = SegBatch(pixels, pixels[:, 0] % 21)
        return lambda: trainer.step(0, batch)


@dataclass(frozen=True)
class Evaluation:
    """A batch of the evaluation: five scales with mirror images, label maps of CoSA, its CAMs and perhaps CoSA-MS.

    Pictures of one size, as large as usual ones: CoSA-MS takes all of them at once. Pseudo-labels are CoSA's part with
    fewer scales and maps.
    """

    name: str
    batch: int
    preset: Preset
    standalone: MultistageConfig | None
    accumulate = 1

    def network(self, precision: Precision, device: str) -> Any:
        nets: list[CosaNet | Segmenter] = [self.preset.network().eval()]
        if self.standalone is not None:
            nets.append(build_segmenter(self.standalone, 21).eval())
        for net in nets:
            for_inference(net, _machine(precision, device))
        return nn.ModuleList(nets)

    def ready(self, net: Any, precision: Precision, device: str) -> Callable[[], object]:
        (cosa, *others), machine = net.to(device), _machine(precision, device)
        config, classes = self.preset.config.eval, self.preset.classes
        side, (height, width) = self.preset.crop or config.size, SIZES["coco" if classes == 80 else "voc"][0]
        size = (height * side // config.size, width * side // config.size)  # of a tiny network small ones

        @torch.inference_mode()
        def run() -> None:
            squares = torch.randn(self.batch, 3, side, side, device=device)
            present = torch.ones(self.batch, classes, device=device)
            prediction = predict(cosa, squares, present, config.scales, config.flip, machine)
            scores: list[Tensor] = []
            for segmenter in others:
                pictures = torch.randn(self.batch, 3, *size, device=device)
                scores += predict_segmenter(segmenter, pictures, config.scales, config.flip, machine)
            for slot in range(self.batch):
                labels = self.preset.present[slot % len(self.preset.present)]
                kept = torch.arange(labels + 1, dtype=torch.uint8, device=device)
                main, aux = prediction.cams_of(slot, kept)
                for cams in (main, aux, 0.5 * (main + aux)):
                    cam_label_map(cams, 0.5, size, kept)
                label_maps(prediction.seg_bands(slot, size), size, kept)
                if scores:
                    label_maps([(slice(None), scores[slot])], size, kept)

        return run
