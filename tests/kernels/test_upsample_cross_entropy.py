"""Cross-entropy of up-sampled logits: every implementation against the equation, and at its edges."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from cosa_kernels import reference, upsample_cross_entropy
from cosa_kernels.ops import upsample_cross_entropy as module
from three_way import DEVICE, LargestTensor, compare, relative_error

HALF = (torch.bfloat16, torch.float16)
IMPLS = ("torch", "triton")

SHAPES = {
    # logits (h, w), output (H, W), channels
    "stride 16, as with a ViT": ((3, 4), (48, 64), 21),
    "stride 8": ((4, 3), (32, 24), 21),
    "nothing divides anything": ((5, 4), (37, 45), 5),
    "one pixel": ((1, 1), (1, 1), 2),
    "one logit for all pixels": ((1, 1), (7, 5), 3),
    "one row of logits": ((1, 6), (16, 50), 4),
    "regions wider than a tile": ((2, 3), (40, 130), 3),
    "same size": ((4, 5), (4, 5), 21),
    "down-sampling": ((7, 9), (3, 4), 4),
    "one channel, a loss of 0": ((2, 2), (8, 8), 1),
    "C = 80": ((2, 2), (24, 20), 81),
    "C = 150": ((2, 2), (8, 9), 151),
}
LARGE = {
    "VOC at stride 16": ((28, 28), (448, 448), 21),
    "prime sides": ((27, 20), (421, 317), 21),
    "more than one tile of columns": ((9, 70), (65, 1100), 4),
    "C = 150, prime sides": ((11, 7), (97, 89), 151),
    "same size, several tiles": ((70, 600), (70, 600), 3),
    "same height, several tiles": ((70, 9), (70, 40), 3),
    "down-sampling, several tiles": ((90, 1200), (80, 1100), 2),
}


def random_case(
    low: tuple[int, int], high: tuple[int, int], channels: int, count: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (2, K, *low); blocky labels and weights (count, 2, *high), a quarter of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, channels, *low, generator=generator)
    coarse = torch.randint(0, channels, (count * 2, 1, 3, 3), generator=generator).float()
    labels = F.interpolate(coarse, size=high, mode="nearest").long().view(count, 2, *high)
    labels[torch.rand(labels.shape, generator=generator) < 0.25] = 255
    weight = torch.rand(count, 2, *high, generator=generator)
    return logits, labels.to(torch.uint8).to(DEVICE), weight.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("low", "high", "channels"), SHAPES.values(), ids=SHAPES)
def test_three_way(low: tuple, high: tuple, channels: int, impl: str, dtype: torch.dtype) -> None:
    logits, labels, weight = random_case(low, high, channels)
    check = {"target": labels[0], "weight": weight[0]}
    compare(
        functools.partial(upsample_cross_entropy, **check),
        functools.partial(reference.upsample_cross_entropy, **check),
        logits,
        dtype,
        impl,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("low", "high", "channels"), LARGE.values(), ids=LARGE)
def test_three_way_at_full_size(low: tuple, high: tuple, channels: int, dtype: torch.dtype) -> None:
    logits, labels, weight = random_case(low, high, channels, count=2)
    check = {"target": labels, "weight": weight}
    impls = ["torch", "triton"] if DEVICE == "cuda" and dtype is not torch.float64 else ["torch"]
    for impl in impls:
        compare(
            functools.partial(upsample_cross_entropy, **check),
            functools.partial(reference.upsample_cross_entropy, **check),
            logits,
            dtype,
            impl,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_several_targets_are_added(impl: str, weighted: bool, reduction: str) -> None:
    logits, labels, weight = random_case((3, 3), (24, 24), 5, count=3)
    labels[1] = 255  # one of them without any pixel
    check = {"target": labels, "weight": weight if weighted else None, "reduction": reduction}
    compare(
        functools.partial(upsample_cross_entropy, **check),
        functools.partial(reference.upsample_cross_entropy, **check),
        logits,
        torch.float32,
        impl,
    )


def test_several_targets_by_hand() -> None:
    logits, labels, weight = random_case((3, 3), (24, 24), 5, count=2)
    together = upsample_cross_entropy(logits.to(DEVICE), labels, weight=weight)
    apart = [upsample_cross_entropy(logits.to(DEVICE), t, weight=w) for t, w in zip(labels, weight, strict=True)]
    assert float(together) == pytest.approx(sum(map(float, apart)), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_huge_logits(impl: str) -> None:
    """+-1e4: no overflow and no underflow.

    Numbers of that size are 9.8e-4 apart in float32: the exponents of two correct orders of summation may differ by it.
    """
    logits, labels, weight = random_case((3, 4), (48, 64), 5)
    logits = torch.where(logits > 0, 1e4, -1e4) + logits
    check = {"target": labels[0], "weight": weight[0]}
    compare(
        functools.partial(upsample_cross_entropy, **check),
        functools.partial(reference.upsample_cross_entropy, **check),
        logits,
        torch.float32,
        impl,
        rounding=9.8e-4,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_an_ignore_index_that_the_labels_cannot_hold_ignores_nothing(impl: str) -> None:
    """-100 would be 156 in uint8."""
    logits, labels = torch.randn(1, 200, 2, 2).to(DEVICE), torch.full((1, 6, 6), 156, dtype=torch.uint8, device=DEVICE)
    expected = upsample_cross_entropy(logits, labels.long(), impl="reference")
    assert float(upsample_cross_entropy(logits, labels, ignore_index=-100, impl=impl)) == pytest.approx(float(expected))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32, torch.int16])
def test_label_types_and_other_ignore_index(impl: str, target_dtype: torch.dtype) -> None:
    logits, labels, weight = random_case((3, 3), (20, 20), 5)
    other = torch.where(labels == 255, -100, labels.long()).to(target_dtype)
    expected = upsample_cross_entropy(logits.to(DEVICE), labels, weight=weight, impl="reference")
    got = upsample_cross_entropy(logits.to(DEVICE), other, weight=weight, ignore_index=-100, impl=impl)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("case", ["all ignored", "all weights 0"])
def test_nothing_counts(impl: str, case: str) -> None:
    logits, labels, weight = random_case((3, 3), (24, 24), 5)
    labels, weight = (torch.full_like(labels, 255), weight) if case == "all ignored" else (labels, weight * 0)
    logits = logits.to(DEVICE).requires_grad_()
    loss = upsample_cross_entropy(logits, labels, weight=weight, impl=impl)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_ignored_pixels_may_hold_any_weight(impl: str) -> None:
    logits, labels, weight = random_case((3, 3), (24, 24), 5)
    spoilt = torch.where(labels == 255, float("nan"), weight)
    expected = upsample_cross_entropy(logits.to(DEVICE), labels, weight=weight, impl="reference")
    assert float(upsample_cross_entropy(logits.to(DEVICE), labels, weight=spoilt, impl=impl)) == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_views_that_are_not_contiguous(impl: str) -> None:
    logits, labels, weight = random_case((4, 3), (16, 24), 5)
    plain = logits.to(DEVICE).clone().requires_grad_()
    mixed = logits.to(DEVICE).clone(memory_format=torch.channels_last).requires_grad_()
    turned = labels.transpose(-1, -2).contiguous().transpose(-1, -2)
    strided = torch.stack([weight, weight], dim=-1)[..., 0]
    upsample_cross_entropy(plain, labels, weight=weight, impl="reference").backward()
    upsample_cross_entropy(mixed, turned, weight=strided, impl=impl).backward()
    assert relative_error(mixed.grad, plain.grad) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_time(impl: str) -> None:
    logits, labels, weight = random_case((3, 4), (48, 64), 5, count=2)
    results = []
    for _ in range(3):
        leaf = logits.to(DEVICE).requires_grad_(True).clone()
        leaf.retain_grad()
        loss = upsample_cross_entropy(leaf, labels, weight=weight, impl=impl)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_gradcheck() -> None:
    logits, labels, weight = random_case((3, 2), (7, 9), 4, count=2)
    leaf = logits.double().to(DEVICE).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: upsample_cross_entropy(x, labels, weight=weight.double(), impl="torch"), (leaf,)
    )


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_operator_is_registered_as_torch_expects(impl: str, with_gradient: bool) -> None:
    logits, labels, weight = random_case((2, 2), (8, 8), 3)
    leaf = logits.to(DEVICE).requires_grad_(with_gradient)
    torch.library.opcheck(
        module._operator, (leaf, labels, weight, torch.ones(1, device=DEVICE), 255, with_gradient, impl)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_graph_breaks_for_any_size(impl: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(upsample_cross_entropy, impl=impl), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for low, high in (((3, 2), (24, 16)), ((4, 5), (30, 41))):
        logits, labels, weight = random_case(low, high, 4)
        leaf, other = (logits.to(DEVICE).clone().requires_grad_() for _ in range(2))
        loss, expected = compiled(leaf, labels, weight=weight), upsample_cross_entropy(other, labels, weight=weight)
        loss.backward()
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        assert leaf.grad is not None
        assert other.grad is not None
        assert relative_error(leaf.grad, other.grad) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl: str) -> None:
    logits, labels, weight = random_case((3, 3), (24, 24), 5)
    plain = upsample_cross_entropy(logits.to(DEVICE), labels, weight=weight, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        mixed = upsample_cross_entropy(logits.to(DEVICE), labels, weight=weight, impl=impl)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_no_gradient_is_computed_when_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, _ = random_case((3, 3), (24, 24), 5)
    asked = []
    forward = module._forward
    monkeypatch.setattr(module, "_forward", lambda *args: asked.append(args[-1]) or forward(*args))
    upsample_cross_entropy(logits, labels.cpu(), impl="torch")
    with torch.no_grad():
        upsample_cross_entropy(logits.clone().requires_grad_(), labels.cpu(), impl="torch")
    upsample_cross_entropy(logits.clone().requires_grad_(), labels.cpu(), impl="torch")
    assert asked == [False, False, True]


def test_gradient_scaler_does_not_lose_small_gradients() -> None:
    """float16 gradients of a large map are below its smallest number; scaled by 2^16 they are not."""
    logits, labels, _ = random_case((28, 28), (448, 448), 21)
    leaf = logits.to(DEVICE, torch.float16).requires_grad_()
    (upsample_cross_entropy(leaf, labels) * 65536.0).backward()
    true = logits.to(DEVICE, torch.float16).double().requires_grad_()
    (reference.upsample_cross_entropy(true, labels) * 65536.0).backward()
    assert relative_error(leaf.grad, true.grad) < 2e-3  # type: ignore[arg-type]


def test_memory_is_not_of_full_resolution() -> None:
    """Among all tensors made on the way none has classes and full resolution; the reference's do."""
    logits = torch.randn(2, 81, 28, 28)
    labels = torch.randint(0, 81, (1, 2, 448, 448), dtype=torch.uint8)
    full = logits.numel() * 16 * 16
    with LargestTensor() as eager:
        reference.upsample_cross_entropy(logits, labels)
    assert eager.elements >= full
    with LargestTensor() as ours:
        module._forward(logits, labels, torch.rand(labels.shape), torch.ones(1), 255, True)
    assert full / 100 < ours.elements < full / 12


@pytest.mark.parametrize("impl", IMPLS)
def test_double_backward_is_refused(impl: str) -> None:
    logits, labels, _ = random_case((2, 2), (8, 8), 3)
    leaf = logits.to(DEVICE).requires_grad_()
    loss = upsample_cross_entropy(leaf, labels, impl=impl)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    # Backward twice through one graph is something else, and works.
    first, second = (
        torch.autograd.grad(upsample_cross_entropy(leaf, labels, impl=impl) * 2, leaf)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_the_matrix_product_setting_of_the_program_does_not_round() -> None:
    logits, labels, _ = random_case((3, 4), (48, 64), 5)
    exact = upsample_cross_entropy(logits.to(DEVICE), labels, impl="torch")
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(upsample_cross_entropy(logits.to(DEVICE), labels, impl="torch"), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_on_a_gpu_a_wrong_label_makes_the_loss_nan() -> None:
    from cosa_kernels.gpu import upsample_cross_entropy as gpu

    logits, labels, _ = random_case((3, 3), (24, 24), 5)
    one = torch.ones(1, device=DEVICE)
    assert gpu.forward(logits.to(DEVICE), labels, None, one, 255, False)[0].isfinite()
    for wrong in (6, -3, 2**32, 2**32 + 255):  # the last two would be fine in 32 bits
        spoilt = labels.long()
        spoilt[0, 0, 5, 5] = wrong
        assert gpu.forward(logits.to(DEVICE), spoilt, None, one, 255, False)[0].isnan()


def test_too_many_classes_fall_back() -> None:
    logits, labels, _ = random_case((2, 2), (8, 8), 300)
    labels = labels.clamp(max=200)
    expected = upsample_cross_entropy(logits.to(DEVICE), labels, impl="reference")
    assert float(upsample_cross_entropy(logits.to(DEVICE), labels)) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="up to 256"):
        upsample_cross_entropy(logits.to(DEVICE), labels, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_offsets_beyond_32_bits() -> None:
    """The last image of a batch whose logits pass 2^31 elements, against that image alone."""
    batch = 2**31 // (128 * 128 * 128) + 2
    logits = torch.zeros(batch, 128, 128, 128, dtype=torch.float16, device="cuda")
    labels = torch.full((batch, 128, 128), 255, dtype=torch.uint8, device="cuda")
    logits[-1] = torch.randn_like(logits[-1])
    labels[-1] = torch.randint(0, 128, labels[-1].shape, device="cuda")
    got = upsample_cross_entropy(logits, labels, impl="triton")
    assert float(got) == pytest.approx(
        float(upsample_cross_entropy(logits[-1:], labels[-1:], impl="reference")), rel=1e-4
    )
