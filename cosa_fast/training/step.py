"""One CoSA training step; reads like section 3 of the paper."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from cosa_kernels import DynamicThreshold, cam_pseudo_labels, csc_info_nce, seg_to_cam_loss
from torch import Tensor, nn

from cosa_fast.assign import Assignments, assign, banded_labels, scale_box
from cosa_fast.config import AugmentConfig, CosaConfig, OptimConfig, TrainConfig
from cosa_fast.data.batch import Batch
from cosa_fast.losses import cam_to_seg_loss, classification_loss, dense_energy_loss
from cosa_fast.models.cosa import CosaNet, Outputs
from cosa_fast.models.multi_scale import MultiScale, multi_scale
from cosa_fast.runtime import Runtime
from cosa_fast.training.guidance import Guidance
from cosa_fast.training.schedule import ema_momentum, poly_lr


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration sections a step needs."""

    augment: AugmentConfig
    cosa: CosaConfig
    optim: OptimConfig
    train: TrainConfig


class CosaTrainer(nn.Module):
    """Online network, assignment network, thresholds and optimiser, advanced one batch at a time.

    The state dict holds both networks and both thresholds; the optimiser has its own.
    """

    def __init__(self, online: CosaNet, settings: Settings, runtime: Runtime, guidance: Guidance) -> None:
        super().__init__()
        self.online = online
        # The release builds the assignment network independently, so that its heads start from other random weights;
        # a copy differs from that only until the warm-up has forgotten them.
        self.assignment = copy.deepcopy(online).requires_grad_(False)
        self.threshold, self.aux_threshold = (
            DynamicThreshold(
                settings.cosa.threshold,
                queue=settings.cosa.threshold_queue,
                floor=settings.cosa.threshold_floor,
                limits=settings.cosa.threshold_range,
                momentum=settings.cosa.threshold_momentum,
            )
            for _ in range(2)
        )
        self.settings, self.runtime, self.guidance = settings, runtime, guidance
        self.optimizer = build_optimizer(online, settings.optim)

    def step(self, iteration: int, batch: Batch) -> dict[str, Tensor]:
        """Train on one batch; returns the value of each loss term and of the threshold, on the device."""
        train, optim = self.settings.train, self.settings.optim
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * poly_lr(iteration, optim.lr, train.iterations, optim.warmup, optim.power)
        assignments = self._assign(batch) if iteration >= train.c2s_start else None
        self.online.train()
        with self.runtime.autocast():
            outputs: Outputs = self.online(batch.strong)
        terms = self._losses(outputs, batch, assignments, guided=iteration >= train.guidance_start, iteration=iteration)
        # Zero instead of absent gradients: before c2s_start the decoder still decays, as in the release.
        self.optimizer.zero_grad(set_to_none=False)
        terms["loss"].backward()
        if optim.clip > 0:
            nn.utils.clip_grad_norm_(self.online.parameters(), optim.clip)
        self.optimizer.step()
        self._update_assignment(iteration)
        return {**{name: value.detach() for name, value in terms.items()}, "threshold": self.threshold.xi.clone()}

    @torch.no_grad()
    def _assign(self, batch: Batch) -> Assignments:
        """The assignment network looks at the weak view (or, without SA, the online network does)."""
        config = self.settings.cosa
        teacher = self.assignment if config.swap else self.online
        teacher.eval()
        with self.runtime.autocast():
            views = multi_scale(teacher, batch.weak, config.scales, config.flip)
        return assign(_full_precision(views, batch.labels.dtype), batch, config)

    def _losses(
        self, outputs: Outputs, batch: Batch, targets: Assignments | None, guided: bool, iteration: int
    ) -> dict[str, Tensor]:
        config = self.settings.cosa
        terms = {
            "cls": classification_loss(outputs.logits, batch.labels),
            "cls_aux": classification_loss(outputs.aux_logits, batch.labels),
        }
        loss = terms["cls"] + terms["cls_aux"]
        if targets is not None:
            cams, aux_cams, box = targets.cams, targets.aux_cams, targets.valid_box
            if guided and config.dynamic_threshold:
                self.threshold.update(cams, box)
                self.aux_threshold.update(aux_cams, box)
            xi, aux_xi = self.threshold.xi, self.aux_threshold.xi
            terms["c2s"] = cam_to_seg_loss(outputs.seg, (cams, aux_cams), (xi, aux_xi), box, config)
            loss = loss + config.lambda_c2s * terms["c2s"]
            if guided and config.guidance != "none":
                terms["s2c"] = self._guide(outputs.guided_cams, targets, batch, iteration)
                loss = loss + config.lambda_s2c * terms["s2c"]
            if guided and config.csc:
                terms["csc"] = self._contrast(outputs.cams, aux_cams, aux_xi, box)
                loss = loss + config.lambda_csc * terms["csc"]
            if config.lambda_energy > 0:
                terms["energy"] = self._energy(outputs.seg, targets, batch)
                loss = loss + config.lambda_energy * terms["energy"]
        return {**terms, "loss": loss}

    def _guide(self, cams: Tensor, targets: Assignments, batch: Batch, iteration: int) -> Tensor:
        """L_s2c against the configured source of guidance (Eq. 7, 8; Fig. 1)."""
        config = self.settings.cosa
        size = (targets.cams.shape[-2], targets.cams.shape[-1])
        seg = self.guidance.seg_logits(targets.seg, size, batch, iteration)
        guided = cams.relu() if config.s2c_relu else cams
        return seg_to_cam_loss(guided, seg, batch.labels, temperature=config.spl_temperature, size=size)

    def _contrast(self, cams: Tensor, aux_cams: Tensor, aux_xi: Tensor, box: Tensor) -> Tensor:
        """L_csc: regions from the auxiliary assignments, at the resolution of the CAMs (Eq. 9, 10)."""
        config = self.settings.cosa
        side, grid = aux_cams.shape[-1], cams.shape[-1]
        with torch.no_grad():
            small = nn.functional.interpolate(aux_cams, size=cams.shape[-2:], mode="bilinear", align_corners=False)
            labels, perplexity = cam_pseudo_labels(
                small,
                aux_xi,
                valid_box=scale_box(box, side, grid),
                lambda_alpha=config.lambda_alpha,
                lambda_beta=config.lambda_beta,
            )
        return csc_info_nce(
            cams,
            labels,
            perplexity,
            epsilon=config.epsilon,
            temperature=config.csc_temperature,
            scope=config.csc_scope,
        )

    def _energy(self, seg: Tensor, targets: Assignments, batch: Batch) -> Tensor:
        config, augment = self.settings.cosa, self.settings.augment
        mean, std = (batch.strong.new_tensor(values).view(1, 3, 1, 1) for values in (augment.mean, augment.std))
        labels, _ = cam_pseudo_labels(targets.cams, self.threshold.xi, valid_box=targets.valid_box)
        if config.ignore_band is not None:
            labels = banded_labels(targets.cams, config.ignore_band, targets.valid_box)
        return dense_energy_loss(seg, 255.0 * (batch.strong * std + mean), labels, batch.valid_box)

    @torch.no_grad()
    def _update_assignment(self, iteration: int) -> None:
        """Theta' <- m Theta' + (1 - m) Theta; buffers (batch norm statistics of a convolution stem) are copied."""
        config = self.settings.cosa
        momentum = ema_momentum(iteration, config.momentum, config.momentum_warmup)
        # A single fused call over the list of all parameters.
        torch._foreach_lerp_(list(self.assignment.parameters()), list(self.online.parameters()), 1.0 - momentum)
        for theirs, ours in zip(self.assignment.buffers(), self.online.buffers(), strict=True):
            theirs.copy_(ours)


def build_optimizer(net: CosaNet, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with the encoder at the base rate and the classifiers and decoder at `head_lr_scale` times it."""
    encoder = [p for p in net.encoder.parameters() if p.requires_grad]
    known = {id(p) for p in encoder}
    heads = [p for p in net.parameters() if p.requires_grad and id(p) not in known]
    for parameter in encoder + heads:
        parameter.grad = torch.zeros_like(parameter)
    groups = [{"params": encoder, "scale": 1.0}, {"params": heads, "scale": config.head_lr_scale}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, foreach=True)


def _full_precision(views: MultiScale, dtype: torch.dtype) -> MultiScale:
    """Everything that is thresholded or sharpened leaves the autocast's bf16."""
    return MultiScale(*(tuple(view.to(dtype) for view in getattr(views, name)) for name in MultiScale.__slots__))
