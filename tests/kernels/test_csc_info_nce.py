"""`csc_info_nce`: plain torch (by class, and with masks as on devices), and Triton (interpreted without a GPU)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from cosa_kernels import reference
from cosa_kernels.ops import csc_info_nce as module
from cosa_kernels.ops.csc_info_nce import csc_info_nce
from three_way import DEVICE, LargestTensor, compare
from torch import Tensor

IMPLS = ["torch", "masked", "triton"]

# classes, (h, w), scope, similarity, temperature
GRID = [
    (1, (5, 4), "image", "dot", 0.5),  # one class: scalars
    (20, (5, 4), "image", "cosine", 0.5),  # fewer positions than a tile
    (20, (10, 10), "batch", "cosine", 0.01),  # several tiles; the lowest temperature in use
    (20, (9, 8), "image", "dot", 0.5),
    (80, (9, 8), "image", "cosine", 0.5),  # vectors in several chunks
    (80, (3, 7), "batch", "dot", 0.01),  # scores in the hundreds
    (150, (7, 5), "batch", "cosine", 0.5),  # their sums in several programs
    (150, (5, 4), "image", "dot", 0.01),
]


@pytest.fixture
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The `impl` to pass; "masked" is plain torch as it runs on devices."""
    if request.param != "masked":
        return request.param
    monkeypatch.setattr(module, "_by_class", module._masked)
    return "torch"


every_impl = pytest.mark.parametrize("impl", IMPLS, indirect=True)


def inputs(classes: int, size: tuple[int, int], batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """CAM vectors of length about 1, up to four labels, and about two thirds of the positions as anchors."""
    g = torch.Generator().manual_seed(seed)
    cams = (torch.randn(batch, classes, *size, generator=g) + 0.5) / math.sqrt(classes)
    labels = torch.randint(0, min(4, classes + 1), (batch, *size), generator=g).to(torch.uint8)
    perplexity = 1.5 * torch.rand(batch, *size, generator=g)
    return cams.to(DEVICE), labels.to(DEVICE), perplexity.to(DEVICE)


def value_and_gradient(function: Callable[..., Tensor], cams: Tensor, *args: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    leaf = cams.detach().clone().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def row(labels: list[int], perplexity: list[float] | float = 0.5) -> tuple[Tensor, Tensor]:
    """Labels and perplexities of one image of one row."""
    values = perplexity if isinstance(perplexity, list) else [perplexity] * len(labels)
    return torch.tensor([[labels]], device=DEVICE), torch.tensor([[values]], device=DEVICE)


class TestThreeWay:
    @pytest.mark.parametrize("impl", ["torch", "masked"], indirect=True)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("temperature", [0.01, 0.5])
    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    @pytest.mark.parametrize("scope", ["image", "batch"])
    @pytest.mark.parametrize(("classes", "size"), [(20, (10, 10)), (80, (3, 7)), (150, (10, 10))])
    def test_torch(
        self, classes: int, size: tuple[int, int], scope: str, similarity: str, temperature: float, dtype, impl: str
    ) -> None:
        self.check((classes, size, scope, similarity, temperature), dtype, impl)

    @pytest.mark.parametrize("case", GRID, ids=str)
    def test_triton(self, case: tuple) -> None:
        self.check(case, torch.float32, "triton")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("case", [GRID[0], GRID[1], GRID[5], GRID[7]], ids=str)
    def test_triton_half(self, case: tuple, dtype: torch.dtype) -> None:
        self.check(case, dtype, "triton")

    @staticmethod
    def check(case: tuple, dtype: torch.dtype, impl: str) -> None:
        classes, size, scope, similarity, temperature = case
        cams, labels, perplexity = inputs(classes, size)
        arguments = {
            "labels": labels,
            "perplexity": perplexity,
            "temperature": temperature,
            "similarity": similarity,
            "scope": scope,
        }
        compare(
            functools.partial(csc_info_nce, **arguments),
            functools.partial(reference.csc_info_nce, **arguments),
            cams,
            dtype,
            impl,
        )


class TestByHand:
    @every_impl
    def test_of_one_class_a_cosine_is_constant(self, impl: str) -> None:
        cams = torch.tensor([[[[4.0, 3.0, 2.0, 0.1]]]], device=DEVICE)
        labels, perplexity = row([1, 1, 0, 0])
        loss, gradient = value_and_gradient(csc_info_nce, cams, labels, perplexity, temperature=0.01, impl=impl)
        assert loss.item() == pytest.approx(math.log(1 + 2), rel=1e-5)
        assert gradient.abs().max() < 1e-4  # of a derivative by the cosine of 100

    @every_impl
    def test_two_pairs_at_right_angles(self, impl: str) -> None:
        cams = torch.tensor([[[[2.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 3.0, 1.0]]]], device=DEVICE)
        loss = csc_info_nce(cams, *row([1, 1, 2, 2]), temperature=0.5, impl=impl)
        # Each anchor: one positive of cosine 1, two negatives of cosine 0.
        assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-6)

    @every_impl
    def test_anchors_that_lack_something_still_count(self, impl: str) -> None:
        # Position 2 is alone with its label; position 3 is no anchor.
        cams = torch.tensor([[[[1.0, 3.0, 2.0, 5.0]]]], device=DEVICE)
        labels, perplexity = row([1, 1, 0, 0], [0.5, 1.0, 0.0, 1.01])
        loss, gradient = value_and_gradient(
            csc_info_nce, cams, labels, perplexity, temperature=2.0, similarity="dot", impl=impl
        )
        # Scores: s01 = 1.5, s02 = 1, s12 = 3; the two terms are softplus(s_negative - s_positive).
        p0, p1 = 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-1.5))
        assert loss.item() == pytest.approx((math.log1p(math.exp(-0.5)) + math.log1p(math.exp(1.5))) / 3, rel=1e-6)
        # d/dx0 = [p0 (x2 - x1) - p1 x1] / (2 * 3), and so on.
        expected = [p0 * (2 - 3) - p1 * 3, -p0 * 1 + p1 * (2 - 1), p0 * 1 + p1 * 3, 0.0]
        assert gradient.flatten().tolist() == pytest.approx([value / 6 for value in expected], rel=1e-5)

    @every_impl
    def test_omega_counts_the_whole_batch(self, impl: str) -> None:
        cams, labels, perplexity = inputs(5, (4, 4))
        perplexity[1] = 9.0
        anchors = (perplexity <= 1).sum()
        one, gradient_one = value_and_gradient(csc_info_nce, cams[:1], labels[:1], perplexity[:1], impl=impl)
        both, gradient = value_and_gradient(csc_info_nce, cams, labels, perplexity, impl=impl)
        torch.testing.assert_close(both, one)  # no anchor in the second image
        torch.testing.assert_close(gradient[:1], gradient_one)
        assert not gradient[1].any()
        labels[1], perplexity[1] = 0, 0.5
        more, _ = value_and_gradient(csc_info_nce, cams, labels, perplexity, impl=impl)
        torch.testing.assert_close(more, one * anchors / (anchors + 16))  # 16 anchors without any negative


class TestDegenerate:
    @every_impl
    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    @pytest.mark.parametrize(
        ("labels", "perplexity"),
        [
            ([2] * 9, 0.5),  # no negative
            ([*range(9)], 0.5),  # no positive
            ([0, 1, 2] * 3, 9.0),  # no anchor
            ([255] * 9, math.inf),  # nothing valid
            ([0, 1, 2] * 3, math.nan),
            ([0, 0, 1, 1, 2, 2, 3, 3, 3], [0.5, *[math.inf] * 8]),  # a single anchor
        ],
    )
    def test_zero_and_no_gradient(self, labels, perplexity, similarity: str, impl: str) -> None:
        cams = torch.randn(1, 9, 1, 9, device=DEVICE)
        loss, gradient = value_and_gradient(
            csc_info_nce, cams, *row(labels, perplexity), temperature=0.01, similarity=similarity, impl=impl
        )
        assert loss.item() == 0.0
        assert not gradient.any()

    @every_impl
    def test_zero_vectors(self, impl: str) -> None:
        cams, labels, perplexity = inputs(4, (5, 5))
        cams[..., 0] = 0.0
        truth = value_and_gradient(reference.csc_info_nce, cams.double(), labels, perplexity, temperature=0.5)
        for got, wanted in zip(
            value_and_gradient(csc_info_nce, cams, labels, perplexity, impl=impl), truth, strict=True
        ):
            torch.testing.assert_close(got, wanted.to(got.dtype), rtol=1e-4, atol=1e-6)

    @every_impl
    def test_scores_of_ten_thousand(self, impl: str) -> None:
        cams, labels, perplexity = inputs(8, (5, 5))
        options = {"temperature": 0.01, "similarity": "dot"}
        loss, gradient = value_and_gradient(csc_info_nce, 10 * cams, labels, perplexity, impl=impl, **options)
        truth, _ = value_and_gradient(reference.csc_info_nce, 10 * cams.double(), labels, perplexity, **options)
        assert truth > 1e3
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
        assert gradient.isfinite().all()

    @every_impl
    @pytest.mark.parametrize("position", ["anchor", "not an anchor"])
    def test_nan_spreads_from_anchors_only(self, position: str, impl: str) -> None:
        cams, labels, perplexity = inputs(4, (3, 3), batch=1)
        perplexity[:] = 0.5
        without = perplexity.clone()
        without[:, :, 2] = 9.0
        clean, _ = value_and_gradient(csc_info_nce, cams, labels, without)
        cams[:, :, 1, 2] = math.nan
        if position != "anchor":
            perplexity = without
        loss, gradient = value_and_gradient(csc_info_nce, cams, labels, perplexity, impl=impl)
        if position == "anchor":
            assert loss.isnan()
        else:
            torch.testing.assert_close(loss, clean)
            assert gradient[:, :, :, :2].isfinite().all()

    @every_impl
    @pytest.mark.parametrize("side", [1, 2])
    def test_few_positions(self, side: int, impl: str) -> None:
        cams, _, _ = inputs(3, (side, side), batch=1)
        labels = torch.arange(side * side, device=DEVICE).view(1, side, side) % 2
        perplexity = torch.zeros(1, side, side, device=DEVICE)
        got = value_and_gradient(csc_info_nce, cams, labels, perplexity, impl=impl)
        wanted = value_and_gradient(reference.csc_info_nce, cams, labels, perplexity)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "limits",
    [
        {"SCORES": {"cpu": 64, "cuda": 64}},  # many chunks
        {"SCORES": {"cpu": 64, "cuda": 64}, "KEPT_SCORES": 100},  # of which the first few are kept
        {"SCORES": {"cpu": 1, "cuda": 1}, "KEPT_SCORES": 0},  # one row at a time
        {"SMALL_SCORE": 0.0},  # with the maximum taken out
        {"SMALL_SCORE": 0.0, "SCORES": {"cpu": 64, "cuda": 64}, "KEPT_SCORES": 100},
    ],
)
@pytest.mark.parametrize("impl", ["torch", "masked"], indirect=True)
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_the_limits_of_plain_torch_change_nothing(
    limits: dict, scope: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cams, labels, perplexity = inputs(6, (7, 5))
    wanted = value_and_gradient(reference.csc_info_nce, cams.double(), labels, perplexity, scope=scope)
    for name, value in limits.items():
        monkeypatch.setattr(module, name, value)
    got = value_and_gradient(csc_info_nce, cams.double(), labels, perplexity, scope=scope, impl=impl)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@every_impl
def test_the_order_of_positions_does_not_matter(impl: str) -> None:
    cams, labels, perplexity = inputs(5, (6, 6))
    loss, gradient = value_and_gradient(csc_info_nce, cams, labels, perplexity, impl=impl)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    shuffled = [maps.flatten(-2)[..., order].view(maps.shape) for maps in (cams, labels, perplexity)]
    loss_shuffled, gradient_shuffled = value_and_gradient(csc_info_nce, *shuffled, impl=impl)
    torch.testing.assert_close(loss_shuffled, loss)
    torch.testing.assert_close(gradient_shuffled.flatten(2), gradient.flatten(2)[..., order], rtol=1e-4, atol=1e-7)


@every_impl
def test_the_same_bits_from_run_to_run(impl: str) -> None:
    arguments = inputs(20, (6, 6))
    first, second = (value_and_gradient(csc_info_nce, *arguments, impl=impl) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@every_impl
def test_layouts_and_types_of_the_arguments(impl: str) -> None:
    cams, labels, perplexity = inputs(5, (6, 4))
    wanted = value_and_gradient(csc_info_nce, cams, labels, perplexity, impl=impl)
    other = cams.to(memory_format=torch.channels_last), labels.long().mT.contiguous().mT, perplexity.double()
    got = value_and_gradient(csc_info_nce, *other, impl=impl)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_gradcheck(similarity: str, scope: str) -> None:
    cams, labels, perplexity = inputs(3, (2, 3))
    function = functools.partial(
        csc_info_nce, labels=labels, perplexity=perplexity, temperature=0.3, similarity=similarity, scope=scope
    )
    assert torch.autograd.gradcheck(function, cams.double().requires_grad_())


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator(dtype: torch.dtype, impl: str) -> None:
    cams, labels, perplexity = inputs(3, (2, 3))
    leaf = cams.flatten(2).to(dtype).requires_grad_()
    for vectors in (leaf, leaf.detach()):
        arguments = (labels.flatten(1), (perplexity <= 1).flatten(1), 0.5, True, vectors.requires_grad, impl)
        torch.library.opcheck(torch.ops.cosa.csc_info_nce.default, (vectors, *arguments))


@every_impl
def test_compiles_without_a_graph_break(impl: str) -> None:
    function = functools.partial(csc_info_nce, impl=impl)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((3, 4), (5, 5)):
        arguments = inputs(4, size)
        torch.testing.assert_close(
            value_and_gradient(compiled, *arguments, scope="batch"),
            value_and_gradient(function, *arguments, scope="batch"),
        )
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


@every_impl
def test_autocast_changes_nothing(impl: str) -> None:
    arguments = inputs(20, (5, 4))
    wanted = value_and_gradient(csc_info_nce, *arguments, temperature=0.01, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = value_and_gradient(csc_info_nce, *arguments, temperature=0.01, impl=impl)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@every_impl
def test_half_precision_gradients_are_scaled_before_they_are_rounded(impl: str) -> None:
    cams, labels, perplexity = inputs(8, (6, 6))
    leaf = (cams * 50).half().requires_grad_()  # long vectors, small gradients
    loss = csc_info_nce(leaf, labels, perplexity, impl=impl)
    assert loss.dtype == torch.float32
    (scaled,) = torch.autograd.grad(loss * 2.0**12, leaf)
    _, truth = value_and_gradient(reference.csc_info_nce, leaf.double(), labels, perplexity)
    assert scaled.dtype == torch.float16
    torch.testing.assert_close(scaled.double(), truth * 2.0**12, rtol=2e-3, atol=1e-3)


def test_without_gradient() -> None:
    arguments = inputs(4, (3, 3))
    assert not csc_info_nce(*arguments).requires_grad
    leaf = arguments[0].clone().requires_grad_()
    with torch.no_grad():
        loss = csc_info_nce(leaf, *arguments[1:])
    assert not loss.requires_grad
    torch.testing.assert_close(loss, csc_info_nce(leaf, *arguments[1:]).detach())


@pytest.mark.parametrize(("function", "positions"), [("_by_class", 2_000), ("_by_class", 10_000), ("_masked", 2_000)])
def test_memory_grows_with_the_positions_not_with_their_square(function: str, positions: int) -> None:
    x = torch.randn(1, 3, positions)
    labels = torch.arange(positions)[None] % 3
    with LargestTensor() as largest:  # below the operator, whose inside a mode does not see
        getattr(module, function)(x, labels, 0.5, True)
    assert x.numel() <= largest.elements <= max(module.SCORES["cpu"], x.numel())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nothing_waits_for_the_device(impl: str) -> None:
    arguments = inputs(20, (10, 10))
    value_and_gradient(csc_info_nce, *arguments, impl=impl)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(csc_info_nce, *arguments, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_impl_reference_is_the_reference() -> None:
    cams, labels, perplexity = inputs(4, (4, 4))
    options = {"epsilon": 1.2, "temperature": 0.2, "similarity": "dot", "scope": "batch"}
    wanted = reference.csc_info_nce(cams, labels, perplexity, **options)
    assert torch.equal(csc_info_nce(cams, labels, perplexity, impl="reference", **options), wanted)
    for impl in ("torch", "triton"):
        torch.testing.assert_close(csc_info_nce(cams, labels, perplexity, impl=impl, **options), wanted)
