"""The segmentation networks: shapes at any size, options, weights checked key by key, names that don't exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from cosa_fast.config import MultistageConfig
from cosa_fast.models.segmenter import build_segmenter, normalisation

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


def test_padding_does_not_move_the_image() -> None:
    """A translation-free check: what the padded network says of the image's own pixels is cropped from the corner."""
    net = build_segmenter(SMALL, 3).eval()
    image = torch.randn(1, 3, 41, 57)
    padded = torch.zeros(1, 3, 48, 64)
    padded[..., :41, :57] = image
    with torch.inference_mode():
        torch.testing.assert_close(net(image), net.net(padded)[..., :41, :57])


@pytest.mark.parametrize("encoder", ["tu-resnet10t", "tu-convnext_atto", "resnet18"])
def test_local_weights_of_the_classification_model(encoder: str, tmp_path: Path) -> None:
    donor = timm.create_model(encoder.removeprefix("tu-"), num_classes=7)
    path = tmp_path / "encoder.safetensors"
    save_file(donor.state_dict(), str(path))
    config = MultistageConfig(encoder=encoder, weights=path)
    loaded = build_segmenter(config, 4).net.encoder.state_dict()
    plain = {name.replace(".", "_"): tensor for name, tensor in donor.state_dict().items()}
    assert len(loaded) > 20
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, plain[name.removeprefix("model.").replace(".", "_")])


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
        ({"architecture": "xyz"}, r"does not exist; for example: DPT, DeepLabV3, DeepLabV3Plus"),
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
