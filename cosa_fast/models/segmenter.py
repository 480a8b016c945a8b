"""The standalone segmentation network of CoSA-MS (paper Sec. 4.2): any of segmentation-models-pytorch's, or WR38."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from cosa_fast.config import MultistageConfig, config_from_mapping
from cosa_fast.files import sha256
from cosa_fast.models.checkpoint import load_safetensors, save_safetensors
from cosa_fast.models.wide_resnet38 import WideResNet38LargeFOV

ARCHITECTURES = {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
LARGE_FOV, WIDE_RESNET38 = "LargeFOV", "wide_resnet38"
OPTIONS: dict[str, dict[str, Any]] = {
    # The authors' (commented-out) DeepLab: output stride 16 and its rates, which smp doubles by default.
    "DeepLabV3Plus": {"encoder_output_stride": 16, "decoder_atrous_rates": (6, 12, 18)},
    # The width that Swin's authors (and mmsegmentation) use.
    "UPerNet": {"decoder_channels": 512},
}
# As in Swin's segmentation code: stochastic depth of fine-tuning, and windows that are shifted in the last stage too,
# which timm leaves out because at 224 pixels that stage is one window.
SWIN = {"drop_path_rate": 0.3, "always_partition": True}
Channels = tuple[float, float, float]


class Segmenter(nn.Module):
    """A segmentation network that takes images of any size."""

    def __init__(self, net: nn.Module, stride: int) -> None:
        super().__init__()
        self.net = net
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images to (B, K, H, W) logits; channel 0 is the background."""
        height, width = images.shape[-2:]
        # Zero is the mean colour. Right and bottom, so that cropping needs no offset.
        padded = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        logits: Tensor = self.net(padded)[..., :height, :width]
        return logits


def build_segmenter(config: MultistageConfig, classes: int, *, initialise: bool = True) -> Segmenter:
    """Create the network with `classes` outputs (background included).

    Args:
        initialise: Fetch or read the encoder's weights as configured; False when a checkpoint follows.

    Raises:
        ValueError: no such architecture or encoder, they don't go together, or the weights cannot be had or don't fit.
    """
    _check_names(config)
    fetch = initialise and config.weights is None and config.encoder_weights is not None
    if config.architecture == LARGE_FOV:
        if fetch:
            raise ValueError(
                f"{WIDE_RESNET38} has no weights that can be fetched: set multistage.weights to a local file with the "
                "published ones of model A1 (config/README.md) or multistage.encoder_weights to null"
            )
        net: Any = WideResNet38LargeFOV(classes)
    else:
        net = _smp_network(config, classes, fetch)
    if initialise and config.weights is not None:
        _load_encoder(net.encoder, config.weights, config.encoder)
    # DPT halves its tokens once more, which smp's own divisibility check overlooks.
    return Segmenter(net, net.encoder.output_stride * (2 if config.architecture == "DPT" else 1))


def _smp_network(config: MultistageConfig, classes: int, fetch: bool) -> nn.Module:
    universal = config.encoder.startswith("tu-")
    try:
        net: nn.Module = ARCHITECTURES[config.architecture](
            encoder_name=config.encoder,
            encoder_weights=(True if universal else config.encoder_weights) if fetch else None,
            classes=classes,
            **OPTIONS.get(config.architecture, {}),
            **_encoder_options(config),
        )
    except Exception as error:  # of timm, smp, huggingface_hub or the network, in all their kinds
        reason = str(error).strip("\"'").split("\n")[0]
        hint = (
            "set multistage.weights to a local file or multistage.encoder_weights to null"
            if fetch
            else "choose another"
        )
        raise ValueError(
            f"cannot make {config.architecture} with the encoder {config.encoder}"
            f"{' and its pretrained weights' if fetch else ''} ({reason}): {hint}"
        ) from error
    return net


def normalisation(config: MultistageConfig) -> tuple[Channels, Channels]:
    """Channel means and standard deviations, in [0, 1], that the encoder's weights were trained with."""
    if config.encoder.startswith("tu-"):
        cfg = timm.get_pretrained_cfg(config.encoder.removeprefix("tu-"), allow_unregistered=True)
        if cfg is not None and cfg.mean and cfg.std:
            return _channels(cfg.mean), _channels(cfg.std)
    elif config.encoder != WIDE_RESNET38 and config.encoder_weights is not None and config.weights is None:
        settings = smp.encoders.get_preprocessing_params(config.encoder, config.encoder_weights)
        return _channels(settings["mean"]), _channels(settings["std"])
    return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


@dataclass(frozen=True, slots=True)
class SegmenterCheckpoint:
    """A trained CoSA-MS network and where it comes from."""

    net: Segmenter
    """In evaluation mode, on the device asked for."""
    classes: tuple[str, ...]
    """Foreground class names; channel c + 1 is class c."""
    dataset: str
    config: MultistageConfig
    mean: Channels
    std: Channels
    store: dict[str, Any]
    """`sha256` of the pseudo-label store and what it says of itself: `checkpoint_sha256`, `threshold`, `split`."""
    sha256: str
    """Of the checkpoint file."""


def save_segmenter(
    path: Path, net: Segmenter, *, classes: Sequence[str], dataset: str, config: MultistageConfig, store: dict[str, Any]
) -> None:
    """Write the weights and everything needed to use them to a safetensors file, atomically.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """
    mean, std = normalisation(config)
    metadata = {
        "kind": "segmenter",
        "classes": list(classes),
        "dataset": dataset,
        "config": config.model_dump(mode="json"),
        "mean": mean,
        "std": std,
        "store": store,
    }
    save_safetensors(path, net.state_dict(), metadata)


def load_segmenter(path: Path, device: torch.device | str = "cpu") -> SegmenterCheckpoint:
    """Load a CoSA-MS network.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    tensors, metadata = load_safetensors(path, device)
    if metadata.get("kind") != "segmenter":
        raise ValueError(f"{path} holds a {metadata.get('kind')!r} model: give the output of the `multistage` stage")
    config = config_from_mapping({"multistage": metadata["config"]}, source=str(path)).multistage
    net = build_segmenter(config, len(metadata["classes"]) + 1, initialise=False)
    net.load_state_dict(tensors)
    return SegmenterCheckpoint(
        net=net.to(device).eval(),
        classes=tuple(metadata["classes"]),
        dataset=metadata["dataset"],
        config=config,
        mean=_channels(metadata["mean"]),
        std=_channels(metadata["std"]),
        store=metadata["store"],
        sha256=sha256(path),
    )


def _channels(values: Sequence[float]) -> Channels:
    red, green, blue = values
    return red, green, blue


def _check_names(config: MultistageConfig) -> None:
    if config.architecture not in (LARGE_FOV, *ARCHITECTURES):
        raise _unknown("multistage.architecture", config.architecture, [LARGE_FOV, *ARCHITECTURES])
    if (config.architecture == LARGE_FOV) != (config.encoder == WIDE_RESNET38):
        raise ValueError(
            f"multistage.architecture = {config.architecture!r} with multistage.encoder = {config.encoder!r}: "
            f"{LARGE_FOV} and {WIDE_RESNET38} go together and with nothing else"
        )
    name, own = config.encoder, [*smp.encoders.get_encoder_names(), WIDE_RESNET38]
    if name.startswith("tu-"):
        if not timm.is_model(name.removeprefix("tu-").split(".")[0]):
            raise _unknown("multistage.encoder", name, [f"tu-{model}" for model in timm.list_models()])
    elif name not in own:
        raise _unknown("multistage.encoder", name, own + [f"tu-{model}" for model in timm.list_models()])


def _unknown(key: str, name: str, known: Sequence[str]) -> ValueError:
    lowered = {candidate.lower(): candidate for candidate in known}
    close = [lowered[match] for match in difflib.get_close_matches(name.lower(), list(lowered), n=4)]
    listed = ", ".join(close or sorted(known)[:12])
    return ValueError(f"{key} = {name!r} does not exist; {'close names' if close else 'for example'}: {listed}")


def _encoder_options(config: MultistageConfig) -> dict[str, Any]:
    """Options of timm's encoders: what frees one from the input size it was made for, and Swin's."""
    if not config.encoder.startswith("tu-"):
        return {}
    options: dict[str, Any] = SWIN if config.encoder.startswith("tu-swin_") else {}
    cfg = timm.get_pretrained_cfg(config.encoder.removeprefix("tu-"), allow_unregistered=True)
    if cfg is None or not cfg.fixed_input_size:
        return options
    return {**options, **({"dynamic_img_size": True} if config.architecture == "DPT" else {"strict_img_size": False})}


def _load_encoder(encoder: nn.Module, path: Path, name: str) -> None:
    """Load classification weights; every tensor of the encoder must be in the file, others are left alone."""
    # timm's feature extractors write stages_0 where the classification model has stages.0.
    given = {_plain(key): tensor for key, tensor in _read_weights(path).items()}
    wanted = encoder.state_dict()
    found = {key: given[_plain(key)] for key in wanted if _plain(key) in given}
    # Weights that were converted from other libraries lack this count, which nothing reads.
    problems = [f"missing {key}" for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    problems += [
        f"{key} is {tuple(tensor.shape)}, wanted {tuple(wanted[key].shape)}"
        for key, tensor in found.items()
        if tensor.shape != wanted[key].shape
    ]
    if problems:
        shown = "; ".join(problems[:5])
        raise ValueError(f"multistage.weights = {path} does not fit {name} ({len(problems)} problems): {shown}")
    encoder.load_state_dict(wanted | found)


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    """A safetensors file or, named .pth or .pt, a state dict of torch.save; nothing here runs code of the file."""
    if not path.is_file():
        raise ValueError(f"multistage.weights = {path} does not exist")
    kind, pickled = ("PyTorch", True) if path.suffix in (".pth", ".pt") else ("safetensors", False)
    try:
        given = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(str(path))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"multistage.weights = {path} is not a readable {kind} file ({reason}): give a safetensors file, or a "
            "PyTorch state dict named .pth"
        ) from None
    if not isinstance(given, Mapping) or not all(isinstance(tensor, Tensor) for tensor in given.values()):
        raise ValueError(f"multistage.weights = {path} must hold a state dict: names and tensors, nothing else")
    return given


def _plain(name: str) -> str:
    return name.removeprefix("encoder.").removeprefix("model.").replace(".", "_")
