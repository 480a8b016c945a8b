"""One training step against a slow transcription of section 3, and what each switch does to it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.config import AugmentConfig, CosaConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from cosa_fast.data.batch import Batch
from cosa_fast.losses import dense_energy_loss, normalised_weights, weight_totals
from cosa_fast.models.cosa import CosaNet
from cosa_fast.runtime import resolve
from cosa_fast.training import step
from cosa_fast.training.guidance import Guidance
from cosa_fast.training.step import CosaTrainer, Settings

CLASSES, CROP = 3, 32
MODEL = {"name": "mini_vit", "aux_block": 0, "aux_norm": True, "decoder_dim": 8, "decoder_dilation": 1}
COSA = {"momentum": 0.9, "scales": (1.0, 0.5), "threshold_floor": 0.0}


def make_trainer(source: Guidance | None = None, **cosa: Any) -> CosaTrainer:
    torch.manual_seed(0)
    detach = cosa.pop("detach", "none")
    settings = Settings(
        AugmentConfig(crop=CROP),
        CosaConfig(**{**COSA, **cosa}),
        OptimConfig(lr=1e-3, warmup=0, weight_decay=0.1),
        TrainConfig(iterations=100, c2s_start=10, guidance_start=20),
    )
    net = CosaNet(ModelConfig(**MODEL, detach=detach), CLASSES, CROP, pretrained=False)
    source = source or Guidance(settings.cosa.guidance)
    trainer = CosaTrainer(net, settings, resolve(RuntimeConfig(device="cpu")), source).double()
    # Let the two networks differ, as they do after the first steps.
    with torch.no_grad():
        for parameter in trainer.assignment.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return trainer


def make_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    weak, strong = torch.randn(2, 2, 3, CROP, CROP, dtype=torch.float64, generator=generator)
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0]], dtype=torch.float64)
    box = torch.tensor([[0, CROP, 0, CROP], [3, 29, 8, CROP]])
    return Batch(weak, strong, labels, torch.tensor([[0, 2], [1, -1]]), box, torch.arange(2))


def up(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


def teacher_targets(net: CosaNet, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """M', M-dagger' and S' of the weak view: two scales, mirrored, summed, min-max over each present class."""
    net.eval()
    cams, aux, seg = 0.0, 0.0, 0.0
    for scale in COSA["scales"]:
        small = batch.weak if scale == 1.0 else up(batch.weak, 16)
        one, two = net(small), net(small.flip(-1))
        cams = cams + torch.maximum(up(one.cams, CROP), up(two.cams.flip(-1), CROP)).clamp(min=0)
        aux = aux + torch.maximum(up(one.aux_cams, CROP), up(two.aux_cams.flip(-1), CROP)).clamp(min=0)
        seg = seg + up(one.seg, CROP) + up(two.seg.flip(-1), CROP)
    for maps in (cams, aux):
        for b in range(2):
            for c in range(CLASSES):
                low = maps[b, c] - maps[b, c].min()
                maps[b, c] = batch.labels[b, c] * low / (low.max() + 1e-5)
    return cams, aux, seg


def slow_c2s(seg: Tensor, cams: Tensor, xi: float, box: Tensor) -> Tensor:
    """Eq. 3 to 5 with explicit indicator tensors."""
    s = up(seg, CROP)
    nu = cams.amax(1)
    label = torch.where(nu >= xi, cams.argmax(1) + 1, 0)
    distance = torch.where(nu >= xi, (nu - xi) / (1 - xi), (xi - nu) / xi)
    reliability = 1 / -torch.log(0.8 * distance)
    for b, (y0, y1, x0, x1) in enumerate(box.tolist()):
        inside = torch.zeros(CROP, CROP)
        inside[y0:y1, x0:x1] = 1
        reliability[b] *= inside
    log_p = torch.log(s.exp() / s.exp().sum(1, keepdim=True))
    picked = sum((label == c) * log_p[:, c] for c in range(CLASSES + 1))
    return -(reliability / reliability.sum() * picked).sum()


def slow_csc(cams: Tensor, aux: Tensor, xi: float, box: Tensor) -> Tensor:
    """Eq. 9 and 10, one anchor at a time."""
    small = up(aux, 4)
    nu = small.amax(1)
    label = torch.where(nu >= xi, small.argmax(1) + 1, 0)
    distance = torch.where(nu >= xi, (nu - xi) / (1 - xi), (xi - nu) / xi)
    perplexity = -torch.log(0.8 * distance)
    total, anchors = torch.zeros((), dtype=torch.float64), 0
    for b, bounds in enumerate(box.tolist()):
        y0, y1, x0, x1 = (round(side * 4 / CROP) for side in bounds)
        low = [(y, x) for y in range(y0, y1) for x in range(x0, x1) if perplexity[b, y, x] <= 1]
        anchors += len(low)
        vector = {p: F.normalize(cams[b, :, p[0], p[1]], dim=0) for p in low}
        for i in low:
            score = {j: torch.exp(vector[i] @ vector[j] / 0.5) for j in low if j != i}
            positive = [s for j, s in score.items() if label[b][j] == label[b][i]]
            negative = [s for j, s in score.items() if label[b][j] != label[b][i]]
            if positive and negative:
                k = torch.stack(negative).sum()
                total = total - torch.stack([torch.log(s / (s + k)) for s in positive]).mean()
    return total / max(1, anchors)


def slow_objective(trainer: CosaTrainer, batch: Batch, xi: float, aux_xi: float) -> tuple[Tensor, CosaNet]:
    """Eq. 11 with the paper's weights, on a copy of the online network in its state before the step."""
    with torch.no_grad():
        cams, aux, seg = teacher_targets(copy.deepcopy(trainer.assignment), batch)
    online = copy.deepcopy(trainer.online).train()
    out = online(batch.strong)
    loss = torch.zeros((), dtype=torch.float64)
    for logits in (out.logits, out.aux_logits):
        sigma = 1 / (1 + torch.exp(-logits))
        loss = loss - (batch.labels * sigma.log() + (1 - batch.labels) * (1 - sigma).log()).mean()
    loss = loss + 0.1 * (slow_c2s(out.seg, cams, xi, batch.valid_box) + slow_c2s(out.seg, aux, aux_xi, batch.valid_box))
    kept = torch.cat([torch.ones(2, 1), batch.labels], 1)[..., None, None]
    powers = torch.exp((seg - (seg * kept - 1e9 * (1 - kept)).amax(1, keepdim=True)) / 0.01) * kept
    spl = up((powers / powers.sum(1, keepdim=True))[:, 1:], 4)
    sigma = 1 / (1 + torch.exp(-out.cams))
    loss = loss - 0.05 * (spl * sigma.log() + (1 - spl) * (1 - sigma).log()).mean()
    return loss + 0.1 * slow_csc(out.cams, aux, aux_xi, batch.valid_box), online


def test_step_equals_the_transcription() -> None:
    trainer, batch = make_trainer(), make_batch()
    before = make_trainer()  # the same weights, not stepped
    reported = trainer.step(25, batch)
    loss, online = slow_objective(before, batch, float(trainer.threshold.xi), float(trainer.aux_threshold.xi))
    assert float(reported["loss"]) == pytest.approx(loss.item(), rel=1e-9)
    loss.backward()
    for (name, fast), slow in zip(trainer.online.named_parameters(), online.parameters(), strict=True):
        if slow.grad is not None:
            torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-6, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_assignment_network_is_the_moving_average() -> None:
    trainer, batch = make_trainer(), make_batch()
    old = {name: value.clone() for name, value in trainer.assignment.named_parameters()}
    trainer.step(25, batch)
    online = dict(trainer.online.named_parameters())
    for name, value in trainer.assignment.named_parameters():
        torch.testing.assert_close(value, 0.9 * old[name] + 0.1 * online[name])
    for ours, theirs in zip(trainer.online.buffers(), trainer.assignment.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_warm_up_trains_the_classifiers_and_decays_the_decoder() -> None:
    trainer, batch = make_trainer(), make_batch()
    decoder = [p.clone() for p in trainer.online.decoder.parameters()]
    reported = trainer.step(9, batch)
    assert set(reported) == {"cls", "cls_aux", "loss", "threshold"}
    lr = 10 * 1e-3 * (1 - 9 / 100) ** 0.9
    for old, new in zip(decoder, trainer.online.decoder.parameters(), strict=True):
        torch.testing.assert_close(new, old * (1 - lr * 0.1))


def test_c2s_comes_before_the_guidance() -> None:
    trainer, batch = make_trainer(), make_batch()
    assert set(trainer.step(10, batch)) == {"cls", "cls_aux", "c2s", "loss", "threshold"}
    assert float(trainer.threshold.xi) == 0.5
    assert {"s2c", "csc"} <= set(trainer.step(20, batch))
    assert float(trainer.threshold.xi) != 0.5


def terms(trainer: CosaTrainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.step(25, make_batch()).items()}


def test_each_switch_changes_its_own_term_only() -> None:
    full = terms(make_trainer())
    assert set(full) - set(terms(make_trainer(guidance="none"))) == {"s2c"}
    assert set(full) - set(terms(make_trainer(csc=False))) == {"csc"}
    unweighted = terms(make_trainer(raw=False))
    assert unweighted["c2s"] != pytest.approx(full["c2s"], rel=1e-3)
    assert unweighted["s2c"] == full["s2c"]
    fixed = make_trainer(dynamic_threshold=False)
    terms(fixed)
    assert float(fixed.threshold.xi) == 0.5
    # Without SA the online network, whose weights differ, makes the assignments.
    assert terms(make_trainer(swap=False))["c2s"] != pytest.approx(full["c2s"], rel=1e-6)


def test_noise_and_truth_replace_the_guidance() -> None:
    spl = terms(make_trainer())["s2c"]
    noise = terms(make_trainer(guidance="noise"))["s2c"]
    again = terms(make_trainer(guidance="noise"))["s2c"]
    mask = torch.zeros(2, CROP, CROP, dtype=torch.uint8)
    mask[0, :16] = 1
    mask[1, 8:, 8:] = 2
    oracle = make_trainer(Guidance("gt", lambda index, iteration, first: mask), guidance="gt")
    assert len({round(value, 9) for value in (spl, noise, terms(oracle)["s2c"])}) == 3
    assert noise == again  # the noise belongs to the iteration, so a resumed run sees the same
    with pytest.raises(ValueError, match="needs the training masks"):
        Guidance("gt")


@pytest.mark.parametrize(
    ("detach", "features", "weights"),
    [("none", True, True), ("feat", False, True), ("cls", True, False), ("all", False, False)],
)
def test_detach_stops_the_guidance_gradient(detach: str, features: bool, weights: bool) -> None:
    net = make_trainer(detach=detach).online
    out = net(make_batch().strong)
    if not (features or weights):
        assert not out.guided_cams.requires_grad
        return
    out.guided_cams.square().sum().backward()
    assert bool(net.classifier.weight.grad.any()) == weights
    assert bool(net.encoder.vit.blocks[0].mlp.fc1.weight.grad.any()) == features


def test_balanced_weights_by_hand() -> None:
    labels = torch.tensor([[[[0, 0, 0, 1], [255, 2, 0, 1]]]])
    ones = torch.ones(1, 1, 2, 4)
    weight = normalised_weights(labels, ones, weight_totals(labels, ones, balance=True), balance=True)
    assert weight.flatten().tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 8, 1 / 6, 0, 1 / 6, 1 / 8, 1 / 6], rel=1e-7)


def test_release_recipe_runs_with_band_balance_relu_and_energy() -> None:
    recipe = {"raw": False, "csc": False, "dynamic_threshold": False, "ignore_band": (0.25, 0.7), "balance": True}
    reported = terms(make_trainer(**recipe, s2c_relu=True, lambda_energy=0.05))
    assert set(reported) == {"cls", "cls_aux", "c2s", "s2c", "energy", "loss", "threshold"}
    assert reported["energy"] < 0
    assert all(math.isfinite(value) for value in reported.values())


def test_dense_energy_against_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(4)
    seg = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=generator)
    images = 255 * torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 3, (1, 8, 8), generator=generator, dtype=torch.uint8)
    labels[0, 0] = 255
    box = torch.tensor([[0, 8, 0, 6]])
    p = F.interpolate(up(seg, 8).softmax(1), size=(4, 4), mode="bilinear", align_corners=False)[0]
    total = 0.0
    for i in range(16):
        yi, xi = divmod(i, 4)
        if xi * 2 + 1 >= 6:
            continue
        gate = 1.0 if labels[0, yi * 2, xi * 2] == 255 else max(0.0, 1 - float(p[:, yi, xi].max()))
        for j in range(16):
            yj, xj = divmod(j, 4)
            if xj * 2 + 1 >= 6:
                continue
            space = ((yi - yj) ** 2 + (xi - xj) ** 2) * 4 / 100**2
            color = float(((images[0, :, yi * 2, xi * 2] - images[0, :, yj * 2, xj * 2]) ** 2).sum()) / 15**2
            total += gate * math.exp(-0.5 * (space + color)) * float(p[:, yi, xi] @ p[:, yj, xj])
    energy = dense_energy_loss(seg.float(), images.float(), labels, box, chunk=5)
    assert float(energy) == pytest.approx(-1e-7 * total, rel=1e-4)


def test_bf16_autocast_step_is_close() -> None:
    exact = make_trainer().float()
    rough = make_trainer().float()
    rough.runtime = resolve(RuntimeConfig(device="cpu", precision="bf16"))
    batch = make_batch()
    batch = replace(batch, weak=batch.weak.float(), strong=batch.strong.float(), labels=batch.labels.float())
    one, two = exact.step(25, batch), rough.step(25, batch)
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=0.05)


def test_float8_is_the_assignment_network_s_alone() -> None:
    exact, rough = make_trainer().float(), make_trainer().float()
    machine = replace(rough.runtime, float8=True)
    rough = step.make_trainer(rough.online, rough.settings, machine, rough.guidance)
    exact.assignment.load_state_dict(exact.online.state_dict())
    start = {name: value.clone() for name, value in rough.assignment.named_parameters()}
    assert exact.state_dict().keys() == rough.state_dict().keys()
    kinds = [{type(module).__name__ for module in net.modules()} for net in (rough.assignment, rough.online)]
    assert ["Float8Linear" in kind for kind in kinds] == [True, False]
    batch = make_batch()
    batch = replace(batch, weak=batch.weak.float(), strong=batch.strong.float(), labels=batch.labels.float())
    one, two = exact.step(25, batch), rough.step(25, batch)
    assert float(two["cls"]) == float(one["cls"])
    assert float(two["c2s"]) == pytest.approx(float(one["c2s"]), rel=0.05)
    assert float(two["c2s"]) != float(one["c2s"])
    # The average takes in the online network, whose weights it shares with no float8 copy.
    online = dict(rough.online.named_parameters())
    for name, value in rough.assignment.named_parameters():
        torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * online[name])
