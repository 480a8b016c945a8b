"""Inference: what scales, mirroring and labels do, counted by hand; loading; prefetching."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partialmethod
from itertools import count, islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from cosa_fast.bands import BAND_BYTES, bands
from cosa_fast.config import ModelConfig, MultistageConfig, RuntimeConfig
from cosa_fast.data.index import Image, Index
from cosa_fast.inference import (
    Prediction,
    ahead,
    cam_label_map,
    chunks,
    for_inference,
    label_map,
    label_maps,
    mask_values,
    normalise,
    predict,
    predict_segmenter,
    prefetch,
    read_rgb,
    resize,
    square,
    to_tensor,
    worth_compiling,
)
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.multi_scale import MultiScale
from cosa_fast.models.segmenter import Segmenter, build_segmenter
from cosa_fast.runtime import resolve
from cosa_fast.transfer import to_device

CPU = resolve(RuntimeConfig(device="cpu"))


@pytest.fixture(scope="module")
def net() -> CosaNet:
    torch.manual_seed(0)
    config = ModelConfig(name="mini_vit", pretrained=False, decoder_dim=8, decoder_dilation=2, aux_norm=True)
    return CosaNet(config, num_classes=3, image_size=48, pretrained=False).eval()


def test_predict_shapes_ranges_and_labels(net: CosaNet) -> None:
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    got = predict(net, torch.randn(2, 3, 48, 48), labels, (1.0, 0.5), True, CPU)
    assert got.cams.shape == (2, 3, 48, 48)
    assert got.seg.shape == (2, 4, 48, 48)
    assert got.cams.min() >= 0
    assert got.cams.max() <= 1
    assert got.cams[0, 0].max() > 0.9  # present classes reach 1 somewhere
    assert got.cams[labels == 0].abs().max() == 0


def test_segmentation_knows_nothing_of_the_labels(net: CosaNet) -> None:
    images = torch.randn(1, 3, 48, 48)
    one, other = (predict(net, images, labels, (1.0,), True, CPU) for labels in (torch.ones(1, 3), torch.zeros(1, 3)))
    assert torch.equal(one.seg, other.seg)
    assert not torch.equal(one.cams, other.cams)


def test_flip_makes_the_prediction_equivariant(net: CosaNet) -> None:
    images, labels = torch.randn(1, 3, 48, 48), torch.ones(1, 3)
    straight = predict(net, images, labels, (1.0, 0.5), True, CPU)
    mirrored = predict(net, images.flip(-1), labels, (1.0, 0.5), True, CPU)
    torch.testing.assert_close(mirrored.seg.flip(-1), straight.seg, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mirrored.cams.flip(-1), straight.cams, atol=1e-4, rtol=1e-4)


def test_scales_add_up(net: CosaNet) -> None:
    images, labels = torch.randn(1, 3, 48, 48), torch.ones(1, 3)
    both = predict(net, images, labels, (1.0, 0.5), False, CPU).seg
    one, half = (predict(net, images, labels, (scale,), False, CPU).seg for scale in (1.0, 0.5))
    torch.testing.assert_close(both, one + half)


class Constant(nn.Module):
    """Logits that copy the first channel of the image: class 1 where it is positive."""

    def forward(self, images: Tensor) -> Tensor:
        red = images[:, :1]
        return torch.cat([-red, red, red.new_full(red.shape, -20.0)], dim=1)


def test_segmenter_probabilities_add_up_over_scales_and_mirrors() -> None:
    net = Segmenter(Constant(), stride=4)
    images = torch.full((2, 3, 6, 10), 0.3)
    total = predict_segmenter(net, images, (1.0, 0.5, 1.5), True, CPU)
    assert total.shape == (2, 3, 6, 10)
    expected = 6 * torch.tensor([-0.3, 0.3, -20.0]).softmax(0)
    torch.testing.assert_close(total, expected.view(1, 3, 1, 1).expand_as(total))
    images = torch.randn(1, 3, 6, 10)
    assert torch.equal(predict_segmenter(net, images, (1.0,), False, CPU)[0].argmax(0), (images[0, 0] > 0).long())


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("band", [1, 5000, 2**30])
@pytest.mark.parametrize("size", [(48, 48), (37, 90), (201, 33), (1, 1), (16, 500)])
def test_bands_are_the_whole_map(
    net: CosaNet, flip: bool, band: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BAND_BYTES, "cpu", band)
    torch.manual_seed(1)
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    got = predict(net, torch.randn(2, 3, 48, 48), labels, (1.0, 0.5, 1.5), flip, CPU)
    whole = resize(got.seg[1], size)
    bands = list(got.seg_bands(1, size))
    assert [row for rows, _ in bands for row in range(*rows.indices(size[0]))] == list(range(size[0]))
    if band == 1:
        assert len(bands) == size[0]
    torch.testing.assert_close(torch.cat([scores for _, scores in bands], dim=1), whole, atol=1e-5, rtol=1e-5)
    free, filtered = label_maps(bands, size, torch.tensor([0, 2], dtype=torch.uint8))
    assert free.dtype == filtered.dtype == torch.uint8
    # The same where the best two differ by more than rounding.
    for values, found, present in ((whole, free, None), (whole[[0, 2]], filtered, labels[1])):
        best = values.topk(2, dim=0).values
        clear = best[0] - best[1] > 1e-5
        assert clear.float().mean() > 0.99
        assert torch.equal(found[clear], label_map(whole, present)[clear])


def test_bands_of_dataset_sized_maps() -> None:
    """As many classes as VOC and COCO have, and a rectangular input."""
    generator = torch.Generator().manual_seed(0)
    for kinds, side, size in ((21, (448, 448), (188, 250)), (81, (224, 224), (240, 320)), (5, (96, 160), (123, 77))):
        views = [(side[0] * k // 64, side[1] * k // 64) for k in (4, 2, 6)] * 2
        seg = tuple(torch.randn(1, kinds, *view, generator=generator) for view in views)
        got = Prediction(MultiScale(seg[:3], seg[3:], (), (), seg, ()), torch.ones(1, kinds - 1), side)
        whole = resize(got.seg[0], size)
        free, _ = label_maps(got.seg_bands(0, size), size, torch.tensor([0, 3], dtype=torch.uint8))
        best = whole.topk(2, dim=0).values
        assert not ((free != label_map(whole)) & (best[0] - best[1] > 1e-4)).any()


def test_cams_of_some_classes(net: CosaNet) -> None:
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    got = predict(net, torch.randn(2, 3, 48, 48), labels, (1.0, 0.5), True, CPU)
    for slot, present in ((0, (0, 2)), (1, ())):
        kept = mask_values(Image("a", "a.jpg", 48, 48, present), torch.device("cpu"))
        assert kept.tolist() == [0, *(label + 1 for label in present)]
        for some, dense in zip(got.cams_of(slot, kept), (got.cams[slot], got.aux_cams[slot]), strict=True):
            assert torch.equal(some, dense[list(present)] if present else torch.zeros(1, 48, 48))
            found = cam_label_map(some, 0.4, (31, 52), kept)
            maps = resize(dense, (31, 52))
            assert torch.equal(found, torch.where(maps.amax(0) >= 0.4, maps.argmax(0) + 1, 0).to(torch.uint8))
    assert not torch.equal(got.cams, got.aux_cams)


def test_label_map() -> None:
    scores = torch.zeros(4, 2, 2)
    scores[3, 0, 0] = 5  # best of all, but absent
    scores[1, 0, 0] = 1  # second best, present
    scores[2, 0, 1] = 2  # absent, background is next
    scores[0] += 0.5
    assert label_map(scores).tolist() == [[3, 2], [0, 0]]
    assert label_map(scores, torch.tensor([1.0, 0, 0])).tolist() == [[1, 0], [0, 0]]
    assert label_map(scores, torch.zeros(3)).tolist() == [[0, 0], [0, 0]]  # the background is never masked
    assert label_map(scores).dtype == torch.uint8


def test_scores_are_resized_not_labels() -> None:
    """Between a weak background and a strong class 1 the class gets more than half of the pixels."""
    scores = resize(torch.tensor([[[1.0, 0.0]], [[0.0, 9.0]]]), (1, 8))
    assert label_map(scores).tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]  # third pixel: background 0.875, class 1 9 * 0.125
    assert resize(torch.zeros(2, 4, 4), (5, 3)).shape == (2, 5, 3)


def test_loading(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20).save(tmp_path / "grey.png")
    index = Index("Test", "voc", True, str(tmp_path), ("cat",), "train", (), {})
    entry = Image("grey", "grey.png", 4, 3, (0,))
    image = read_rgb(index, entry)
    assert image.mode == "RGB"
    assert to_tensor(image).shape == (3, 3, 4)
    assert to_tensor(image)[:, 1, 2].tolist() == [120, 120, 120]
    assert square(image, 7).shape == (3, 7, 7)
    values = normalise(to_tensor(image)[None], (0.5, 0.5, 0.5), (0.25, 0.5, 1.0), torch.device("cpu"))
    expected = 120 / 255 - 0.5
    assert values[0, :, 1, 2].tolist() == pytest.approx([expected / 0.25, expected / 0.5, expected])
    with pytest.raises(ValueError, match=r"grey.png has height and width \(3, 4\) but \(4, 3\) in the index"):
        read_rgb(index, replace(entry, width=3, height=4))
    with pytest.raises(ValueError, match=r"cannot decode .*none\.jpg"):
        read_rgb(index, replace(entry, path="none.jpg"))


def test_normalise_leaves_its_input_alone() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    before = pixels.clone()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    values = normalise(pixels, mean, std, torch.device("cpu"))
    assert torch.equal(pixels, before)
    expected = (pixels.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(values, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    config = ModelConfig(name="mini_vit", pretrained=False, decoder_dim=8, decoder_dilation=2, aux_norm=True)
    model = CosaNet(config, num_classes=3, image_size=48, pretrained=False).eval().to(device)
    machine = resolve(RuntimeConfig(device="cuda", precision="fp32", compile="off"))
    entry = Image("a", "a.jpg", 90, 37, (0, 2))

    def maps() -> list[Tensor]:
        pixels = torch.full((1, 3, 48, 48), 100, dtype=torch.uint8)
        images = normalise(pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), device)
        labels = to_device(torch.tensor([[1.0, 0, 1]]), device)
        got = predict(model, images, labels, (1.0, 0.5), True, machine)
        kept = mask_values(entry, device)
        cams, _ = got.cams_of(0, kept)
        of_bands = label_maps(got.seg_bands(0, (37, 90)), (37, 90), kept)
        return [*of_bands, cam_label_map(cams, 0.4, (37, 90), kept), *got.label_maps([(37, 90)])]

    expected = maps()  # compiles, and allocates pinned memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = maps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_prefetch_keeps_order_and_bounds() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    source = prefetch(work, count(), threads=3, ahead=5)
    assert list(islice(source, 20)) == [item * item for item in range(20)]
    assert max(started) <= 20 + 5
    source.close()  # type: ignore[attr-defined]
    assert all(not thread.name.startswith("ThreadPool") for thread in threading.enumerate())
    assert list(prefetch(work, range(4), threads=2, ahead=10)) == [0, 1, 4, 9]


def test_prefetch_passes_errors_on() -> None:
    @dataclass
    class Bad(Exception):
        item: int

    def work(item: int) -> int:
        if item == 3:
            raise Bad(item)
        return item

    source = prefetch(work, range(10), threads=2, ahead=2)
    assert [next(source) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Bad):
        next(source)


def test_chunks() -> None:
    assert list(chunks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(chunks([], 2)) == []


def test_taken_ahead() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for item in range(4):
            taken.append(item)
            yield item
        raise ValueError("the fifth")

    found = ahead(source(), 2)
    assert next(found) == 0
    assert taken == [0, 1, 2]
    assert [next(found) for _ in range(3)] == [1, 2, 3]  # what is there comes before the error
    with pytest.raises(ValueError, match="the fifth"):
        next(found)
    assert list(ahead(range(3), 1)) == [0, 1, 2]


@pytest.mark.parametrize("fitting", [1, 2, 100])
def test_label_maps_of_images_of_different_sizes(net: CosaNet, fitting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where images share launches, and as on a CPU."""
    sizes = [(37, 90), (48, 48), (90, 37), (5, 7)]
    got = predict(net, torch.randn(4, 3, 48, 48), torch.ones(4, 3), (1.0, 0.5, 1.5), True, CPU)
    # Each image, then groups of some. Only a GPU's groups have several images: as many as fit in a band.
    single = got.label_maps(sizes)
    monkeypatch.setitem(BAND_BYTES, "cpu", fitting * 4 * 4 * 90 * 90)
    together = []
    for start in range(0, 4, fitting):
        chosen = sizes[start : start + fitting]
        views = [view[start : start + fitting] for view in got.summed_views]
        maps = torch.cat([scores.argmax(dim=2) for _, scores in bands(views, got.side, chosen)], dim=1)
        together += [labels[:height, :width] for labels, (height, width) in zip(maps, chosen, strict=True)]
    for slot, (size, alone, other) in enumerate(zip(sizes, single, together, strict=True)):
        whole = resize(got.seg[slot], size)
        best = whole.topk(2, dim=0).values
        clear = best[0] - best[1] > 1e-5
        assert alone.dtype == torch.uint8
        assert clear.float().mean() > 0.99
        for found in (alone, other):
            assert torch.equal(found[clear].int(), label_map(whole)[clear].int())


def test_filling_a_batch_changes_nothing(net: CosaNet) -> None:
    images, labels = torch.randn(2, 3, 48, 48), torch.ones(2, 3)
    plain, filled = (predict(net, images, labels, (1.0, 0.5), True, CPU, batch=batch) for batch in (None, 5))
    assert filled.seg.shape == plain.seg.shape
    torch.testing.assert_close(filled.seg, plain.seg, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(filled.cams, plain.cams, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(filled.logits, plain.logits, atol=1e-5, rtol=1e-5)


def test_a_split_compiles_each_scale_once(net: CosaNet, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = deepcopy(net)
    eagerly = partialmethod(nn.Module.compile, backend="eager")  # dynamo's part, without the minute of its compiler
    monkeypatch.setattr(nn.Module, "compile", eagerly)
    torch.compiler.reset()
    for_inference(compiled, CPU, compiled=True)
    images, labels = torch.randn(3, 3, 48, 48), torch.ones(3, 3)

    def seg(count: int) -> Tensor:
        return predict(compiled, images[:count], labels[:count], (1.0, 0.5), True, CPU, batch=3).seg

    before = counters["stats"]["unique_graphs"]
    first = seg(3)
    assert counters["stats"]["unique_graphs"] == before + 2  # scales, not blocks
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(seg(3), first)
        torch.testing.assert_close(seg(1), first[:1], atol=1e-5, rtol=1e-5)  # the last batch of a split
    expected = predict(net, images, labels, (1.0, 0.5), True, CPU).seg
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


def test_what_pays_for_a_compilation() -> None:
    for setting, images, pays in (("on", 1, True), ("off", 10**6, False), ("auto", 10**6, False)):  # auto: on a GPU
        config = RuntimeConfig(device="cpu", compile=setting)
        assert worth_compiling(config, resolve(config), images) is pays


def test_weights_in_bf16_are_what_autocast_makes_of_them(net: CosaNet) -> None:
    half = resolve(RuntimeConfig(device="cpu", precision="bf16"))
    images, labels = torch.randn(2, 3, 48, 48), torch.ones(2, 3)
    converted = deepcopy(net)
    for_inference(converted, half)
    assert converted.decoder[0].weight.dtype == torch.bfloat16
    assert converted.encoder.vit.norm.weight.dtype == torch.float32
    expected, found = (predict(one, images, labels, (1.0, 0.5), True, half) for one in (net, converted))
    assert torch.equal(found.seg, expected.seg)
    assert torch.equal(found.cams, expected.cams)
    for_inference(net, CPU)  # in fp32 nothing changes
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


def test_cosa_ms_in_bf16_reads_channels_last() -> None:
    half = resolve(RuntimeConfig(device="cpu", precision="bf16"))
    torch.manual_seed(0)
    config = MultistageConfig(architecture="DeepLabV3Plus", encoder="tu-test_resnet", encoder_weights=None)
    plain = build_segmenter(config, 4).eval()
    converted = deepcopy(plain)
    for_inference(converted, half)
    kernels = [module.weight for module in converted.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    images = torch.randn(2, 3, 50, 70)
    expected, found = (predict_segmenter(net, images, (1.0, 0.5), True, half) for net in (plain, converted))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)  # bf16 in another order of additions
