"""Wide-ResNet-38 with a LargeFOV head, in neither timm nor segmentation-models-pytorch.

Model A1 of Wu, Shen and van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition" (Pattern
Recognition 2019), dilated to stride 8 as weakly supervised segmentation uses it. The modules have the names of the
published ImageNet weights' PyTorch conversions (AffinityNet and its descendants), so that those load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

BRANCH = ("branch2a", "branch2b1", "branch2b2")


class Block(nn.Module):
    """Pre-activated residual block; where the shape changes, the shortcut is a projection of the first activation.

    Args:
        channels: of the input and of each convolution's output; three convolutions are 1x1, 3x3, 1x1, two are 3x3.
        dilations: of each convolution.
        stride: of the first convolution and of the projection.
        dropout: probability of dropping a channel before every convolution but the first.
    """

    def __init__(
        self, channels: Sequence[int], dilations: Sequence[int], stride: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.names = BRANCH[: len(dilations)]
        kernels = (3, 3) if len(dilations) == 2 else (1, 3, 1)
        for at, (name, kernel, dilation) in enumerate(zip(self.names, kernels, dilations, strict=True)):
            step, padding = stride if at == 0 else 1, dilation * (kernel // 2)
            conv = nn.Conv2d(channels[at], channels[at + 1], kernel, step, padding, dilation, bias=False)
            self.add_module(f"bn_{name}", nn.BatchNorm2d(channels[at]))
            self.add_module(f"conv_{name}", conv)
        same = channels[0] == channels[-1] and stride == 1
        self.conv_branch1 = None if same else nn.Conv2d(channels[0], channels[-1], 1, stride, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels[0], H, W) to (B, channels[-1], H / stride, W / stride)."""
        branch, shortcut = x, x
        for at, name in enumerate(self.names):
            branch = F.relu(self.get_submodule(f"bn_{name}")(branch), inplace=True)
            if at == 0 and self.conv_branch1 is not None:
                shortcut = self.conv_branch1(branch)
            if at > 0:
                branch = self.dropout(branch)
            branch = self.get_submodule(f"conv_{name}")(branch)
        return shortcut + branch


class WideResNet38(nn.Module):
    """The trunk: 105.1 million parameters, 4096 channels at stride 8."""

    output_stride = 8

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        # Instead of the strides that levels 5 and 6 would have, dilation doubles within their first block.
        levels = {
            "b2": [Block((64, 128, 128), (1, 1), stride=2), *(Block((128, 128, 128), (1, 1)) for _ in range(2))],
            "b3": [Block((128, 256, 256), (1, 1), stride=2), *(Block((256, 256, 256), (1, 1)) for _ in range(2))],
            "b4": [Block((256, 512, 512), (1, 1), stride=2), *(Block((512, 512, 512), (1, 1)) for _ in range(5))],
            "b5": [Block((512, 512, 1024), (1, 2)), *(Block((1024, 512, 1024), (2, 2)) for _ in range(2))],
            "b6": [Block((1024, 512, 1024, 2048), (1, 4, 1), dropout=0.3)],
            "b7": [Block((2048, 1024, 2048, 4096), (1, 4, 1), dropout=0.5)],
        }
        self.names = [f"{level}_{at}" if at else level for level, blocks in levels.items() for at in range(len(blocks))]
        for name, block in zip(self.names, (block for blocks in levels.values() for block in blocks), strict=True):
            self.add_module(name, block)
        self.bn7 = nn.BatchNorm2d(4096)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images to (B, 4096, H / 8, W / 8) features."""
        x: Tensor = self.conv1a(images)
        for name in self.names:
            x = self.get_submodule(name)(x)
        return F.relu(self.bn7(x), inplace=True)


class WideResNet38LargeFOV(nn.Module):
    """The trunk and the head of Wu et al. ("2 conv."): two 3x3 convolutions of dilation 12, 512 channels between."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = WideResNet38()
        self.head = nn.Sequential(
            nn.Conv2d(4096, 512, 3, padding=12, dilation=12),
            nn.ReLU(inplace=True),
            nn.Conv2d(512, classes, 3, padding=12, dilation=12),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images to (B, classes, H, W) logits."""
        logits = self.head(self.encoder(images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
