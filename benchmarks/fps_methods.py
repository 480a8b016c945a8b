"""What `benchmarks.fps` times: networks with random or trained weights, our way and the release's, their pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image as PilImage
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import release
from cosa_fast.config import ModelConfig, MultistageConfig
from cosa_fast.crf import CRF_PRESETS, CrfPool, dense_crf
from cosa_fast.inference import for_inference
from cosa_fast.models.checkpoint import CosaCheckpoint, load_cosa
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.segmenter import SegmenterCheckpoint, build_segmenter, load_segmenter
from cosa_fast.predictors import Batch, Cosa, CosaMs, Labels, Named, System, Views, label_maps, refined_label_maps
from cosa_fast.runtime import Runtime

Checkpoint = CosaCheckpoint | SegmenterCheckpoint
Provider = Literal["ours", "release"]
Crf = Literal["none", "release", "standard"]
VIEWS = {"five": Views((1.0, 0.5, 1.5, 0.75, 1.25), True), "single": Views((1.0,), False)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"voc": ((375, 500), (500, 375), (333, 500), (366, 500)), "coco": ((480, 640), (640, 480), (427, 640))}
"""Height and width of usual pictures."""


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table."""

    network: str
    provider: Provider
    views: str
    batch: int
    precision: str
    compiled: bool
    crf: Crf


def random_network(name: str, tiny: bool) -> Checkpoint:
    """`voc` and `coco`: CoSA with 20 and 80 classes; `resnet101`: DeepLabV3+ for 20. Speed is not in the weights."""
    torch.manual_seed(0)
    classes = tuple(f"class {number}" for number in range(80 if name == "coco" else 20))
    if name == "resnet101":
        encoder = "tu-test_resnet" if tiny else "tu-resnet101d"
        config = MultistageConfig(architecture="DeepLabV3Plus", encoder=encoder, encoder_weights=None)
        segmenter = build_segmenter(config, len(classes) + 1).eval()
        return SegmenterCheckpoint(segmenter, classes, "random", config, MEAN, STD, {}, "")
    model = ModelConfig(name="test_vit" if tiny else "vit_base_patch16_224", pretrained=False)
    net = CosaNet(model, len(classes), 448, pretrained=False).eval()
    return CosaCheckpoint(net, classes, "random", 0.5, 0.5, 0, {}, MEAN, STD, "")


def trained_network(path: Path, kind: Literal["checkpoint", "segmenter"]) -> Checkpoint:
    """What the `train` or the `multistage` stage wrote."""
    return load_cosa(path) if kind == "checkpoint" else load_segmenter(path)


def system(network: Checkpoint, method: Method, size: int, machine: Runtime) -> System:
    """Our way, with a copy of the network."""
    if isinstance(network, SegmenterCheckpoint):
        standalone = replace(network, net=deepcopy(network.net).to(machine.device))
        for_inference(standalone.net, machine)
        return CosaMs(standalone, machine)
    cosa = replace(network, net=deepcopy(network.net).to(machine.device))
    for_inference(cosa.net, machine, method.compiled)
    return Cosa(cosa, size, machine, method.batch)


class Release:
    """The authors' way: one image after the other, fp32, explicit attention; its CRF in the same loop."""

    def __init__(self, network: CosaCheckpoint, device: torch.device) -> None:
        self.net = release.explicit_attention(network.net).to(device)

    def maps(self, batches: Iterator[tuple[Batch, Sequence[Named]]], views: Views, crf: Crf) -> Iterator[Labels]:
        """(H, W) uint8 of each picture."""
        for batch, pictures in batches:
            ((_, images),) = batch.groups
            for slot, (size, (_, picture)) in enumerate(zip(batch.sizes, pictures, strict=True)):
                logits = release.segment(self.net, images[slot : slot + 1], views.scales, views.flip, size)
                if crf == "none":
                    yield logits.argmax(dim=0).to(torch.uint8).cpu().numpy()
                else:
                    probabilities = logits.softmax(dim=0).cpu().numpy()
                    yield dense_crf(np.array(picture), probabilities, CRF_PRESETS[crf])


def our_maps(
    system: System,
    pools: dict[str, CrfPool],
    batches: Iterator[tuple[Batch, Sequence[Named]]],
    views: Views,
    crf: Crf,
) -> Iterator[Labels]:
    """(H, W) uint8 of each picture."""
    if crf == "none":
        return label_maps(system, (batch for batch, _ in batches), views)
    return refined_label_maps(system, batches, views, pools[crf])


def gate(machine: Runtime) -> None:
    """Compare our fp32 logits and label maps with the release's way at small sizes.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    network = random_network("voc", tiny=True)
    assert isinstance(network, CosaCheckpoint)
    sizes = [(30, 52), (64, 64), (91, 33)]
    tolerance = 1e-3 if machine.device.type == "cuda" else 1e-4
    pictures = [picture for _, picture in made_pictures(3, tuple(sizes))]
    for views in VIEWS.values():
        method = Method("voc", "ours", "", 3, "fp32", False, "none")
        ours = system(network, method, 64, machine)
        batch = ours.prepare([ours.pixels(picture) for picture in pictures], sizes)
        theirs = Release(network, machine.device)
        # TF32, which convolutions use by default, would differ by more between batches.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            logits, labels = list(ours.scores(batch, views)), ours.label_maps(batch, views)
        for slot, (size, got) in enumerate(zip(sizes, logits, strict=True)):
            image = batch.groups[0][1][slot : slot + 1]
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                expected = release.segment(theirs.net, image, views.scales, views.flip, size)
            error = float((got - expected).norm() / expected.norm())
            best = expected.topk(2, dim=0).values
            clear = best[0] - best[1] > tolerance * expected.abs().amax()
            same = torch.equal(labels[slot][clear].int(), expected.argmax(dim=0)[clear].int())
            if not (error < tolerance and same and float(clear.float().mean()) > 0.9):
                raise SystemExit(
                    f"ours is wrong, so nothing is measured: at {size}, scales {views.scales}, the logits are "
                    f"{error:.1e} from the release's way, label maps {'equal' if same else 'differ'}"
                )


def gflop(network: Checkpoint, views: Views, size: int) -> float:
    """GFLOP of the network on one image; CoSA-MS: on a VOC-sized one."""
    net = deepcopy(network.net).to("meta")
    height, width = SIZES["voc"][0] if isinstance(network, SegmenterCheckpoint) else (size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for scale in views.scales:
            net(torch.empty(1 + views.flip, 3, round(height * scale), round(width * scale), device="meta"))
    return counter.get_total_flops() / 1e9


# Pictures.


def made_pictures(count: int, sizes: Sequence[tuple[int, int]]) -> list[Named]:
    """Smooth random colours with some noise, of these heights and widths in turn."""
    generator = np.random.default_rng(0)
    pictures = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        cells = generator.integers(0, 256, (math.ceil(height / 60), math.ceil(width / 60), 3), dtype=np.uint8)
        smooth = np.asarray(PilImage.fromarray(cells).resize((width, height)), np.int16)
        noisy = smooth + generator.integers(-8, 9, smooth.shape)
        pictures.append((f"image {number}", PilImage.fromarray(noisy.clip(0, 255).astype(np.uint8))))
    return pictures


def read_pictures(folder: Path, count: int) -> list[Named]:
    """Evenly spaced through the folder.

    Raises:
        SystemExit: no photographs there.
    """
    files = sorted(folder.rglob("*.jpg"))
    if not files:
        raise SystemExit(f"{folder} has no .jpg files: pass --images a folder of photographs")
    chosen = files[:: max(1, len(files) // count)][:count]
    return [(file.stem, PilImage.open(file).convert("RGB")) for file in chosen]


def preparations(system: System, pictures: Sequence[Named]) -> Callable[[int], torch.Tensor]:
    """What comes before the clock starts, of one picture from its JPEG bytes: decoding and resizing."""
    encoded = []
    for _, picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())

    def prepare(number: int) -> torch.Tensor:
        with PilImage.open(io.BytesIO(encoded[number % len(encoded)])) as image:
            return system.pixels(image.convert("RGB"))

    return prepare


Maps = Callable[[Iterator[tuple[Batch, Sequence[Named]]], Views, Crf], Iterator[Labels]]


def ways(
    methods: Sequence[Method], network: Checkpoint, size: int, machines: dict[str, Runtime], pools: dict[str, CrfPool]
) -> dict[Method, tuple[System, Maps]]:
    """Of each method what prepares its batches and what is timed; methods that differ in views or CRF share a copy."""
    made: dict[tuple[str, int, str, bool], tuple[System, Maps]] = {}
    chosen = {}
    for method in methods:
        key = (method.provider, method.batch, method.precision, method.compiled)
        if key not in made:
            machine = machines[method.precision]
            ours = system(network, method, size, machine)
            maps: Maps = partial(our_maps, ours, pools)
            if method.provider == "release":
                assert isinstance(network, CosaCheckpoint)
                maps = Release(network, machine.device).maps
            made[key] = (ours, maps)
        chosen[method] = made[key]
    return chosen
