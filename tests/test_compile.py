"""torch.compile in the training's call pattern makes whole graphs, once; and a step never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_cases import PHASES, TINY, make_step, synthetic_batch
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.fp8 import CAPABILITY
from cosa_fast.models.multi_scale import multi_scale
from cosa_fast.runtime import Runtime

WAITING = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.equal.default",
}
"""Operators that make the host wait for the device."""
SCALES = (1.0, 0.5, 1.5)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(net: CosaNet, monkeypatch: pytest.MonkeyPatch) -> CosaNet:
    """As the training compiles it, but into the same operators: generating code would take minutes."""
    compile_module = net.compile
    monkeypatch.setattr(net, "compile", lambda **options: compile_module(backend="eager", **options))
    Runtime(torch.device("cpu"), bf16=False, compiles=True).compile(net, whole=True)
    return net


@pytest.mark.parametrize("preset", ["minivoc", "voc_b4"])  # mini_vit, and a ViT of timm
def test_no_graph_breaks_and_none_is_compiled_again(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    online, assignment = (compiled(TINY[preset].network(), monkeypatch) for _ in range(2))
    batch = synthetic_batch(TINY[preset], "cpu")

    def step(decode: bool) -> None:
        if decode:
            with torch.no_grad():
                multi_scale(assignment.eval(), batch.weak, SCALES, flip=True)
        out = online.train()(batch.strong, decode=decode)
        (out.logits.sum() + out.aux_logits.sum() + out.seg.sum() + out.cams.sum()).backward()

    def validate() -> None:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            for net in (online, assignment):
                for image in (batch.weak[..., :32], batch.weak[:1]):
                    multi_scale(net.eval(), image, (1.0,), flip=True)

    step(decode=False)
    validate()
    for _ in range(2):
        step(decode=True)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1 + 1 + len(SCALES)
    validate()
    for _ in range(3):
        step(decode=True)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


class Watch(TorchDispatchMode):
    """Collects the operators that make the host wait.

    What cosa_kernels' registered operators call inside does not pass here: on a GPU a Triton kernel takes its place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("phase", PHASES)
def test_a_step_never_asks_for_a_value(phase: Any) -> None:
    step, batch = make_step(TINY["voc_b4"], "fp32", "cpu"), synthetic_batch(TINY["voc_b4"], "cpu")
    step(PHASES[phase], batch)
    with Watch() as watch:
        step(PHASES[phase], batch)
    assert watch.found == []
    with Watch() as watch:
        float(batch.labels.sum())
    assert watch.found == ["aten._local_scalar_dense.default"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", ["fp32", "bf16_compile", "bf16_graphs", "fp8_compile"])
def test_a_step_never_waits_for_the_gpu(variant: Any) -> None:
    if variant.startswith("fp8") and torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("this GPU has no float8")
    step, batch = make_step(TINY["voc_b4"], variant, "cuda"), synthetic_batch(TINY["voc_b4"], "cuda")
    for phase in PHASES.values():
        for _ in range(3):
            step(phase, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(phase, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
