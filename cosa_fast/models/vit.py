"""ViT encoders: any of timm's, and a small one with a convolution stem that learns from scratch on a CPU."""

from __future__ import annotations

import difflib
import itertools
import math
from functools import partial
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import HybridEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cosa_fast.config import ModelConfig


class MiniViT(VisionTransformer):
    """Three pre-norm timm blocks of width 96 on stride-8 tokens.

    Tokens attend to near tokens first (an additive bias of minus slope times distance, one slope per head), which
    keeps class evidence where the object is.
    """

    slopes: Tensor

    def __init__(self, image_size: int) -> None:
        dim, heads, stride = 96, 4, 8
        super().__init__(
            img_size=max(1, round(image_size / stride)) * stride,
            patch_size=1,
            embed_layer=partial(HybridEmbed, backbone=_conv_stem(dim), proj=False),
            embed_dim=dim,
            depth=3,
            num_heads=heads,
            mlp_ratio=2.0,
            num_classes=0,
            class_token=False,
            global_pool="",
            dynamic_img_size=True,
        )
        position = build_sincos2d_pos_embed(list(self.patch_embed.grid_size), dim=dim)
        self.pos_embed = nn.Parameter(0.3 * position[None])
        self.register_buffer("slopes", 2.0 ** torch.arange(-2, heads - 2), persistent=False)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's forward_intermediates with the locality bias as attention mask."""
        rows, columns = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        return super().forward_intermediates(x, *args, **kwargs | {"attn_mask": self._locality(rows, columns)})

    def _locality(self, rows: int, columns: int) -> Tensor:
        """(1, heads, N, N) bias for a grid of rows x columns tokens."""
        y = torch.arange(rows, device=self.slopes.device).repeat_interleave(columns)
        x = torch.arange(columns, device=self.slopes.device).repeat(rows)
        distance = torch.hypot((y[:, None] - y).float(), (x[:, None] - x).float())
        return -self.slopes.view(1, -1, 1, 1) * distance


def _conv_stem(dim: int) -> nn.Sequential:
    """Three stride-2 convolutions and a projection: stride 8."""
    layers: list[nn.Module] = []
    channels = (3, dim // 4, dim // 2, dim)
    for fan_in, fan_out in itertools.pairwise(channels):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))


class Encoder(nn.Module):
    """A ViT that returns its final feature map and an earlier block's.

    Raises:
        ValueError: the model does not exist in timm, is not a ViT, the block is not there, or the weights do not fit.
    """

    def __init__(self, config: ModelConfig, image_size: int, pretrained: bool) -> None:
        super().__init__()
        self.vit: Any = _create(config, image_size, pretrained)
        depth = len(self.vit.blocks)
        if not -depth <= config.aux_block < depth:
            raise ValueError(f"model.aux_block = {config.aux_block}, but {config.name} has {depth} blocks")
        self.aux_block = config.aux_block % depth
        self.dim = self.vit.embed_dim
        # The release freezes the position embedding; it is resampled to each input size.
        if self.vit.pos_embed is not None:
            self.vit.pos_embed.requires_grad_(False)

    @property
    def stride(self) -> int:
        """Input pixels per token."""
        return int(self.vit.patch_embed.feat_ratio(as_scalar=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) images to the (B, D, h, w) normed final and raw auxiliary maps."""
        last = len(self.vit.blocks) - 1
        tokens, maps = self.vit.forward_intermediates(images, indices=sorted({self.aux_block, last}), norm=False)
        grid = maps[0].shape[-2:]
        final = tokens[:, self.vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        aux: Tensor = maps[0]
        return final, aux


def _create(config: ModelConfig, image_size: int, pretrained: bool) -> VisionTransformer:
    if config.name == "mini_vit":
        vit: Any = MiniViT(image_size)
    else:
        base = config.name.split(".")[0]
        if not timm.is_model(base):
            close = difflib.get_close_matches(base, timm.list_models("*vit*"), n=3)
            raise ValueError(
                f"model.name = {config.name!r} is not a timm model; close names: {', '.join(close) or 'none'}"
            )
        if timm.model_entrypoint(base).__module__ != VisionTransformer.__module__:
            raise ValueError(f"model.name = {config.name!r} is not a plain ViT of timm, which CoSA needs")
        fetch = pretrained and config.pretrained and config.weights is None
        try:
            vit = timm.create_model(config.name, pretrained=fetch, num_classes=0, dynamic_img_size=True)
        except Exception as error:
            raise ValueError(
                f"timm cannot create {config.name!r}{' with its pretrained weights' if fetch else ''}: {error}. "
                "Without network, download the safetensors file elsewhere and set model.weights to it"
            ) from error
    if pretrained and config.weights is not None:
        _load_weights(vit, config)
    return vit


def _load_weights(vit: VisionTransformer, config: ModelConfig) -> None:
    """Load timm-named encoder weights; a classification head in the file is left out, nothing else may differ."""
    path = config.weights
    try:
        tensors = load_file(str(path))
    except Exception as error:
        raise ValueError(f"model.weights = {path} is not a readable safetensors file: {error}") from None
    wanted = vit.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("head.", "pre_logits."))}
    problems = [f"missing {name}" for name in wanted.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise ValueError(f"model.weights = {path} does not fit {config.name} ({len(problems)} problems): {shown}")
    vit.load_state_dict(tensors)


def parameter_count(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(math.prod(p.shape) for p in module.parameters() if p.requires_grad)
