"""The CoSA network, multi-scale inference and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from cosa_fast.config import AugmentConfig, ModelConfig
from cosa_fast.models.checkpoint import load_cosa, load_safetensors, save_safetensors
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.multi_scale import multi_scale
from cosa_fast.models.vit import ConvStem

MINI = ModelConfig(name="mini_vit", aux_block=0, aux_norm=True, decoder_dim=8, decoder_dilation=1)
TIMM = ModelConfig(name="vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False, decoder_dim=8)


@pytest.fixture
def mini() -> CosaNet:
    torch.manual_seed(0)
    return CosaNet(MINI, 3, 32, pretrained=False).eval()


@pytest.mark.parametrize(("config", "stride"), [(MINI, 8), (TIMM, 16)])
def test_outputs_and_their_relations(config: ModelConfig, stride: int) -> None:
    net = CosaNet(config, 5, 64).eval()
    out = net(torch.randn(2, 3, 64, 96))
    grid = (64 // stride, 96 // stride)
    assert net.encoder.stride == stride
    assert out.seg.shape == (2, 6, *grid)
    assert out.cams.shape == out.aux_cams.shape == (2, 5, *grid)
    assert out.logits.shape == out.aux_logits.shape == (2, 5)
    # CAMs are the classifier applied at each position, before the pooling (global max pooling of the features).
    features, aux = net.encoder(torch.ones(1, 3, 64, 64))
    assert features.shape == aux.shape
    torch.testing.assert_close(
        net(torch.ones(1, 3, 64, 64)).logits,
        (net.classifier.weight[:, :, 0, 0] @ features.amax((2, 3))[..., None])[..., 0],
    )


def test_features_are_timms_own() -> None:
    net = CosaNet(TIMM, 2, 224).eval()
    images = torch.randn(1, 3, 224, 224)
    tokens = net.encoder.vit.forward_features(images)[:, 1:]
    torch.testing.assert_close(net.encoder(images)[0], tokens.transpose(1, 2).unflatten(2, (14, 14)))


def test_position_embedding_is_frozen(mini: CosaNet) -> None:
    assert not mini.encoder.vit.pos_embed.requires_grad


def test_locality_bias_is_minus_slope_times_distance(mini: CosaNet) -> None:
    bias = mini.encoder.vit._locality(2, 3)
    assert bias.shape == (1, 4, 6, 6)
    assert bias[0, :, 0, 5].tolist() == pytest.approx([-s * 5**0.5 for s in (0.25, 0.5, 1, 2)])
    assert not bias.diagonal(dim1=2, dim2=3).any()


def test_multi_scale_mirrors_back(mini: CosaNet) -> None:
    images = torch.randn(2, 3, 32, 48)
    views = multi_scale(mini, images, (1.0, 0.5, 1.5), flip=True)
    assert [tuple(v.shape[-2:]) for v in views.cams] == [(4, 6), (2, 3), (6, 9)]
    assert len(views.seg) == 6
    mirrored = multi_scale(mini, images.flip(-1), (1.0, 0.5, 1.5), flip=True)
    torch.testing.assert_close(mirrored.cams[1].flip(-1), views.mirrored_cams[1])
    torch.testing.assert_close(mirrored.summed_seg((32, 48)).flip(-1), views.summed_seg((32, 48)), rtol=1e-4, atol=1e-5)
    plain = multi_scale(mini, images, (1.0,), flip=False)
    assert plain.mirrored_cams == ()
    torch.testing.assert_close(
        plain.summed_seg((32, 48)),
        F.interpolate(mini(images).seg, size=(32, 48), mode="bilinear", align_corners=False),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "vit_bas_patch16_224"}, "not a timm model; close names: .*vit_base"),
        ({"name": "resnet18"}, "not a plain ViT"),
        ({"aux_block": 3}, "model.aux_block = 3, but mini_vit has 3 blocks"),
        ({"weights": Path("/nowhere.safetensors")}, "/nowhere.safetensors is not a readable safetensors file"),
    ],
)
def test_impossible_models(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosaNet(MINI.model_copy(update=change), 3, 32)


def test_local_weights_are_checked_key_by_key(tmp_path: Path) -> None:
    source = CosaNet(TIMM, 3, 64).encoder.vit.state_dict()
    path = tmp_path / "vit.safetensors"
    config = TIMM.model_copy(update={"weights": path})
    save_file({**source, "head.weight": torch.zeros(1000, 192)}, path)  # a classification head is left out
    loaded = CosaNet(config, 3, 64).encoder.vit.state_dict()
    assert all(torch.equal(loaded[name], source[name]) for name in source)
    wrong = {name: tensor for name, tensor in source.items() if name != "cls_token"}
    wrong["norm.bias"] = torch.zeros(7)
    save_file(wrong, path)
    with pytest.raises(ValueError, match=r"\(2 problems\): missing cls_token; norm.bias is \(7,\), wanted \(192,\)"):
        CosaNet(config, 3, 64)


def write_checkpoint(path: Path, net: CosaNet) -> None:
    metadata = {
        "kind": "cosa",
        "classes": ["a", "b", "c"],
        "dataset": "test",
        "threshold": 0.4,
        "iteration": 7,
        "config": {
            "model": MINI.model_dump(mode="json"),
            "augment": AugmentConfig(crop=32).model_dump(mode="json"),
        },
    }
    state = net.state_dict()
    tensors = {f"assignment.{k}": v for k, v in state.items()} | {f"online.{k}": v + 1 for k, v in state.items()}
    save_safetensors(path, tensors, metadata)


def test_checkpoint_round_trip(tmp_path: Path, mini: CosaNet) -> None:
    path = tmp_path / "cosa.safetensors"
    write_checkpoint(path, mini)
    loaded = load_cosa(path)
    assert (loaded.classes, loaded.threshold, loaded.iteration) == (("a", "b", "c"), 0.4, 7)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded.net(images).seg, mini(images).seg)
    assert not loaded.net.training
    online = load_cosa(path, "online").net.state_dict()
    assert torch.equal(online["classifier.weight"], mini.classifier.weight + 1)
    first = path.read_bytes()
    write_checkpoint(path, mini)
    assert path.read_bytes() == first  # the same weights give the same file


def test_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load_safetensors(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_safetensors(tmp_path / "cut.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not a cosa-fast checkpoint"):
        load_safetensors(tmp_path / "foreign.safetensors")
    save_safetensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {"kind": "segmenter"})
    with pytest.raises(ValueError, match="holds a 'segmenter' model"):
        load_cosa(tmp_path / "other.safetensors")


def test_the_stem_folds_its_batch_norms_in_evaluation(mini: CosaNet) -> None:
    stem = mini.encoder.vit.patch_embed.backbone.double()
    images = torch.randn(4, 3, 32, 48, dtype=torch.float64)
    for _ in range(3):
        stem.train()(images)  # other statistics than those of the start
    with torch.no_grad():
        plain = images
        for layer in stem.eval():
            plain = layer(plain)
        torch.testing.assert_close(stem(images), plain)


def test_the_stem_trains_in_the_full_precision_of_float32() -> None:
    """Of channels last maps torch's batch norm on a CPU takes means that are off by 1e-6 to 8e-6, not by 1e-7."""
    torch.manual_seed(0)
    stem = ConvStem(32)
    exact = copy.deepcopy(stem).double()
    images, weights = torch.rand(16, 3, 96, 96), torch.randn(16, 32, 12, 12)
    (stem(images) * weights).sum().backward()
    (exact(images.double()) * weights.double()).sum().backward()
    for layer in (1, 4, 7):
        mean = exact[layer].running_mean
        assert (stem[layer].running_mean - mean).norm() < 3e-7 * mean.norm()
    for (name, found), expected in zip(stem.named_parameters(), exact.parameters(), strict=True):
        assert (found.grad - expected.grad).norm() < 1e-5 * expected.grad.norm(), name
