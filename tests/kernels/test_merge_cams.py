"""merge_cams: plain torch and kernel against the float64 reference, and what callers rely on besides the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cosa_kernels import reference
from cosa_kernels.ops.merge_cams import _operator, merge_cams
from three_way import DEVICE, ROUNDING, relative_error
from torch import Tensor

Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    views: Sizes
    size: tuple[int, int]
    classes: int = 3
    batch: int = 2
    flip: bool = True
    present: str = "some"  # "some": one to three per image, none in the last; "all"; "none"


CASES = {
    "the training's three scales": Case(((4, 4), (2, 2), (6, 6)), (32, 32)),
    "odd sizes, more than one tile of the kernel": Case(((5, 3), (7, 4)), (37, 45), batch=2),
    "no mirrored views": Case(((4, 4), (2, 3)), (16, 24), flip=False),
    "one scale": Case(((3, 5),), (17, 11)),
    "own size: nothing to interpolate": Case(((6, 7),), (6, 7)),
    "own size beside others": Case(((6, 7), (3, 3)), (6, 7)),
    "one axis up, one down": Case(((4, 20),), (9, 7)),
    "views larger than the result": Case(((16, 15), (9, 33)), (5, 4)),
    "views of one position": Case(((1, 1), (1, 3), (4, 1)), (6, 9)),
    "one pixel": Case(((3, 4), (1, 1)), (1, 1)),
    "one class": Case(((4, 4),), (8, 8), classes=1, batch=3),
    "all present": Case(((4, 3),), (9, 8), present="all"),
    "nobody present": Case(((4, 3),), (9, 8), present="none"),
    "20 classes": Case(((4, 4), (2, 2)), (16, 16), classes=20),
    "80 classes": Case(((4, 4), (2, 2)), (16, 16), classes=80, batch=3),
}


def inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(len(case.views) + case.classes)

    def views() -> list[Tensor]:
        shapes = [(case.batch, case.classes, *view) for view in case.views]
        return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]

    present = torch.full((case.batch, case.classes), float(case.present == "all"))
    if case.present == "some":
        for image in range(case.batch - 1):
            present[image, torch.randperm(case.classes, generator=generator)[: image + 2]] = 1.0
    return views(), views() if case.flip else [], present.to(DEVICE)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        ("torch", torch.float64),
        *((impl, dtype) for impl in ("torch", "triton") for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_the_reference(name: str, impl: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    cams, mirrored, present = inputs(case, dtype)
    got = merge_cams(cams, mirrored, class_labels=present, size=case.size, impl=impl)
    truth, plain = (
        reference.merge_cams(
            [view.to(wide) for view in cams],
            [view.to(wide) for view in mirrored],
            class_labels=present,
            size=case.size,
        )
        for wide in (torch.float64, dtype)
    )
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == (case.batch, case.classes, *case.size)
    # From bfloat16 inputs too: they are widened before anything is computed.
    allowed = relative_error(plain, truth) + ROUNDING[got.dtype]
    assert relative_error(got, truth) <= allowed
    assert not got[present == 0].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_hand_computed(impl: str) -> None:
    cams = torch.tensor([[[[-1.0, 2.0]], [[5.0, 6.0]]]], device=DEVICE)
    mirrored = torch.tensor([[[[1.0, 0.0]], [[0.0, 9.0]]]], device=DEVICE)
    more = torch.tensor([[[[-7.0, 2.0]], [[0.0, 0.0]]]], device=DEVICE)
    present = torch.tensor([[True, False]], device=DEVICE)
    merged = merge_cams([cams, more], [mirrored, more], class_labels=present, size=(1, 2), eps=1.0, impl=impl)
    # class 0: max -> (1, 2), plus relu -> (0, 2) = (1, 4); minus 1, over 3 + eps. Class 1 is absent.
    assert merged.tolist() == [[[[0.0, 0.75]], [[0.0, 0.0]]]]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_map_without_activation_is_zero(impl: str) -> None:
    cams = torch.full((1, 2, 3, 3), -2.0, device=DEVICE)
    merged = merge_cams([cams], class_labels=torch.ones(1, 2, device=DEVICE), size=(5, 5), impl=impl)
    assert not merged.any()


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_nan_shows_where_the_class_is_present_and_nowhere_else(impl: str) -> None:
    cams = torch.rand(1, 3, 4, 4, device=DEVICE)
    mirrored = torch.rand(1, 3, 4, 4, device=DEVICE)
    cams[0, 0, 1, 1] = mirrored[0, 1, 2, 2] = cams[0, 2, 0, 0] = float("nan")
    present = torch.tensor([[1, 1, 0]], device=DEVICE)
    merged = merge_cams([cams], [mirrored], class_labels=present, size=(8, 8), impl=impl)
    assert merged.isnan().flatten(2).any(-1).tolist() == [[True, True, False]]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_bit_identical_from_run_to_run(impl: str) -> None:
    case = CASES["odd sizes, more than one tile of the kernel"]
    cams, mirrored, present = inputs(case)
    first, second = (merge_cams(cams, mirrored, class_labels=present, size=case.size, impl=impl) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_any_layout_of_the_inputs_and_they_stay_as_they_are(impl: str, flip: bool) -> None:
    cams, mirrored, present = inputs(CASES["own size beside others"])
    mirrored = [view.flip(-1) for view in mirrored] if flip else []
    strided, flipped = (
        [view.contiguous(memory_format=torch.channels_last) for view in views] for views in (cams, mirrored)
    )
    before = [view.clone() for view in (cams + mirrored) * 2]
    got = merge_cams(strided, flipped, class_labels=present.bool(), size=(6, 7), impl=impl)
    assert torch.equal(got, merge_cams(cams, mirrored, class_labels=present, size=(6, 7), impl=impl))
    assert all(torch.equal(a, b) for a, b in zip(strided + flipped + cams + mirrored, before, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_no_gradient(impl: str) -> None:
    cams = [torch.rand(1, 2, 3, 3, device=DEVICE, requires_grad=True)]
    assert not merge_cams(cams, class_labels=torch.ones(1, 2, device=DEVICE), size=(4, 4), impl=impl).requires_grad


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_autocast_changes_nothing(impl: str) -> None:
    cams, mirrored, present = inputs(CASES["one scale"])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = merge_cams(cams, mirrored, class_labels=present, size=(17, 11), impl=impl)
    assert torch.equal(inside, merge_cams(cams, mirrored, class_labels=present, size=(17, 11), impl=impl))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["one scale", "no mirrored views"])
def test_operator(name: str, impl: str) -> None:
    case = CASES[name]
    cams, mirrored, present = inputs(case)
    torch.library.opcheck(_operator, (cams, mirrored, present, list(case.size), 1e-5, impl))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_a_graph_break_for_any_size(impl: str) -> None:
    def scaled(cams: list[Tensor], mirrored: list[Tensor], present: Tensor, size: tuple[int, int]) -> Tensor:
        return 2 * merge_cams([view + 1 for view in cams], mirrored, class_labels=present, size=size, impl=impl)

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager", dynamic=True)
    for name in ("the training's three scales", "odd sizes, more than one tile of the kernel", "no mirrored views"):
        case = CASES[name]
        arguments = (*inputs(case), case.size)
        assert torch.equal(compiled(*arguments), scaled(*arguments))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_runs_in_a_cuda_graph_and_never_waits() -> None:
    case = CASES["the training's three scales"]
    cams, mirrored, present = inputs(case)

    def merged() -> Tensor:
        return merge_cams(cams, mirrored, class_labels=present, size=case.size)

    merged()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        merged()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = merged()
    for _ in range(3):
        cams[0].copy_(torch.randn_like(cams[0]))
        graph.replay()
        assert torch.equal(captured, merged())


MAPS = torch.rand(2, 3, 4, 4)
ONES = torch.ones(2, 3)
BAD_CALLS: dict[str, Callable[[], Tensor]] = {
    "cams is empty": lambda: merge_cams([], class_labels=ONES, size=(4, 4)),
    r"one map per scale: got 2 for 1 scales": lambda: merge_cams([MAPS], [MAPS] * 2, class_labels=ONES, size=(4, 4)),
    r"mirrored\[1\] must be like cams\[1\], .*\(2, 3, 4, 4\).*got .*\(2, 3, 4, 3\)": lambda: merge_cams(
        [MAPS, MAPS], [MAPS, MAPS[..., :3]], class_labels=ONES, size=(4, 4)
    ),
    r"mirrored\[0\] must be like cams\[0\], torch.float32": lambda: merge_cams(
        [MAPS], [MAPS.half()], class_labels=ONES, size=(4, 4)
    ),
    r"cams\[0\] must be a floating \(B, C, h, w\) tensor.*torch.int64": lambda: merge_cams(
        [MAPS.long()], class_labels=ONES, size=(4, 4)
    ),
    r"cams\[1\] must be a floating \(B, C, h, w\) tensor.*\(3, 4, 4\)": lambda: merge_cams(
        [MAPS, MAPS[0]], class_labels=ONES, size=(4, 4)
    ),
    r"cams\[0\] must be a floating .*no empty dimension.*\(2, 3, 0, 4\)": lambda: merge_cams(
        [MAPS[:, :, :0]], class_labels=ONES, size=(4, 4)
    ),
    r"all of cams must have one batch.*\(2, 2, 4, 4\).*beside.*\(2, 3, 4, 4\)": lambda: merge_cams(
        [MAPS, MAPS[:, :2]], class_labels=ONES, size=(4, 4)
    ),
    r"all of cams must have one .* dtype.*float16.*beside torch.float32": lambda: merge_cams(
        [MAPS, MAPS.half()], class_labels=ONES, size=(4, 4)
    ),
    r"class_labels must be \(2, 3\), got \(2, 4\)": lambda: merge_cams(
        [MAPS], class_labels=torch.ones(2, 4), size=(4, 4)
    ),
    "class_labels is on meta and cams on cpu": lambda: merge_cams([MAPS], class_labels=ONES.to("meta"), size=(4, 4)),
    r"size must be \(H, W\).*got \(0, 4\)": lambda: merge_cams([MAPS], class_labels=ONES, size=(0, 4)),
    "eps must be >= 0, got -1": lambda: merge_cams([MAPS], class_labels=ONES, size=(4, 4), eps=-1.0),
    "impl must be one of auto, .* got 'cuda'": lambda: merge_cams([MAPS], class_labels=ONES, size=(4, 4), impl="cuda"),
    "float64 and the kernels accumulate in float32": lambda: merge_cams(
        [MAPS.to(DEVICE).double()], class_labels=ONES.to(DEVICE), size=(4, 4), impl="triton"
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_impossible_arguments_say_what_is_wanted(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


def test_sizes_beyond_the_kernels_coordinates_are_refused() -> None:
    # Fails before anything is allocated.
    with pytest.raises(ValueError, match="passes the kernel's 32-bit coordinates"):
        merge_cams([MAPS.to(DEVICE)], class_labels=ONES.to(DEVICE), size=(1 << 15, 1 << 15), impl="triton")


def test_debug_switch_finds_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSA_KERNELS_DEBUG", "1")
    bad = MAPS.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="cams holds NaN or infinity"):
        merge_cams([MAPS], [bad], class_labels=ONES, size=(4, 4))
