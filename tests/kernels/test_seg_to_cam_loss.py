"""Segmentation pseudo-labels and the Seg2CAM loss: the sampled form against the full resolution's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cosa_kernels import reference
from cosa_kernels.ops import seg_to_cam_loss as module
from cosa_kernels.ops.seg_to_cam_loss import _operator, _probabilities, seg_pseudo_labels, seg_to_cam_loss
from three_way import DEVICE, ROUNDING, LargestTensor, compare, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Size = tuple[int, int]


class Launches(TorchDispatchMode):
    """Names of the functions that made tensors on "meta", views aside: each a kernel on a GPU, or a copy to it."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_meta and not func.is_view:
            self.functions.append(str(func))
        return out


@dataclass(frozen=True)
class Case:
    views: tuple[Size, ...]
    size: Size | None
    grid: Size | None
    classes: int = 3
    present: str = "some"  # "some": two per image, none in the last; "all"; "none"


CASES = {
    "the training's three scales, mirrored": Case(((4, 4), (2, 2), (6, 6)) * 2, (64, 64), (4, 4)),
    "20 classes": Case(((4, 4), (2, 2), (6, 6)), (64, 64), (4, 4), classes=20),
    "80 classes": Case(((4, 4), (2, 2), (6, 6)), (64, 64), (4, 4), classes=80),
    "one class": Case(((4, 4),), (64, 64), (4, 4), classes=1),
    "odd sizes, ratios that are not whole": Case(((5, 3), (7, 4)), (37, 45), (6, 7)),
    "one of full resolution": Case(((32, 48),), None, (2, 3)),
    "several of full resolution": Case(((32, 33), (32, 33)), None, (5, 3)),
    "full resolution beside others": Case(((33, 32), (4, 4)), (33, 32), (4, 5)),
    "views larger than the size": Case(((40, 37), (9, 50)), (31, 30), (3, 4)),
    "one position": Case(((1, 1), (1, 3), (4, 1)), (20, 20), (1, 1)),
    "one pixel": Case(((2, 3),), (1, 1), (1, 1)),
    "a grid of exactly half the size": Case(((4, 4),), (16, 16), (8, 8)),
    "a grid of just under half the size": Case(((4, 4),), (17, 17), (8, 8)),
    "coarse along one axis only": Case(((4, 4),), (40, 12), (4, 11)),
    "a grid finer than the size": Case(((4, 4),), (6, 8), (13, 9)),
    "no resizing after the softmax": Case(((4, 4), (2, 3)), (11, 9), None),
    "full resolution beside others, not resized": Case(((11, 9), (4, 4)), (11, 9), None),
    "no resizing at all": Case(((5, 6),), None, None),
    "all present": Case(((4, 4), (3, 3)), (32, 32), (4, 4), present="all"),
    "nobody present": Case(((4, 4),), (32, 32), (4, 4), present="none"),
}


def inputs(case: Case, dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(case.classes)
    shapes = [(batch, case.classes + 1, *view) for view in case.views]
    present = torch.full((batch, case.classes), float(case.present == "all"))
    if case.present == "some":
        for image in range(batch - 1):
            present[image, torch.randperm(case.classes, generator=generator)[:2]] = 1.0
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes], present.to(DEVICE)


def full_resolution(views: list[Tensor], present: Tensor, temperature: float, case: Case) -> Tensor:
    """As one would write it: logits of all classes at full resolution, softmax, resized."""

    def resize(maps: Tensor, size: Size) -> Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    size = case.size or case.views[0]
    total = torch.stack([resize(view, size) for view in views]).sum(dim=0)
    present = torch.cat([torch.ones_like(present[:, :1]), present], dim=1)
    total = total.masked_fill(present[..., None, None] == 0, float("-inf"))
    return resize((total / temperature).softmax(dim=1), case.grid or size)


@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_full_resolution(name: str, temperature: float) -> None:
    case = CASES[name]
    views, present = inputs(case, torch.float64)
    expected = full_resolution(views, present, temperature, case)
    for impl in ("auto", "torch", "triton", "reference"):
        got = seg_pseudo_labels(views, present, temperature=temperature, size=case.size, grid=case.grid, impl=impl)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        assert not got[:, 1:][present == 0].any()
        torch.testing.assert_close(got.sum(dim=1), torch.ones_like(got[:, 0]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_the_reference(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    views, present = inputs(case, dtype)
    for temperature in (0.5, 0.01):
        options: dict[str, Any] = {"temperature": temperature, "size": case.size, "grid": case.grid}
        got = seg_pseudo_labels(views, present, **options)
        truth = reference.seg_pseudo_labels([view.double() for view in views], present, **options)
        plain = reference.seg_pseudo_labels(views, present, **options)
        assert got.dtype == torch.float32
        # From bfloat16 inputs too: they are widened first. A temperature magnifies the rounding of the logits.
        allowed = relative_error(plain, truth) + ROUNDING[torch.float32] / temperature
        assert relative_error(got, truth) <= allowed


@pytest.mark.parametrize("name", CASES)
def test_the_form_for_other_devices_is_the_same(name: str) -> None:
    """Away from the CPU absent classes are masked, not left out. Run here all the same."""
    case = CASES[name]
    views, present = inputs(case, torch.float64)
    size = case.size or case.views[0]
    absent = F.pad(present == 0, (1, 0), value=False)
    expected = full_resolution(views, present, 0.1, case)
    got = _probabilities(views, absent, 0.1, size, case.grid or size)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    # And the inputs are still what they were.
    assert torch.equal(full_resolution(views, present, 0.1, case), expected)


def test_other_devices_are_not_waited_for() -> None:
    # Tensors on "meta" have no values: whatever reads one on the host, raises.
    views = [torch.empty(2, 4, side, side, device="meta") for side in (4, 2, 4)]
    absent = torch.zeros(2, 4, dtype=torch.bool, device="meta")
    for _ in range(2):
        with Launches() as launches:
            got = _probabilities(views, absent, 0.01, (64, 64), (4, 4))
    assert got.shape == (2, 4, 4, 4)
    # Two sizes, each mixed along two axes by two selections and a lerp; so are the probabilities.
    assert launches.functions.count("aten._to_copy.default") == 1  # all positions and shares
    assert len(launches.functions) == 1 + 1 + 2 * 6 + 1 + 3 + 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_tables_for_other_devices_survive_the_packing(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    size = case.size or case.views[0]
    arguments = (tuple(dict.fromkeys(case.views)), size, case.grid or size, dtype)
    tables = module._tables(*arguments)
    if not any(tables):  # none is sent then
        return
    for table, got in zip(tables, module._unpacked(module._packed(*arguments, False), tables), strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(table, got, strict=True))


def test_nothing_of_full_resolution_is_made() -> None:
    side, classes = 448, 20
    views = [torch.zeros(2, classes + 1, low, low) for low in (28, 14, 42)] * 2
    present = torch.ones(2, classes)
    at_most = 2 * (classes + 1) * 56 * 56
    full = 2 * (classes + 1) * side * side
    # The operator's function itself: a mode does not look into operators.
    with LargestTensor() as largest:
        _operator._init_fn(views, present, 0.01, [side, side], [28, 28])
    assert 0 < largest.elements <= at_most / 2  # image by image
    with LargestTensor() as largest:
        _probabilities(views, F.pad(present == 0, (1, 0), value=False), 0.01, (side, side), (28, 28))
    assert 0 < largest.elements <= at_most < full / 50
    with LargestTensor() as largest:
        reference.seg_pseudo_labels(views, present, size=(side, side))
    assert largest.elements >= full  # the measure is able to see it


def test_a_tensor_is_a_sequence_of_one() -> None:
    views, present = inputs(CASES["one of full resolution"])
    one, many = (seg_pseudo_labels(seg, present, grid=(2, 3)) for seg in (views[0], views))
    assert torch.equal(one, many)


def test_minus_infinity_stays_where_nothing_is_interpolated() -> None:
    seg = torch.zeros(1, 2, 8, 8, device=DEVICE)
    seg[:, 1, :4] = float("-inf")
    present = torch.ones(1, 1, device=DEVICE)
    expected = torch.tensor([0.0, 0.0, 0.5, 0.5], device=DEVICE)
    got = seg_pseudo_labels(seg, present, grid=(4, 1))[0, 1, :, 0]
    torch.testing.assert_close(got, expected)


def test_inputs_stay_as_they_are() -> None:
    for name in CASES:
        views, present = inputs(CASES[name])
        before = [view.clone() for view in views]
        seg_pseudo_labels(views, present, size=CASES[name].size, grid=CASES[name].grid)
        assert all(torch.equal(a, b) for a, b in zip(views, before, strict=True))


LOSS_CASES = [name for name in CASES if CASES[name].grid is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSS_CASES)
def test_loss_is_as_exact_as_the_reference(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    assert case.grid is not None
    views, present = inputs(case, torch.float64)
    cams = 3 * torch.randn(2, case.classes, *case.grid, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"temperature": 0.1, "size": case.size}
    compare(
        lambda maps, impl: seg_to_cam_loss(maps, views, present, impl=impl, **options),
        lambda maps: reference.seg_to_cam_loss(maps, views, present, **options),
        cams,
        dtype,
        "torch",
    )


def test_loss_gradients() -> None:
    views, present = inputs(CASES["the training's three scales, mirrored"], torch.float64)
    views = [view.requires_grad_() for view in views]
    cams = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def loss(maps: Tensor) -> Tensor:
        return seg_to_cam_loss(maps, views, present, size=(64, 64))

    assert torch.autograd.gradcheck(loss, cams)
    assert torch.autograd.gradgradcheck(loss, cams)
    loss(cams).backward()
    assert cams.grad is not None
    assert cams.grad.any()
    assert all(view.grad is None for view in views)


def test_bit_identical_from_run_to_run() -> None:
    views, present = inputs(CASES["odd sizes, ratios that are not whole"])
    cams = torch.randn(2, 3, 6, 7, device=DEVICE, requires_grad=True)
    runs = []
    for _ in range(2):
        loss = seg_to_cam_loss(cams, views, present, size=(37, 45))
        runs.append((loss, *torch.autograd.grad(loss, cams)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_changes_nothing() -> None:
    views, present = inputs(CASES["odd sizes, ratios that are not whole"])
    cams = torch.randn(2, 3, 6, 7, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = seg_to_cam_loss(cams, views, present, size=(37, 45))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, seg_to_cam_loss(cams, views, present, size=(37, 45)))


@pytest.mark.parametrize("name", ["the training's three scales, mirrored", "no resizing at all"])
def test_operator(name: str) -> None:
    case = CASES[name]
    views, present = inputs(case)
    size = list(case.size or case.views[0])
    torch.library.opcheck(_operator, (views, present, 0.01, size, list(case.grid or size)))


def test_compiles_without_a_graph_break_for_any_size() -> None:
    def loss(cams: Tensor, views: list[Tensor], present: Tensor, size: Size) -> Tensor:
        return seg_to_cam_loss(2 * cams, views, present, size=size, temperature=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for name in ("odd sizes, ratios that are not whole", "20 classes", "coarse along one axis only"):
        case = CASES[name]
        assert case.grid is not None
        views, present = inputs(case)
        cams = torch.randn(2, case.classes, *case.grid, device=DEVICE, requires_grad=True)
        size = case.size or case.views[0]
        got, expected = (call(cams, views, present, size) for call in (compiled, loss))
        torch.testing.assert_close(got, expected)
        (gradient,), (truth,) = (torch.autograd.grad(value, cams) for value in (got, expected))
        torch.testing.assert_close(gradient, truth)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_runs_in_a_cuda_graph_and_never_waits() -> None:
    case = CASES["the training's three scales, mirrored"]
    views, present = inputs(case)

    def labels() -> Tensor:
        return seg_pseudo_labels(views, present, size=case.size, grid=case.grid)

    labels()  # makes the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = labels()
    for _ in range(3):
        views[0].copy_(torch.randn_like(views[0]))
        graph.replay()
        assert torch.equal(captured, labels())


CAMS = torch.rand(2, 3, 4, 4)
SEG = torch.rand(2, 4, 8, 8)
ONES = torch.ones(2, 3)
BAD_CALLS: dict[str, Callable[[], Tensor]] = {
    "temperature must be > 0, got 0": lambda: seg_to_cam_loss(CAMS, SEG, ONES, temperature=0),
    "temperature must be > 0, got -1": lambda: seg_pseudo_labels(SEG, ONES, temperature=-1.0),
    r"class_labels must be \(2, 3\), got \(2, 4\)": lambda: seg_to_cam_loss(CAMS, SEG, torch.ones(2, 4)),
    "seg_logits is empty": lambda: seg_pseudo_labels([], ONES),
    "seg_logits is empty: give": lambda: seg_to_cam_loss(CAMS, [], ONES),
    r"views of different sizes, \(8, 8\) and \(5, 8\): give size": lambda: seg_pseudo_labels(
        [SEG, SEG[:, :, :5]], ONES, grid=(4, 4)
    ),
    r"of different sizes, \(8, 8\) and \(8, 6\): give size": lambda: seg_to_cam_loss(CAMS, [SEG, SEG[..., :6]], ONES),
    r"seg_logits must be \(B, C \+ 1, h', w'\).*\(2, 3, 4, 4\) and \(2, 3, 4, 4\)": lambda: seg_to_cam_loss(
        CAMS, CAMS, ONES
    ),
    r"seg_logits\[0\] must be a floating .*torch.int64": lambda: seg_pseudo_labels(SEG.long(), ONES),
    r"all of seg_logits must have one batch.*\(2, 3, 8, 8\)": lambda: seg_pseudo_labels([SEG, SEG[:, :3]], ONES),
    r"cam_logits must be a floating \(B, C, h, w\)": lambda: seg_to_cam_loss(CAMS[0], SEG, ONES),
    r"size must be \(H, W\).*got \(0, 4\)": lambda: seg_pseudo_labels(SEG, ONES, size=(0, 4)),
    r"size must be \(H, W\).*got \(4, 0\)": lambda: seg_pseudo_labels(SEG, ONES, grid=(4, 0)),
    "class_labels is on meta and seg_logits on cpu": lambda: seg_pseudo_labels(SEG, ONES.to("meta")),
    "seg_logits is on meta and cam_logits on cpu": lambda: seg_to_cam_loss(CAMS, SEG.to("meta"), ONES),
    "impl must be one of auto, .* got 'cuda'": lambda: seg_to_cam_loss(CAMS, SEG, ONES, impl="cuda"),
    "impl must be one of auto, .* got 'fast'": lambda: seg_pseudo_labels(SEG, ONES, impl="fast"),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_impossible_arguments_say_what_is_wanted(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_debug_switch_finds_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSA_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="seg_logits holds NaN or infinity"):
        seg_pseudo_labels([SEG, SEG / 0], ONES)
