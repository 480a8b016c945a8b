"""The segmentation networks: shapes at any size, options, weights checked key by key, names that don't exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from cosa_fast.config import MultistageConfig, load_config
from cosa_fast.models.segmenter import build_segmenter, normalisation

PRESETS = Path(__file__).resolve().parents[1] / "config"
SMALL = MultistageConfig(encoder="tu-resnet10t", encoder_weights=None)


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [
        ("DeepLabV3Plus", "tu-resnet10t"),
        ("DeepLabV3Plus", "resnet18"),
        ("Unet", "tu-mobilenetv3_small_050"),
        ("FPN", "resnet18"),
        ("UPerNet", "tu-swinv2_cr_tiny_ns_224"),  # made for 224 pixels
        ("UPerNet", "tu-swin_tiny_patch4_window7_224"),
        ("DPT", "tu-vit_tiny_patch16_224"),
        ("Segformer", "mit_b0"),
    ],
)
def test_any_size_in_same_size_out(architecture: str, encoder: str) -> None:
    config = MultistageConfig(architecture=architecture, encoder=encoder, encoder_weights=None)
    net = build_segmenter(config, 4).eval()
    with torch.inference_mode():
        assert net(torch.randn(1, 3, 75, 101)).shape == (1, 4, 75, 101)


def test_deeplab_is_the_authors() -> None:
    net = build_segmenter(SMALL, 21).eval()
    assert net.stride == 16
    rates = {module.dilation for module in net.net.decoder.modules() if isinstance(module, torch.nn.Conv2d)}
    assert {(6, 6), (12, 12), (18, 18)} <= rates
    assert (24, 24) not in rates
    with torch.inference_mode():
        assert net.net.encoder(torch.zeros(1, 3, 64, 64))[-1].shape[-2:] == (4, 4)


def test_swin_is_its_authors() -> None:
    """UPerNet of width 512, stochastic depth up to 0.3, and shifted windows in the last stage as in every other."""
    config = MultistageConfig(architecture="UPerNet", encoder="tu-swin_tiny_patch4_window7_224", encoder_weights=None)
    net = build_segmenter(config, 21).net
    assert net.segmentation_head[0].in_channels == 512
    stages = [net.encoder.model[f"layers_{at}"].blocks for at in range(4)]
    assert [[block.shift_size for block in stage[:2]] for stage in stages] == 4 * [[(0, 0), (3, 3)]]
    assert stages[3][1].drop_path1.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("overlay", "stride", "millions"),
    [
        ("ms_resnet101", 16, 45.694085),
        ("ms_wide_resnet38", 8, 124.042581),
        ("ms_swin_base", 32, 119.994829),  # Liu et al.: 121 M with the auxiliary head
        ("ms_swin_large", 32, 231.885225),  # 234 M
    ],
)
def test_the_papers_networks(overlay: str, stride: int, millions: float) -> None:
    """Every overlay gives a network of the right size that takes its training crops and whole photographs."""
    config = load_config(PRESETS / "voc.yaml", PRESETS / f"{overlay}.yaml").multistage
    with torch.device("meta"):
        net = build_segmenter(config, 21, initialise=False)
    assert net.stride == stride
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(millions, abs=1e-6)
    assert normalisation(config) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for size in [(config.crop, config.crop), (375, 500), (333, 281)]:
        assert net(torch.empty(2, 3, *size, device="meta")).shape == (2, 21, *size)


@pytest.mark.parametrize("dataset", ["voc", "coco", "config"])
def test_overlays_change_nothing_but_the_network(dataset: str) -> None:
    plain = load_config(PRESETS / f"{dataset}.yaml")
    overlays = sorted(PRESETS.glob("ms_*.yaml"))
    assert len(overlays) == 4
    for path in overlays:
        assert path.name in path.read_text().split("\n\n")[0]  # its own usage line
        changed = load_config(PRESETS / f"{dataset}.yaml", path)
        assert changed.model_copy(update={"multistage": plain.multistage}) == plain


def test_padding_does_not_move_the_image() -> None:
    """A translation-free check: what the padded network says of the image's own pixels is cropped from the corner."""
    net = build_segmenter(SMALL, 3).eval()
    image = torch.randn(1, 3, 41, 57)
    padded = torch.zeros(1, 3, 48, 64)
    padded[..., :41, :57] = image
    with torch.inference_mode():
        torch.testing.assert_close(net(image), net.net(padded)[..., :41, :57])


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [
        ("DeepLabV3Plus", "tu-resnet10t"),
        ("DeepLabV3Plus", "tu-resnet101d"),
        ("DeepLabV3Plus", "tu-convnext_atto"),
        ("DeepLabV3Plus", "resnet18"),
        ("UPerNet", "tu-swin_tiny_patch4_window7_224"),
    ],
)
def test_local_weights_of_the_classification_model(architecture: str, encoder: str, tmp_path: Path) -> None:
    donor = timm.create_model(encoder.removeprefix("tu-"), num_classes=7)
    path = tmp_path / "encoder.safetensors"
    save_file(donor.state_dict(), str(path))
    config = MultistageConfig(architecture=architecture, encoder=encoder, weights=path)
    loaded = build_segmenter(config, 4).net.encoder.state_dict()
    plain = {name.replace(".", "_"): tensor for name, tensor in donor.state_dict().items()}
    assert len(loaded) > 20
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, plain[name.removeprefix("model.").replace(".", "_")])
    path.unlink()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    tensors = timm.create_model("resnet10t").state_dict()
    del tensors["conv1.0.weight"]
    tensors["conv1.3.weight"] = torch.zeros(1)
    save_file(tensors, str(path))
    config = SMALL.model_copy(update={"weights": path})
    with pytest.raises(
        ValueError,
        match=r"does not fit tu-resnet10t \(2 problems\): missing model.conv1.0.weight; model.conv1.3",
    ):
        build_segmenter(config, 4)
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        build_segmenter(config, 4)
    build_segmenter(config, 4, initialise=False)  # the file is not even looked at


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "deeplabv3plus"},
            r"architecture = 'deeplabv3plus' does not exist; close names: DeepLabV3Plus",
        ),
        ({"architecture": "xyz"}, r"does not exist; for example: DPT, DeepLabV3, DeepLabV3Plus, FPN, LargeFOV"),
        ({"architecture": "largefov"}, r"does not exist; close names: LargeFOV"),
        (
            {"encoder": "tu-resnet101dd"},
            r"multistage.encoder = 'tu-resnet101dd' does not exist; close.*tu-resnet101d",
        ),
        ({"encoder": "resnet_101"}, r"close names: resnet101"),
        ({"architecture": "DPT", "encoder": "resnet18"}, r"cannot make DPT with the encoder resnet18 \(Only Timm enc"),
        (
            {"encoder": "tu-swin_tiny_patch4_window7_224"},
            r"cannot make DeepLabV3Plus with the encoder tu-swin.*choose",
        ),
    ],
)
def test_names_that_do_not_exist_or_go_together(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_segmenter(SMALL.model_copy(update=change), 4)


def test_unreachable_weights_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    config = MultistageConfig(encoder="tu-resnet10t.c3_in1k")
    with pytest.raises(ValueError, match=r"weights \(We couldn't connect.*set multistage.weights to a local file"):
        build_segmenter(config, 4)


def test_normalisation_follows_the_weights() -> None:
    assert normalisation(SMALL)[0] == (0.485, 0.456, 0.406)
    half = SMALL.model_copy(update={"architecture": "DPT", "encoder": "tu-vit_base_patch16_224.augreg_in21k"})
    assert normalisation(half) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert normalisation(SMALL.model_copy(update={"encoder": "resnet18"}))[1] == (0.229, 0.224, 0.225)
