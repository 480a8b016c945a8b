"""CAM pseudo-labels and RAW cross-entropy: every implementation against the equations, and at their edges."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from cosa_kernels import cam_pseudo_labels, raw_cross_entropy, reference
from cosa_kernels.ops import cam_pseudo_labels as module
from three_way import DEVICE, compare, poisoned_memory, relative_error

IMPLS = ("torch", "triton")

SHAPES = {
    # CAMs (h, w), labels (H, W), classes
    "stride 16, as with a ViT": ((3, 4), (48, 64), 20),
    "nothing divides anything": ((5, 4), (37, 45), 5),
    "one pixel": ((1, 1), (1, 1), 1),
    "one CAM position": ((1, 1), (7, 5), 3),
    "same size": ((9, 13), (9, 13), 20),
    "down-sampling": ((7, 9), (3, 4), 4),
    "one class": ((4, 4), (16, 16), 1),
    "C = 80": ((2, 2), (24, 20), 80),
    "C = 150": ((2, 2), (8, 9), 150),
}


def random_cams(low: tuple[int, int], classes: int, seed: int = 0) -> torch.Tensor:
    """(2, C, *low) in [0, 1]; image 0 has every third class, image 1 only the last."""
    cams = torch.rand(2, classes, *low, generator=torch.Generator().manual_seed(seed))
    present = torch.zeros(2, classes)
    present[0, ::3] = 1
    present[1, -1] = 1
    return (cams * present[..., None, None]).to(DEVICE)


def agree(cams: torch.Tensor, threshold: float, impl: str, **options: object) -> None:
    """Labels equal, perplexity close, except where the confidence is within rounding of the threshold."""
    with poisoned_memory():
        labels, perplexity = cam_pseudo_labels(cams, threshold, impl=impl, **options)  # type: ignore[arg-type]
    true_labels, true_perplexity = cam_pseudo_labels(cams.double(), threshold, impl="reference", **options)  # type: ignore[arg-type]
    assert labels.dtype == torch.uint8
    assert perplexity.dtype == torch.promote_types(cams.dtype, torch.float32)
    # P = -log(0.8 d) has the slope 1 / d: an error of 1e-6 in d is one of 1e-3 at d = 1e-3.
    plain = {**options, "lambda_beta": 1.0}
    clear = (-cam_pseudo_labels(cams.double(), threshold, impl="reference", **plain)[1]).exp() > 1e-3  # type: ignore[arg-type]
    clear |= true_labels == options.get("ignore_index", 255)
    assert clear.double().mean() > 0.9
    assert torch.equal(labels[clear], true_labels[clear])
    assert relative_error(perplexity[clear], true_perplexity[clear]) < 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("low", "high", "classes"), SHAPES.values(), ids=SHAPES)
def test_labels_and_perplexity(low: tuple, high: tuple, classes: int, impl: str, dtype: torch.dtype) -> None:
    agree(random_cams(low, classes).to(dtype), 0.4, impl, size=high)


@pytest.mark.parametrize("impl", IMPLS)
def test_options(impl: str) -> None:
    box = torch.tensor([[1, 9, 0, 12], [0, 0, 3, 3]], device=DEVICE)  # the second one is empty
    agree(random_cams((4, 4), 6), 0.55, impl, size=(11, 12), valid_box=box, lambda_alpha=0.5, lambda_beta=2.5)
    agree(random_cams((4, 4), 6), 0.55, impl, valid_box=box.clamp(max=4), ignore_index=99)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_by_hand(impl: str) -> None:
    """Threshold 0.5, alpha 0.8: P = -log(0.8 |c - 0.5| / 0.5); infinite at the threshold, which is foreground."""
    cams = torch.tensor([[0.0, 0.1, 0.5, 0.9], [0.0, 0.3, 0.2, 0.7]], device=DEVICE).view(1, 2, 1, 4)
    labels, perplexity = cam_pseudo_labels(cams, 0.5, impl=impl)
    assert labels.flatten().tolist() == [0, 0, 1, 1]
    expected = [-math.log(0.8), -math.log(0.8 * 0.4), math.inf, -math.log(0.8 * 0.8)]
    assert perplexity.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_threshold_as_a_tensor(impl: str) -> None:
    cams = random_cams((4, 4), 5)
    plain = cam_pseudo_labels(cams, 0.4, size=(16, 16), impl=impl)
    tensor = cam_pseudo_labels(cams, torch.tensor(0.4, device=DEVICE), size=(16, 16), impl=impl)
    assert torch.equal(plain[0], tensor[0])
    assert torch.equal(plain[1], tensor[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_an_image_without_any_class(impl: str) -> None:
    labels, perplexity = cam_pseudo_labels(torch.zeros(1, 3, 2, 2, device=DEVICE), 0.5, size=(8, 8), impl=impl)
    assert not labels.any()
    assert perplexity.unique().tolist() == pytest.approx([-math.log(0.8)], rel=1e-5)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("threshold", [1 - 1e-9, 1e-9, torch.tensor(1.0), torch.tensor(0.0)])
def test_extreme_thresholds_and_parameters_stay_finite(threshold: float | torch.Tensor, impl: str) -> None:
    cams = torch.tensor([0.0, 0.3, 1.0], device=DEVICE).view(1, 1, 1, 3)
    xi = threshold.to(DEVICE) if isinstance(threshold, torch.Tensor) else threshold
    logits = torch.randn(1, 2, 1, 3, device=DEVICE)
    for options in ({}, {"lambda_alpha": 0.99999999}, {"lambda_beta": 100.0}):
        assert not cam_pseudo_labels(cams, xi, impl=impl, **options)[1].isnan().any()
        assert raw_cross_entropy(logits, cams, xi, impl=impl, **options).isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_shows(impl: str) -> None:
    cams = torch.rand(1, 3, 4, 4, device=DEVICE)
    cams[0, 1, 2, 2] = float("nan")
    assert cam_pseudo_labels(cams, 0.5, size=(4, 4), impl=impl)[1][0, 2, 2].isnan()
    assert cam_pseudo_labels(cams, 0.5, size=(8, 8), impl=impl)[1][0, 4, 4].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_operator_is_registered_as_torch_expects(impl: str) -> None:
    cams, xi = random_cams((3, 3), 4), torch.tensor(0.4, device=DEVICE)
    for classes in (None, torch.tensor([[0, 3, 8, -1], [1, -1, -1, -1]], device=DEVICE)):
        options = ([8, 8], None, 0.8, 1.0, 255, True, impl)
        torch.library.opcheck(module._operator, ([cams, cams], [xi, xi], classes, 9, *options))


PRESENT = {
    # classes, those of each image
    "gaps and padding": (20, [[0, 3, 19], [7]]),
    "nothing to pad": (20, [[4, 5], [0, 19]]),
    "an image without any class": (20, [[2, 11], []]),
    "no class at all": (20, [[], []]),
    "C = 80": (80, [[1, 2, 40, 78, 79], [63, 64]]),
    "every class": (3, [[0, 1, 2], [0, 1, 2]]),
}


def compact(classes: int, present: list[list[int]], low: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """(2, C, *low) CAMs, many of them equal; the (2, P, *low) of the present classes; (2, P) these classes."""
    most = max(1, *(len(known) for known in present))
    full, few = torch.zeros(2, classes, *low), torch.zeros(2, most, *low)
    listed = torch.full((2, most), -1)
    generator = torch.Generator().manual_seed(0)
    for image, known in enumerate(present):
        # Eighths: whole maps of ties, confidences at the threshold, pixels where all maps are 0.
        maps = torch.randint(0, 9, (len(known), *low), generator=generator) / 8
        full[image, known], few[image, : len(known)] = maps, maps
        listed[image, : len(known)] = torch.tensor(known, dtype=torch.int64)
    return full.to(DEVICE), few.to(DEVICE), listed.to(DEVICE)


@pytest.mark.parametrize(
    ("high", "dtype"),
    [((37, 45), torch.float32), ((37, 45), torch.bfloat16), ((5, 4), torch.float16), ((3, 2), torch.float32)],
    ids=["larger", "larger, bfloat16", "same size, float16", "smaller"],
)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("classes", "present"), PRESENT.values(), ids=PRESENT)
def test_present_classes_alone_give_the_same_bits(
    classes: int, present: list, impl: str, high: tuple, dtype: torch.dtype
) -> None:
    full, few, listed = compact(classes, present, (5, 4))
    box = torch.tensor([[0, 4, 1, 45], [0, 37, 0, 3]], device=DEVICE)
    for options in ({}, {"valid_box": box, "ignore_index": 99, "lambda_beta": 2.0}):
        expected = cam_pseudo_labels(full.to(dtype), 0.5, size=high, impl=impl, **options)
        got = cam_pseudo_labels(few.to(dtype), 0.5, classes=listed, size=high, impl=impl, **options)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize(("classes", "present"), PRESENT.values(), ids=PRESENT)
def test_present_classes_alone_in_the_reference_and_in_raw(classes: int, present: list) -> None:
    """At the CAMs' own size: elsewhere F.interpolate rounds a map by how many others there are."""
    full, few, listed = compact(classes, present, (5, 4))
    expected = reference.cam_pseudo_labels(full, 0.5)
    got = reference.cam_pseudo_labels(few, 0.5, classes=listed)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    logits = torch.randn(2, classes + 1, 1, 1, device=DEVICE)
    for impl in (*IMPLS, "reference"):
        whole = raw_cross_entropy(logits, [full, full**2], [0.5, 0.3], impl=impl)
        assert torch.equal(raw_cross_entropy(logits, [few, few**2], [0.5, 0.3], classes=listed.int(), impl=impl), whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_of_a_present_class_shows(impl: str) -> None:
    cams = torch.full((1, 2, 4, 4), float("nan"), device=DEVICE)
    cams[:, 1] = 0.0
    classes = torch.tensor([[6, -1]], device=DEVICE)
    for size in ((4, 4), (8, 8)):
        assert cam_pseudo_labels(cams, 0.5, classes=classes, size=size, impl=impl)[1].isnan().all()


class TestRaw:
    """raw_cross_entropy."""

    @pytest.mark.parametrize(
        ("impl", "dtype"),
        [
            ("torch", torch.float64),
            *((impl, dtype) for impl in IMPLS for dtype in (torch.float32, torch.bfloat16)),
        ],
    )
    def test_three_way(self, impl: str, dtype: torch.dtype) -> None:
        """The CAMs stay float64: a label at the threshold would flip with their rounding, which is not the loss's."""
        logits = 3 * torch.randn(2, 7, 3, 4, generator=torch.Generator().manual_seed(1))
        cams = random_cams((3, 4), 6).double()
        box = torch.tensor([[0, 48, 5, 64], [7, 30, 0, 64]], device=DEVICE)
        options = {"size": (48, 64), "valid_box": box, "lambda_beta": 1.5}
        ours = functools.partial(_raw, cams=cams, options=options)
        truth = functools.partial(reference.raw_cross_entropy, cams=cams, threshold=0.4, **options)
        # r has the slope r^2 / d: see test_labels_and_perplexity.
        compare(
            ours, truth, logits, dtype, impl, rounding={torch.float64: 1e-12, torch.bfloat16: 1.6e-2}.get(dtype, 2e-5)
        )

    @pytest.mark.parametrize("impl", [*IMPLS, "reference"])
    def test_two_kinds_of_cams_in_one_pass(self, impl: str) -> None:
        logits = torch.randn(2, 7, 3, 4, device=DEVICE)
        main, auxiliary = random_cams((3, 4), 6), random_cams((3, 4), 6, seed=5)
        box = torch.tensor([[0, 20, 0, 20], [0, 20, 0, 20]], device=DEVICE)
        options = {"size": (24, 32), "valid_box": box, "impl": impl}
        together = raw_cross_entropy(logits, [main, auxiliary], [0.4, torch.tensor(0.6, device=DEVICE)], **options)
        apart = raw_cross_entropy(logits, main, 0.4, **options) + raw_cross_entropy(logits, auxiliary, 0.6, **options)
        assert float(together) == pytest.approx(float(apart), rel=1e-5)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_nothing_valid(self, impl: str) -> None:
        logits = torch.randn(1, 3, 2, 2, device=DEVICE).requires_grad_()
        box = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
        loss = raw_cross_entropy(logits, torch.rand(1, 2, 2, 2, device=DEVICE), 0.5, valid_box=box, impl=impl)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert not logits.grad.any()  # type: ignore[union-attr]

    def test_cams_get_no_gradient(self) -> None:
        cams = torch.rand(1, 2, 2, 2, device=DEVICE).requires_grad_()
        logits = torch.randn(1, 3, 2, 2, device=DEVICE).requires_grad_()
        raw_cross_entropy(logits, cams, 0.5).backward()
        assert cams.grad is None

    @pytest.mark.parametrize("impl", IMPLS)
    def test_compiles_without_graph_breaks(self, impl: str) -> None:
        torch._dynamo.reset()
        function = functools.partial(raw_cross_entropy, size=(16, 16), impl=impl)
        logits, cams = torch.randn(2, 5, 3, 3, device=DEVICE), random_cams((3, 3), 4)
        xi = torch.tensor(0.4, device=DEVICE)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(logits, cams, xi), function(logits, cams, xi))
        few, classes = cams[:, ::3], torch.tensor([[0, 3], [3, -1]], device=DEVICE)
        assert torch.equal(compiled(logits, few, xi, classes=classes), function(logits, few, xi, classes=classes))

    def test_mixed_precision_logits_and_float32_cams(self) -> None:
        logits, cams = torch.randn(2, 5, 3, 3, device=DEVICE), random_cams((3, 3), 4)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            mixed = raw_cross_entropy(logits.bfloat16(), cams, 0.4, size=(24, 24))
        plain = raw_cross_entropy(logits.bfloat16().float(), cams, 0.4, size=(24, 24), impl="reference")
        assert float(mixed) == pytest.approx(float(plain), rel=1e-4)


def _raw(logits: torch.Tensor, cams: torch.Tensor, options: dict, impl: str) -> torch.Tensor:
    return raw_cross_entropy(logits, cams if impl == "torch" else cams.float(), 0.4, impl=impl, **options)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cams": torch.zeros(2, 4, 4)}, r"\(B, C, h, w\)"),
        ({"cams": torch.zeros(0, 2, 4, 4)}, "no empty dimension"),
        ({"size": 8}, "size must be"),
        ({"cams": torch.zeros(1, 255, 1, 1)}, "leave room for 254"),
        ({"threshold": 0.0}, "threshold must lie strictly between 0 and 1"),
        ({"threshold": torch.tensor([0.5])}, "0-d tensor"),
        ({"lambda_alpha": 1.0}, "lambda_alpha must lie strictly between"),
        ({"lambda_beta": 0.0}, "lambda_beta must be > 0"),
        ({"size": (0, 4)}, "size must be"),
        ({"valid_box": torch.zeros(1, 3, dtype=torch.int64)}, "y0, y1, x0, x1"),
        ({"valid_box": torch.zeros(1, 4)}, "integer"),
        ({"valid_box": [[0, 4, 0, 4]]}, "valid_box must be a torch.Tensor, got list"),
        ({"ignore_index": 256}, "fit uint8"),
        ({"classes": [[0, 1]]}, "classes must be a torch.Tensor, got list"),
        ({"classes": torch.zeros(1, 3).long()}, r"classes must be an integer \(1, 2\) tensor, the class of each map"),
        ({"classes": torch.zeros(1, 2)}, r"classes must be an integer .* got torch.float32"),
        ({"classes": torch.tensor([[1, 254]])}, "classes holds 254; there can be the classes 0 to 253, and -1"),
        ({"classes": torch.tensor([[-2, 3]])}, "classes holds -2"),
        ({"impl": "fast"}, "impl must be one of"),
    ],
)
def test_errors(kwargs: dict, message: str) -> None:
    arguments = {"cams": torch.zeros(1, 2, 4, 4), "threshold": 0.5, **kwargs}
    with pytest.raises(ValueError, match=message):
        cam_pseudo_labels(**arguments)


def test_raw_errors() -> None:
    logits, cams = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, 2)
    with pytest.raises(ValueError, match=r"logits must be \(B, C \+ 1, h, w\)"):
        raw_cross_entropy(logits, torch.zeros(1, 3, 2, 2), 0.5)
    with pytest.raises(ValueError, match="one threshold for each: got 2 and 1"):
        raw_cross_entropy(logits, [cams, cams], [0.5])
    with pytest.raises(ValueError, match="one shape and dtype"):
        raw_cross_entropy(logits, [cams, cams.half()], 0.5)
    with pytest.raises(ValueError, match="at least one tensor of cams"):
        raw_cross_entropy(logits, [], [])
    with pytest.raises(ValueError, match="classes holds 2; there can be the classes 0 to 1, and -1"):
        raw_cross_entropy(logits, cams, 0.5, classes=torch.tensor([[2, -1]]))
    with pytest.raises(ValueError, match=r"logits must be \(B, C \+ 1, h, w\)"):
        raw_cross_entropy(logits, torch.zeros(2, 1, 2, 2), 0.5, classes=torch.zeros(2, 1).long())


def test_nan_under_the_debug_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSA_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="cams holds NaN"):
        cam_pseudo_labels(torch.full((1, 2, 2, 2), float("nan")), 0.5)


def test_values_out_of_range_under_the_debug_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    cams = torch.rand(1, 2, 2, 2)
    cam_pseudo_labels(255 * cams, 0.5)  # looking would mean waiting, on a GPU
    monkeypatch.setenv("COSA_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"cams holds values from .* must lie between"):
        cam_pseudo_labels(255 * cams, 0.5)
    with pytest.raises(ValueError, match="threshold holds values from 7 to 7"):
        cam_pseudo_labels(cams, torch.tensor(7.0))
