"""Weights as safetensors with JSON metadata; nothing here unpickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cosa_fast.config import AugmentConfig, ModelConfig, config_from_mapping
from cosa_fast.files import sha256, write_atomically
from cosa_fast.models.cosa import CosaNet

HEADER = "cosa-fast"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class CosaCheckpoint:
    """A trained network and where it comes from."""

    net: CosaNet
    """In evaluation mode, on the device asked for."""
    classes: tuple[str, ...]
    dataset: str
    """Name of the dataset it was trained on."""
    threshold: float
    """The CAM threshold xi at the end of training."""
    aux_threshold: float
    """That of the auxiliary CAMs; checkpoints from before it was stored: the main one."""
    iteration: int
    config: dict[str, Any]
    """Every configuration section of the training stage."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str
    """Of the checkpoint file."""


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to `path` atomically.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """
    # One key: safetensors writes several in random order, and the same weights must give the same file.
    header = {HEADER: json.dumps({"schema": SCHEMA, **metadata}, sort_keys=True)}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(target: Path) -> None:
        try:
            save_file(contiguous, str(target), metadata=header)
            target.chmod(0o644)  # safetensors makes files that others cannot read
        except SafetensorError as error:  # its I/O errors are not OSErrors
            raise OSError(28 if "space" in str(error).lower() else 5, str(error)) from error

    write_atomically(path, write)


def load_safetensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_safetensors` wrote.

    Raises:
        ValueError: the file is missing, damaged or not written by this package.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): make it again") from None
    metadata = json.loads(header.get(HEADER, "{}"))
    if metadata.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} is not a cosa-fast checkpoint of schema {SCHEMA}: give the output of a stage")
    return tensors, metadata


def load_cosa(
    path: Path, network: Literal["assignment", "online"] = "assignment", device: torch.device | str = "cpu"
) -> CosaCheckpoint:
    """Load one of the two networks of a CoSA checkpoint.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    tensors, metadata = load_safetensors(path, device)
    if metadata.get("kind") != "cosa":
        raise ValueError(
            f"{path} holds a {metadata.get('kind')!r} model, wanted CoSA's: give the `train` stage's output"
        )
    config = config_from_mapping(metadata["config"], source=str(path))
    model: ModelConfig = config.model
    augment: AugmentConfig = config.augment
    net = CosaNet(model, len(metadata["classes"]), augment.crop, pretrained=False)
    prefix = f"{network}."
    net.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
    return CosaCheckpoint(
        net=net.to(device).eval(),
        classes=tuple(metadata["classes"]),
        dataset=metadata["dataset"],
        threshold=metadata["threshold"],
        aux_threshold=metadata.get("aux_threshold", metadata["threshold"]),
        iteration=metadata["iteration"],
        config=metadata["config"],
        mean=augment.mean,
        std=augment.std,
        sha256=sha256(path),
    )
