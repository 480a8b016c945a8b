"""The CoSA network (paper Sec. 3.2, Fig. 2): encoder, main and auxiliary CAM classifiers, LargeFOV decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from cosa_fast.config import ModelConfig
from cosa_fast.models.vit import Encoder


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the network says of a batch; C classes, (h, w) tokens."""

    logits: Tensor
    """(B, C) class logits Z of the main classifier (Eq. 1)."""
    aux_logits: Tensor
    """(B, C) class logits of the auxiliary classifier."""
    cams: Tensor
    """(B, C, h, w) class activation maps M, as logits."""
    guided_cams: Tensor
    """(B, C, h, w) the same maps for the Seg2CAM loss, whose gradient `model.detach` may stop (Table 4a)."""
    aux_cams: Tensor
    """(B, C, h, w) maps of the earlier block (M-dagger), as logits."""
    seg: Tensor
    """(B, C + 1, h, w) segmentation logits S; channel 0 is the background. Empty if they were not asked for."""


class CosaNet(nn.Module):
    """One network of the pair; online and assignment networks have this architecture.

    Raises:
        ValueError: the encoder cannot be made as configured.
    """

    def __init__(self, config: ModelConfig, num_classes: int, image_size: int, pretrained: bool = True) -> None:
        super().__init__()
        self.detach = config.detach
        self.encoder = Encoder(config, image_size, pretrained)
        dim = self.encoder.dim
        self.aux_norm = nn.LayerNorm(dim, eps=1e-6) if config.aux_norm else nn.Identity()
        self.classifier = nn.Conv2d(dim, num_classes, 1, bias=False)
        self.aux_classifier = nn.Conv2d(dim, num_classes, 1, bias=False)
        self.decoder = large_fov(dim, config.decoder_dim, num_classes + 1, config.decoder_dilation)

    def forward(self, images: Tensor, decode: bool = True) -> Outputs:
        """(B, 3, H, W) normalised images, H and W multiples of the encoder's stride; `decode`: segment them too."""
        features, aux_features = self.encoder(images)
        aux_features = self.aux_norm(aux_features.movedim(1, -1)).movedim(-1, 1)
        cams = self.classifier(features)
        return Outputs(
            logits=self.classifier(F.adaptive_max_pool2d(features, 1)).flatten(1),
            aux_logits=self.aux_classifier(F.adaptive_max_pool2d(aux_features, 1)).flatten(1),
            cams=cams,
            guided_cams=cams if self.detach == "none" else self._guided_cams(features),
            aux_cams=self.aux_classifier(aux_features),
            seg=self.decoder(features) if decode else features.new_empty(0),
        )

    def _guided_cams(self, features: Tensor) -> Tensor:
        """Maps whose guidance gradient is stopped where Table 4a's variants ask for it."""
        weight = self.classifier.weight
        if self.detach in ("feat", "all"):
            features = features.detach()
        if self.detach in ("cls", "all"):
            weight = weight.detach()
        return F.conv2d(features, weight)


def large_fov(dim: int, hidden: int, outputs: int, dilation: int) -> nn.Sequential:
    """LargeFOV decoder: two dilated 3x3 convolutions and a 1x1 one, without biases (release)."""
    return nn.Sequential(
        nn.Conv2d(dim, hidden, 3, padding=dilation, dilation=dilation, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, outputs, 1, bias=False),
    )
