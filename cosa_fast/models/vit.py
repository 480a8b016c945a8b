"""ViT encoders: any of timm's, and a small one with a convolution stem that learns from scratch on a CPU."""

from __future__ import annotations

import difflib
import itertools
import math
from functools import partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
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
            embed_layer=partial(HybridEmbed, backbone=ConvStem(dim), proj=False),
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
        bias = self._locality(*self.patch_embed.dynamic_feat_size(x.shape[-2:]))
        return super().forward_intermediates(x, *args, **kwargs | {"attn_mask": bias})

    def _locality(self, rows: int, columns: int) -> Tensor:
        """(1, heads, N, N) bias for a grid of rows x columns tokens."""
        y, x = (torch.arange(side, device=self.slopes.device).float() for side in (rows, columns))
        dy, dx = ((side[:, None] - side).square() for side in (y, x))
        distance = (dy[:, None, :, None] + dx[:, None, :]).sqrt().flatten(2).flatten(0, 1)
        return -self.slopes.view(1, -1, 1, 1) * distance


class ConvStem(nn.Sequential):
    """Three stride-2 convolutions and a projection: stride 8.

    Its maps are the largest of the network, so ReLU works in place, and in evaluation the batch norms are part of the
    convolutions, channels last: half the time on a CPU. In training that order would save a sixth, but torch's batch
    norm of such maps on a CPU adds up float32 one by one: its means are off by 50 times as much, and once that turns
    the sign of a value before ReLU, gradients are off by 3e-3 of their size instead of 5e-6.
    """

    def __init__(self, dim: int) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise((3, dim // 4, dim // 2, dim)):
            conv = nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Conv2d(dim, dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, dim, H / 8, W / 8)."""
        if self.training:
            return cast(Tensor, super().forward(images))
        x = images.contiguous(memory_format=torch.channels_last)
        *blocks, projection = self
        for conv, norm, activation in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
            x = activation(_folded(x, conv, norm))
        return cast(Tensor, projection(x))


def _folded(x: Tensor, conv: Any, norm: Any) -> Tensor:
    """A convolution without bias and the batch norm after it, with the latter's running statistics, in one."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, norm.bias - scale * norm.running_mean, conv.stride, conv.padding)


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
        tokens = self.vit.forward_intermediates(
            images,
            indices=sorted({self.aux_block, len(self.vit.blocks) - 1}),
            output_fmt="NLC",
            intermediates_only=True,
        )
        grid = self.vit.patch_embed.dynamic_feat_size(images.shape[-2:])
        # Normed without the prefix tokens, the final map is contiguous (channels last) for all that read it.
        final, aux = self.vit.norm(tokens[-1]), tokens[0]
        return final.transpose(1, 2).unflatten(2, grid), aux.transpose(1, 2).unflatten(2, grid)


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
