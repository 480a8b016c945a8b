"""Wide-ResNet-38: the published weights' names and shapes, what it computes, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cosa_fast.config import MultistageConfig
from cosa_fast.models.segmenter import build_segmenter, normalisation
from cosa_fast.models.wide_resnet38 import WideResNet38

WR38 = MultistageConfig(architecture="LargeFOV", encoder="wide_resnet38", encoder_weights=None)

# Model A1 as published: per block its convolutions (outputs, inputs, side) and batch normalisations (channels).
PUBLISHED = """
conv1a . 64,3,3
b2   conv_branch2a 128,64,3    conv_branch2b1 128,128,3   conv_branch1 128,64,1   bn_branch2a 64   bn_branch2b1 128
b2_1 conv_branch2a 128,128,3   conv_branch2b1 128,128,3                           bn_branch2a 128  bn_branch2b1 128
b2_2 conv_branch2a 128,128,3   conv_branch2b1 128,128,3                           bn_branch2a 128  bn_branch2b1 128
b3   conv_branch2a 256,128,3   conv_branch2b1 256,256,3   conv_branch1 256,128,1  bn_branch2a 128  bn_branch2b1 256
b3_1 conv_branch2a 256,256,3   conv_branch2b1 256,256,3                           bn_branch2a 256  bn_branch2b1 256
b3_2 conv_branch2a 256,256,3   conv_branch2b1 256,256,3                           bn_branch2a 256  bn_branch2b1 256
b4   conv_branch2a 512,256,3   conv_branch2b1 512,512,3   conv_branch1 512,256,1  bn_branch2a 256  bn_branch2b1 512
b4_1 conv_branch2a 512,512,3   conv_branch2b1 512,512,3                           bn_branch2a 512  bn_branch2b1 512
b4_2 conv_branch2a 512,512,3   conv_branch2b1 512,512,3                           bn_branch2a 512  bn_branch2b1 512
b4_3 conv_branch2a 512,512,3   conv_branch2b1 512,512,3                           bn_branch2a 512  bn_branch2b1 512
b4_4 conv_branch2a 512,512,3   conv_branch2b1 512,512,3                           bn_branch2a 512  bn_branch2b1 512
b4_5 conv_branch2a 512,512,3   conv_branch2b1 512,512,3                           bn_branch2a 512  bn_branch2b1 512
b5   conv_branch2a 512,512,3   conv_branch2b1 1024,512,3  conv_branch1 1024,512,1 bn_branch2a 512  bn_branch2b1 512
b5_1 conv_branch2a 512,1024,3  conv_branch2b1 1024,512,3                          bn_branch2a 1024 bn_branch2b1 512
b5_2 conv_branch2a 512,1024,3  conv_branch2b1 1024,512,3                          bn_branch2a 1024 bn_branch2b1 512
b6   conv_branch2a 512,1024,1  conv_branch2b1 1024,512,3  conv_branch2b2 2048,1024,1  conv_branch1 2048,1024,1
b6   bn_branch2a 1024 bn_branch2b1 512 bn_branch2b2 1024
b7   conv_branch2a 1024,2048,1 conv_branch2b1 2048,1024,3 conv_branch2b2 4096,2048,1  conv_branch1 4096,2048,1
b7   bn_branch2a 2048 bn_branch2b1 1024 bn_branch2b2 2048
bn7  . 4096
"""
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the PyTorch conversions of `ilsvrc-cls_rna-a1_cls1000_ep-0001.params`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for line in PUBLISHED.strip().splitlines():
        block, *cells = line.split()
        for layer, numbers in zip(cells[::2], cells[1::2], strict=True):
            name = block if layer == "." else f"{block}.{layer}"
            sizes = tuple(int(number) for number in numbers.split(","))
            if len(sizes) == 1:
                shapes |= {f"{name}.{part}": sizes for part in BATCH_NORM}
            else:
                shapes[f"{name}.weight"] = (*sizes, sizes[-1])
    return shapes


def published_weights() -> dict[str, Tensor]:
    """A different constant in every tensor; a single number is stored of each."""
    return {name: torch.tensor(float(at)).expand(shape) for at, (name, shape) in enumerate(published_shapes().items())}


@pytest.fixture(scope="module")
def trunk() -> WideResNet38:
    """With weights that let the signal through all blocks."""
    torch.manual_seed(0)
    net = WideResNet38().eval()
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_var", "weight")) and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 1:
            tensor.uniform_(-0.2, 0.5)
    return net


def test_every_published_tensor_finds_its_place(tmp_path: Path) -> None:
    path = tmp_path / "res38.pth"
    weights = published_weights()
    assert len(weights) == 43 + 4 * 37  # convolutions, and four tensors of each batch normalisation
    torch.save({**weights, "fc8.weight": torch.zeros(20, 4096, 1, 1)}, path)  # conversions may keep a classifier
    loaded = build_segmenter(WR38.model_copy(update={"weights": path}), 21).net.encoder.state_dict()
    assert {name for name in loaded if not name.endswith("num_batches_tracked")} == set(weights)
    for name, tensor in weights.items():
        assert loaded[name].shape == tensor.shape
        assert loaded[name].unique().tolist() == [tensor.flatten()[0].item()], name


def test_safetensors_are_read_too(tmp_path: Path, trunk: WideResNet38) -> None:
    path = tmp_path / "res38.safetensors"
    half = {name: tensor.half() for name, tensor in trunk.state_dict().items() if "num_batches" not in name}
    save_file(half, str(path))
    loaded = build_segmenter(WR38.model_copy(update={"weights": path}), 3).net.encoder.state_dict()
    path.unlink()  # 200 MB
    torch.testing.assert_close(loaded["b7.conv_branch1.weight"], half["b7.conv_branch1.weight"].float())


def test_parameter_count_is_the_published_one(trunk: WideResNet38) -> None:
    """105.07 million, from the published shapes; with the 1000-class layer 109.2 million."""
    parts = {name: shape for name, shape in published_shapes().items() if "running" not in name}
    counted = sum(torch.Size(shape).numel() for shape in parts.values())
    assert counted == sum(parameter.numel() for parameter in trunk.parameters()) == 105_070_912


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b5_1.conv_branch2a.weight": None}, r"\(1 problems\): missing b5_1.conv_branch2a.weight$"),
        (
            {"conv1a.weight": torch.zeros(64, 3, 7, 7)},
            r"does not fit wide_resnet38 \(1 problems\): conv1a.weight is \(64, 3, 7, 7\), wanted \(64, 3, 3, 3\)$",
        ),
        (
            {name: None for name in published_shapes() if name.startswith("b4_3.")},
            r"\(10 problems\): missing b4_3.bn_branch2a.weight; missing b4_3.bn_branch2a.bias(; missing b4_3[^;]+){3}$",
        ),
        ({"epoch": 3}, r"res38.pth must hold a state dict: names and tensors, nothing else"),
    ],
)
def test_files_that_do_not_fit(change: dict[str, object], message: str, tmp_path: Path) -> None:
    weights = {name: value for name, value in {**published_weights(), **change}.items() if value is not None}
    path = tmp_path / "res38.pth"
    torch.save(weights, path)
    with pytest.raises(ValueError, match=message):
        build_segmenter(WR38.model_copy(update={"weights": path}), 21)


class Trap:
    """What a weights file must not be able to make."""


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "res38.pth"
    config = WR38.model_copy(update={"weights": path})
    with pytest.raises(ValueError, match=r"multistage.weights = .*res38.pth does not exist"):
        build_segmenter(config, 21)
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"res38.pth is not a readable PyTorch file \(.*\): give a safetensors file"):
        build_segmenter(config, 21)
    torch.save({"conv1a.weight": Trap()}, path)
    with pytest.raises(ValueError, match=r"res38.pth is not a readable PyTorch file \(Weights only load failed"):
        build_segmenter(config, 21)
    build_segmenter(config, 21, initialise=False)  # a checkpoint follows: the file is not even looked at


@pytest.mark.parametrize(
    "change", [{"encoder": "tu-resnet101d"}, {"encoder": "wide_resnet_38"}, {"architecture": "DeepLabV3Plus"}]
)
def test_goes_with_its_own_head_only(change: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"LargeFOV and wide_resnet38 go together and with nothing else"):
        build_segmenter(WR38.model_copy(update=change), 21)


def test_there_is_nothing_to_fetch() -> None:
    with pytest.raises(ValueError, match=r"no weights that can be fetched: set multistage.weights to a local"):
        build_segmenter(WR38.model_copy(update={"encoder_weights": "imagenet"}), 21)


def test_normalisation_is_imagenets() -> None:
    """Wu et al. scale to [0, 1] and use ImageNet's mean and deviation (ademxapp, issegm/voc.py, for `rna` networks)."""
    for weights in (None, Path("res38.pth")):
        expected = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert normalisation(WR38.model_copy(update={"weights": weights})) == expected


def test_computes_what_wu_et_al_describe(trunk: WideResNet38) -> None:
    """The same from the tensors alone: normalisation and ReLU first, and the projection sees their result."""
    weights = trunk.state_dict()

    def active(x: Tensor, name: str) -> Tensor:
        mean, variance = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5).relu()

    def conv(x: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=dilation * (kernel.shape[-1] // 2), dilation=dilation)

    blocks = {"b2": (2, 1, 1), "b3": (2, 1, 1), "b4": (2, 1, 1), "b5": (1, 1, 2), "b6": (1, 1, 4), "b7": (1, 1, 4)}
    blocks |= {f"b{level}_{at}": (1, 1, 1) for level in (2, 3, 4) for at in (1, 2)}
    blocks |= {f"b4_{at}": (1, 1, 1) for at in (3, 4, 5)} | {f"b5_{at}": (1, 2, 2) for at in (1, 2)}
    images = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        x = conv(images, "conv1a")
        for block in sorted(blocks):
            stride, first, second = blocks[block]
            y = active(x, f"{block}.bn_branch2a")
            shortcut = conv(y, f"{block}.conv_branch1", stride) if f"{block}.conv_branch1.weight" in weights else x
            y = conv(y, f"{block}.conv_branch2a", stride, first)
            y = conv(active(y, f"{block}.bn_branch2b1"), f"{block}.conv_branch2b1", dilation=second)
            if f"{block}.conv_branch2b2.weight" in weights:
                y = conv(active(y, f"{block}.bn_branch2b2"), f"{block}.conv_branch2b2")
            x = y + shortcut
        expected = active(x, "bn7")
        features = trunk(images)
    assert expected.shape == (1, 4096, 5, 7)  # stride 8
    assert expected.std() > 1e-3
    torch.testing.assert_close(features, expected)


def test_drops_channels_in_the_last_two_blocks(trunk: WideResNet38) -> None:
    rates = {name: module.p for name, module in trunk.named_modules() if isinstance(module, torch.nn.Dropout2d)}
    assert {name: rate for name, rate in rates.items() if rate > 0} == {"b6.dropout": 0.3, "b7.dropout": 0.5}


def test_head_and_sizes() -> None:
    with torch.device("meta"):
        net = build_segmenter(WR38, 21).eval()
    head = [module for module in net.net.head if isinstance(module, torch.nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels, conv.kernel_size, conv.dilation) for conv in head] == [
        (4096, 512, (3, 3), (12, 12)),
        (512, 21, (3, 3), (12, 12)),
    ]
    assert net.stride == 8
    for height, width in [(321, 321), (375, 500), (1, 9)]:
        assert net(torch.empty(2, 3, height, width, device="meta")).shape == (2, 21, height, width)
