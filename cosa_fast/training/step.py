"""One CoSA training step; reads like section 3 of the paper."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from cosa_kernels import DynamicThreshold, csc_info_nce, seg_to_cam_loss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from cosa_fast.assign import Assignments, assign
from cosa_fast.config import AugmentConfig, CosaConfig, OptimConfig, TrainConfig
from cosa_fast.data.batch import Batch
from cosa_fast.losses import cam_to_seg_loss, classification_loss, dense_energy_loss
from cosa_fast.models.cosa import CosaNet, Outputs
from cosa_fast.models.fp8 import use_float8
from cosa_fast.models.multi_scale import MultiScale, multi_scale
from cosa_fast.models.shared import normalises_over_batch
from cosa_fast.runtime import Runtime
from cosa_fast.training.guidance import Guidance
from cosa_fast.training.schedule import ema_momentum, poly_lr
from cosa_fast.training.targets import Regions, Targets, make_targets


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
        # Of several processes, the online network with its gradients averaged over them, and whether it decodes. No
        # attribute of its own: it would come twice in the state dict.
        self._parallel: list[tuple[DistributedDataParallel, bool]] = []

    def step(self, iteration: int, batch: Batch) -> dict[str, Tensor]:
        """Train on one batch, or on this process's part of it.

        Returns:
            The value of each loss term and of the threshold, 0-d on the device; the mean over processes is that of the
            whole batch.
        """
        train, optim = self.settings.train, self.settings.optim
        self.runtime.begin_step()
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * poly_lr(iteration, optim.lr, train.iterations, optim.warmup, optim.power)
        parts = batch.split(train.accumulate)
        targets = self._targets(parts, iteration) if iteration >= train.c2s_start else [None] * len(parts)
        self.online.train()
        # Gradients are set, not added to zeros; but the memory of a CUDA graph must not become theirs.
        self.optimizer.zero_grad(set_to_none=not self.runtime.graphs)
        totals: dict[str, Tensor] = {}
        online = self._distributed(decodes=targets[0] is not None)
        for part, target in zip(parts, targets, strict=True):
            exchange: AbstractContextManager[None] = nullcontext()
            if isinstance(online, DistributedDataParallel) and part is not parts[-1]:
                exchange = online.no_sync()  # only the sum of all parts' gradients is exchanged
            with exchange:
                with record_function("student"), self.runtime.autocast():
                    outputs: Outputs = online(part.strong, decode=target is not None)
                with record_function("losses"):
                    terms = self._losses(outputs, part, target, iteration)
                with record_function("backward"):
                    terms["loss"].backward()
            for name, value in terms.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        with record_function("optimizer"):
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                # Zero instead of absent: before c2s_start the decoder still decays, as in the release.
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            if optim.clip > 0:
                nn.utils.clip_grad_norm_(self.online.parameters(), optim.clip)
            self.optimizer.step()
        with record_function("average"):
            self._update_assignment(iteration)
        return {**totals, "threshold": self.threshold.xi.clone()}

    def _distributed(self, decodes: bool) -> CosaNet | DistributedDataParallel:
        """The online network, as several processes train it together."""
        if self.runtime.world.size == 1:
            return self.online
        if not self._parallel or self._parallel[0][1] != decodes:
            self._parallel.clear()
            # Gradients that will not come must not be waited for.
            self.online.decoder.requires_grad_(decodes)
            self._parallel.append((DistributedDataParallel(self.online, gradient_as_bucket_view=True), decodes))
        return self._parallel[0][0]

    @torch.no_grad()
    def _targets(self, parts: list[Batch], iteration: int) -> list[Targets]:
        """The assignment network looks at the weak views (or, without SA, the online network does)."""
        config = self.settings.cosa
        teacher = self.assignment if config.swap else self.online
        teacher.eval()
        stride = self.online.encoder.stride
        rows, columns = (side // stride for side in parts[0].strong.shape[-2:])
        assignments = [self._assign(teacher, part) for part in parts]
        with record_function("targets"):
            return make_targets(
                assignments,
                (self.threshold, self.aux_threshold),
                (rows, columns),
                config,
                iteration >= self.settings.train.guidance_start,
                self.runtime.world,
            )

    def _assign(self, teacher: CosaNet, part: Batch) -> Assignments:
        config = self.settings.cosa
        with self.runtime.autocast():
            views = multi_scale(teacher, part.weak, config.scales, config.flip)
        with record_function("merging"):
            return assign(_full_precision(views, part.labels.dtype), part, config)

    def _losses(self, outputs: Outputs, part: Batch, targets: Targets | None, iteration: int) -> dict[str, Tensor]:
        config, train = self.settings.cosa, self.settings.train
        share = 1.0 / train.accumulate
        terms = {
            "cls": share * classification_loss(outputs.logits, part.labels),
            "cls_aux": share * classification_loss(outputs.aux_logits, part.labels),
        }
        loss = terms["cls"] + terms["cls_aux"]
        if targets is not None:
            terms["c2s"] = cam_to_seg_loss(outputs.seg, targets.labels, targets.weights)
            loss = loss + config.lambda_c2s * terms["c2s"]
            if iteration >= train.guidance_start and config.guidance != "none":
                terms["s2c"] = share * self._guide(outputs.guided_cams, targets.assignments, part, iteration)
                loss = loss + config.lambda_s2c * terms["s2c"]
            if targets.regions is not None:
                terms["csc"] = self._contrast(outputs.cams, targets.regions)
                loss = loss + config.lambda_csc * terms["csc"]
            if config.lambda_energy > 0:
                terms["energy"] = share * self._energy(outputs.seg, targets, part)
                loss = loss + config.lambda_energy * terms["energy"]
        return {**terms, "loss": loss}

    def _guide(self, cams: Tensor, assignments: Assignments, part: Batch, iteration: int) -> Tensor:
        """L_s2c against the configured source of guidance (Eq. 7, 8; Fig. 1)."""
        config = self.settings.cosa
        size = (assignments.cams.shape[-2], assignments.cams.shape[-1])
        seg = self.guidance.seg_logits(assignments.seg, size, part, iteration)
        guided = cams.relu() if config.s2c_relu else cams
        return seg_to_cam_loss(guided, seg, part.labels, temperature=config.spl_temperature, size=size)

    def _contrast(self, cams: Tensor, regions: Regions) -> Tensor:
        """L_csc: regions from the auxiliary assignments, at the resolution of the CAMs (Eq. 9, 10)."""
        config = self.settings.cosa
        labels, perplexity, share = regions.labels, regions.perplexity, regions.share
        if config.csc_scope == "batch":
            # Every process computes the loss of all.
            cams, labels, perplexity = map(self.runtime.world.concatenate, (cams, labels, perplexity))
            share = torch.ones_like(share)
        return share * csc_info_nce(
            cams,
            labels,
            perplexity,
            epsilon=config.epsilon,
            temperature=config.csc_temperature,
            scope=config.csc_scope,
        )

    def _energy(self, seg: Tensor, targets: Targets, part: Batch) -> Tensor:
        augment = self.settings.augment
        # Numbers of Python's: a tensor of them would be copied to the device, and waited for.
        channels = zip(part.strong.unbind(dim=1), augment.mean, augment.std, strict=True)
        pixels = torch.stack([255.0 * (channel * std + mean) for channel, mean, std in channels], dim=1)
        return dense_energy_loss(seg, pixels, targets.labels[0], part.valid_box)

    @torch.no_grad()
    def _update_assignment(self, iteration: int) -> None:
        """Theta' <- m Theta' + (1 - m) Theta; buffers (batch norm statistics of a convolution stem) are copied."""
        config = self.settings.cosa
        momentum = ema_momentum(iteration, config.momentum, config.momentum_warmup)
        # A single fused call over the list of all parameters.
        torch._foreach_lerp_(list(self.assignment.parameters()), list(self.online.parameters()), 1.0 - momentum)
        for theirs, ours in zip(self.assignment.buffers(), self.online.buffers(), strict=True):
            theirs.copy_(ours)


def make_trainer(net: CosaNet, settings: Settings, machine: Runtime, guidance: Guidance) -> CosaTrainer:
    """A trainer on its device, compiled where that is on, one of those of all processes.

    Raises:
        ValueError: float8 without an assignment network, or on a GPU that has none.
    """
    trainer = CosaTrainer(net.to(machine.device), settings, machine, guidance).to(machine.device)
    if machine.float8:
        if not settings.cosa.swap:
            raise ValueError("runtime.precision = 'fp8' is for the assignment network, which cosa.swap = false has not")
        use_float8(trainer.assignment)
    # Batch norm that waits for other processes breaks the graph.
    whole = machine.world.size == 1 or not any(map(normalises_over_batch, net.modules()))
    machine.compile(trainer.online, whole)
    machine.compile(trainer.assignment, whole)
    return trainer


def build_optimizer(net: CosaNet, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with the encoder at the base rate and the classifiers and decoder at `head_lr_scale` times it."""
    encoder = [p for p in net.encoder.parameters() if p.requires_grad]
    known = {id(p) for p in encoder}
    heads = [p for p in net.parameters() if p.requires_grad and id(p) not in known]
    for parameter in encoder + heads:
        parameter.grad = torch.zeros_like(parameter)  # what CUDA graphs add to
    groups = [{"params": encoder, "scale": 1.0}, {"params": heads, "scale": config.head_lr_scale}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _full_precision(views: MultiScale, dtype: torch.dtype) -> MultiScale:
    """Everything that is thresholded or sharpened leaves the autocast's bf16."""
    return MultiScale(*(tuple(view.to(dtype) for view in getattr(views, name)) for name in MultiScale.__slots__))
