"""The paper's equations by hand: values worked out on paper, loops over pixels, and gradients by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cosa_kernels.reference import (
    cam_pseudo_labels,
    csc_info_nce,
    merge_cams,
    raw_cross_entropy,
    seg_pseudo_labels,
    seg_to_cam_loss,
    upsample_cross_entropy,
)

F64 = torch.float64


def random_cams(batch: int, classes: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, classes, h, w, dtype=F64, generator=torch.Generator().manual_seed(seed))


class TestPseudoLabels:
    def test_hand_computed_labels_and_perplexity(self) -> None:
        # One row of four pixels, two classes, xi = 0.5, lambda_alpha = 0.8.
        cams = torch.tensor([[[[0.9, 0.1, 0.5, 0.0]], [[0.2, 0.6, 0.3, 0.0]]]], dtype=F64)
        labels, perplexity = cam_pseudo_labels(cams, 0.5)
        assert labels.tolist() == [[[1, 2, 1, 0]]]  # nu >= xi is foreground, the boundary included
        expected = [-math.log(0.8 * 0.8), -math.log(0.8 * 0.2), math.inf, -math.log(0.8)]
        assert perplexity.flatten().tolist() == pytest.approx(expected)

    def test_lambda_beta_is_an_exponent(self) -> None:
        cams = random_cams(1, 3, 5, 4)
        _, one = cam_pseudo_labels(cams, 0.4)
        _, two = cam_pseudo_labels(cams, 0.4, lambda_beta=2.5)
        torch.testing.assert_close(two, one**2.5)

    def test_outside_the_valid_box_is_ignored(self) -> None:
        cams = random_cams(2, 3, 6, 8)
        box = torch.tensor([[1, 4, 2, 8], [0, 0, 0, 8]])
        labels, perplexity = cam_pseudo_labels(cams, 0.5, valid_box=box)
        inside = torch.zeros(2, 6, 8, dtype=torch.bool)
        inside[0, 1:4, 2:8] = True
        assert torch.equal(labels == 255, ~inside)
        assert torch.equal(perplexity.isinf() & (labels == 255), ~inside)

    def test_size_upsamples_before_the_threshold(self) -> None:
        cams = random_cams(1, 2, 3, 5)
        labels, _ = cam_pseudo_labels(cams, 0.5, size=(7, 11))
        full = F.interpolate(cams, size=(7, 11), mode="bilinear", align_corners=False)
        assert torch.equal(labels, cam_pseudo_labels(full, 0.5)[0])

    def test_threshold_may_be_a_tensor(self) -> None:
        cams = random_cams(1, 2, 4, 4)
        for a, b in zip(
            cam_pseudo_labels(cams, 0.3), cam_pseudo_labels(cams, torch.tensor(0.3, dtype=F64)), strict=True
        ):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_low_precision_inputs_give_float32_perplexity(self, dtype: torch.dtype) -> None:
        assert cam_pseudo_labels(random_cams(1, 2, 4, 4).to(dtype), 0.5)[1].dtype == torch.float32


class TestRawCrossEntropy:
    def slow(
        self, logits: torch.Tensor, cams: torch.Tensor, xi: float, box: torch.Tensor, size: tuple[int, int]
    ) -> float:
        """Eq. 3 to 5, pixel by pixel, with w = (1 / P) / mean(1 / P)."""
        up = {"size": size, "mode": "bilinear", "align_corners": False}
        s, m = F.interpolate(logits, **up), F.interpolate(cams, **up)
        reliabilities, losses = [], []
        for b in range(len(s)):
            y0, y1, x0, x1 = box[b].tolist()
            for y in range(y0, y1):
                for x in range(x0, x1):
                    nu, best = max((float(m[b, c, y, x]), c) for c in range(m.shape[1]))
                    label = best + 1 if nu >= xi else 0
                    distance = (nu - xi) / (1 - xi) if nu >= xi else (xi - nu) / xi
                    reliabilities.append(1 / -math.log(0.8 * distance))
                    log_sum = math.log(sum(math.exp(float(v)) for v in s[b, :, y, x]))
                    losses.append(log_sum - float(s[b, label, y, x]))
        mean = sum(reliabilities) / len(reliabilities)
        return sum(r / mean * loss for r, loss in zip(reliabilities, losses, strict=True)) / len(losses)

    def test_against_a_loop_over_pixels(self) -> None:
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(2, 4, 3, 2, dtype=F64, generator=generator)
        cams = random_cams(2, 3, 4, 3)
        box = torch.tensor([[0, 5, 1, 7], [2, 6, 0, 7]])
        loss = raw_cross_entropy(logits, cams, 0.45, size=(6, 7), valid_box=box)
        assert float(loss) == pytest.approx(self.slow(logits, cams, 0.45, box, (6, 7)), rel=1e-12)

    def test_gradcheck(self) -> None:
        logits = torch.randn(2, 3, 2, 3, dtype=F64, requires_grad=True)
        cams = random_cams(2, 2, 3, 3)
        assert torch.autograd.gradcheck(lambda s: raw_cross_entropy(s, cams, 0.4, size=(5, 4)), logits)

    def test_no_gradient_to_the_cams(self) -> None:
        logits = torch.randn(1, 3, 4, 4, dtype=F64, requires_grad=True)
        cams = random_cams(1, 2, 4, 4).requires_grad_()
        raw_cross_entropy(logits, cams, 0.5).backward()
        assert cams.grad is None
        assert logits.grad.abs().sum() > 0

    def test_nothing_valid_is_zero_with_zero_gradient(self) -> None:
        logits = torch.randn(2, 3, 4, 4, requires_grad=True)
        box = torch.zeros(2, 4, dtype=torch.int64)
        loss = raw_cross_entropy(logits, random_cams(2, 2, 4, 4).float(), 0.5, valid_box=box)
        loss.backward()
        assert loss.item() == 0.0
        assert not logits.grad.any()

    def test_every_pixel_at_the_threshold_is_zero_not_nan(self) -> None:
        logits = torch.randn(1, 3, 4, 4, requires_grad=True)
        loss = raw_cross_entropy(logits, torch.full((1, 2, 4, 4), 0.5), 0.5)
        loss.backward()
        assert loss.item() == 0.0
        assert not logits.grad.any()

    def test_uncertain_pixels_weigh_less(self) -> None:
        # Two pixels, both background by CPL and both predicted foreground; only the nearer one to xi changes.
        logits = torch.tensor([[[[0.0, 0.0]], [[3.0, 0.0]]]])
        near = raw_cross_entropy(logits, torch.tensor([[[[0.49, 0.0]]]]), 0.5)
        far = raw_cross_entropy(logits, torch.tensor([[[[0.01, 0.0]]]]), 0.5)
        assert near < far


class TestUpsampleCrossEntropy:
    def test_equals_torch_without_weights(self) -> None:
        logits = torch.randn(2, 5, 3, 4, dtype=F64)
        target = torch.randint(0, 5, (2, 9, 7))
        target[0, :4] = 255
        full = F.interpolate(logits, size=(9, 7), mode="bilinear", align_corners=False)
        expected = F.cross_entropy(full, target, ignore_index=255)
        torch.testing.assert_close(upsample_cross_entropy(logits, target), expected)

    def test_weights_are_relative(self) -> None:
        logits, target, weight = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4)), torch.rand(1, 4, 4)
        one = upsample_cross_entropy(logits, target, weight=weight)
        torch.testing.assert_close(upsample_cross_entropy(logits, target, weight=7 * weight), one)

    def test_all_ignored(self) -> None:
        logits = torch.randn(1, 3, 4, 4, requires_grad=True)
        upsample_cross_entropy(logits, torch.full((1, 4, 4), 255)).backward()
        assert not logits.grad.any()


class TestSegToCam:
    def test_spl_keeps_present_classes_and_background(self) -> None:
        logits = torch.tensor([[2.0, 5.0, 1.9]], dtype=F64).view(1, 3, 1, 1)
        spl = seg_pseudo_labels(logits, torch.tensor([[0.0, 1.0]]), temperature=0.1)
        odds = math.exp(-0.1 / 0.1)
        assert spl.flatten().tolist() == pytest.approx([1 / (1 + odds), 0.0, odds / (1 + odds)])

    def test_against_a_loop(self) -> None:
        generator = torch.Generator().manual_seed(2)
        cams = torch.randn(2, 3, 2, 3, dtype=F64, generator=generator)
        seg = torch.randn(2, 4, 2, 3, dtype=F64, generator=generator)
        present = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        total = 0.0
        for b in range(2):
            kept = [0] + [c + 1 for c in range(3) if present[b, c]]
            for y in range(2):
                for x in range(3):
                    norm = sum(math.exp(float(seg[b, k, y, x]) / 0.5) for k in kept)
                    for c in range(3):
                        target = math.exp(float(seg[b, c + 1, y, x]) / 0.5) / norm if present[b, c] else 0.0
                        sigma = 1 / (1 + math.exp(-float(cams[b, c, y, x])))
                        total -= target * math.log(sigma) + (1 - target) * math.log(1 - sigma)
        loss = seg_to_cam_loss(cams, seg, present, temperature=0.5)
        assert float(loss) == pytest.approx(total / (2 * 3 * 6), rel=1e-12)

    def test_gradcheck_and_no_gradient_to_the_teacher(self) -> None:
        cams = torch.randn(1, 2, 2, 2, dtype=F64, requires_grad=True)
        seg = torch.randn(1, 3, 5, 4, dtype=F64, requires_grad=True)
        present = torch.tensor([[1.0, 0.0]])
        assert torch.autograd.gradcheck(lambda m: seg_to_cam_loss(m, seg, present), cams)
        seg_to_cam_loss(cams, seg, present).backward()
        assert seg.grad is None


class TestCsc:
    def slow(self, cams: torch.Tensor, labels: torch.Tensor, perplexity: torch.Tensor, tau: float, scope: str) -> float:
        """Eq. 9 and 10 with explicit sums."""
        positions = [
            (b, F.normalize(cams[b, :, y, x], dim=0), int(labels[b, y, x]))
            for b in range(cams.shape[0])
            for y in range(cams.shape[2])
            for x in range(cams.shape[3])
            if perplexity[b, y, x] <= 1.0
        ]
        total = 0.0
        for i, (bi, vi, li) in enumerate(positions):
            others = [
                (j, float(vi @ vj), lj)
                for j, (bj, vj, lj) in enumerate(positions)
                if j != i and (scope == "batch" or bj == bi)
            ]
            positives = [math.exp(s / tau) for _, s, lj in others if lj == li]
            k = sum(math.exp(s / tau) for _, s, lj in others if lj != li)
            if positives and k:
                total -= sum(math.log(p / (p + k)) for p in positives) / len(positives)
        return total / max(1, len(positions))

    @pytest.mark.parametrize("scope", ["image", "batch"])
    @pytest.mark.parametrize("tau", [0.5, 0.05])
    def test_against_explicit_sums(self, scope: str, tau: float) -> None:
        generator = torch.Generator().manual_seed(3)
        cams = torch.randn(2, 3, 4, 3, dtype=F64, generator=generator)
        labels = torch.randint(0, 3, (2, 4, 3), generator=generator, dtype=torch.uint8)
        perplexity = 2 * torch.rand(2, 4, 3, dtype=F64, generator=generator)
        loss = csc_info_nce(cams, labels, perplexity, temperature=tau, scope=scope)
        assert float(loss) == pytest.approx(self.slow(cams, labels, perplexity, tau, scope), rel=1e-10)

    def test_gradcheck(self) -> None:
        cams = torch.randn(2, 2, 2, 3, dtype=F64, requires_grad=True)
        labels = torch.tensor([[[0, 0, 1], [1, 2, 0]], [[1, 1, 1], [1, 1, 1]]])
        perplexity = torch.full((2, 2, 3), 0.5, dtype=F64)
        perplexity[0, 0, 0] = 3.0
        assert torch.autograd.gradcheck(lambda m: csc_info_nce(m, labels, perplexity, temperature=0.2), cams)

    @pytest.mark.parametrize(
        ("labels", "perplexity"),
        [
            (torch.zeros(1, 3, 3, dtype=torch.int64), 0.5),  # no negative
            (torch.arange(9).view(1, 3, 3), 0.5),  # no positive
            (torch.arange(9).view(1, 3, 3) % 2, 9.0),  # empty Omega
        ],
    )
    def test_degenerate_regions_give_zero_not_nan(self, labels: torch.Tensor, perplexity: float) -> None:
        cams = torch.randn(1, 4, 3, 3, requires_grad=True)
        loss = csc_info_nce(cams, labels, torch.full((1, 3, 3), perplexity), temperature=0.01)
        loss.backward()
        assert loss.item() == 0.0
        assert not cams.grad.any()

    def test_finite_at_temperature_001_and_for_zero_vectors(self) -> None:
        cams = torch.randn(1, 4, 5, 5)
        cams[..., 0] = 0.0
        cams.requires_grad_()
        labels = (torch.arange(25).view(1, 5, 5) % 3).to(torch.uint8)
        csc_info_nce(cams, labels, torch.zeros(1, 5, 5), temperature=0.01).backward()
        assert cams.grad.isfinite().all()


class TestMergeCams:
    def test_hand_computed(self) -> None:
        cams = torch.tensor([[[[-1.0, 2.0]], [[5.0, 6.0]]]])
        mirrored = torch.tensor([[[[1.0, 0.0]], [[0.0, 9.0]]]])
        merged = merge_cams([cams], [mirrored], class_labels=torch.tensor([[1.0, 0.0]]), size=(1, 2), eps=0.0)
        # class 0: max -> (1, 2), minus its minimum -> (0, 1); class 1 is absent
        assert merged.tolist() == [[[[0.0, 1.0]], [[0.0, 0.0]]]]

    def test_scales_are_added_after_relu(self) -> None:
        one, two = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 6, 6)
        merged = merge_cams([one, two], class_labels=torch.ones(1, 2), size=(6, 6))
        total = F.interpolate(one, size=(6, 6), mode="bilinear", align_corners=False).relu() + two.relu()
        total = total - total.amin((2, 3), keepdim=True)
        torch.testing.assert_close(merged, total / (total.amax((2, 3), keepdim=True) + 1e-5))

    def test_inactive_class_stays_zero(self) -> None:
        merged = merge_cams([torch.full((1, 1, 3, 3), -2.0)], class_labels=torch.ones(1, 1), size=(3, 3))
        assert not merged.any()


CAMS = torch.rand(2, 3, 4, 4)
BAD_CALLS = {
    "lambda_alpha must lie strictly between 0 and 1, got 1.0": lambda: cam_pseudo_labels(CAMS, 0.5, lambda_alpha=1.0),
    "threshold must lie strictly between 0 and 1, got 0": lambda: cam_pseudo_labels(CAMS, 0),
    "lambda_beta must be > 0": lambda: cam_pseudo_labels(CAMS, 0.5, lambda_beta=0.0),
    r"cams must be a floating \(B, C, h, w\)": lambda: cam_pseudo_labels(CAMS[0], 0.5),
    r"valid_box must be an integer \(2, 4\)": lambda: cam_pseudo_labels(CAMS, 0.5, valid_box=torch.zeros(2, 3)),
    "one channel more than cams": lambda: raw_cross_entropy(torch.rand(2, 3, 4, 4), CAMS, 0.5),
    r"target must be an integer \(2, H, W\)": lambda: upsample_cross_entropy(CAMS, torch.zeros(2, 4, 4)),
    "temperature must be > 0, got 0": lambda: seg_to_cam_loss(
        CAMS, torch.rand(2, 4, 4, 4), torch.ones(2, 3), temperature=0
    ),
    r"class_labels must be \(2, 3\)": lambda: seg_to_cam_loss(CAMS, torch.rand(2, 4, 4, 4), torch.ones(2, 4)),
    "scope must be 'image' or 'batch'": lambda: csc_info_nce(
        CAMS, torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4), scope="pixel"
    ),
    "similarity must be 'cosine' or 'dot'": lambda: csc_info_nce(
        CAMS, torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4), similarity="l2"
    ),
    "one map per scale": lambda: merge_cams([CAMS], [CAMS, CAMS], class_labels=torch.ones(2, 3), size=(4, 4)),
    "cams is empty": lambda: merge_cams([], class_labels=torch.ones(2, 3), size=(4, 4)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_impossible_arguments_say_what_is_wanted(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_losses_compile_without_a_graph_break() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 4, 4, requires_grad=True)
    cams, present = torch.rand(2, 3, 6, 6), torch.tensor([[1.0, 0, 1], [0, 1, 0]])

    def losses(logits: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
        labels, perplexity = cam_pseudo_labels(cams, xi, size=(4, 4))
        return (
            raw_cross_entropy(logits, cams, xi, size=(8, 8))
            + seg_to_cam_loss(logits[:, 1:], logits.detach(), present)
            + csc_info_nce(logits[:, 1:], labels, perplexity, epsilon=3.0)
        )

    xi = torch.tensor(0.5)
    eager = losses(logits, xi)
    (eager_grad,) = torch.autograd.grad(eager, logits)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")(logits, xi)
    (compiled_grad,) = torch.autograd.grad(compiled, logits)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(compiled_grad, eager_grad, rtol=1e-4, atol=1e-6)
