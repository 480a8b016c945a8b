"""The numerical test of every operation: float64 reference, plain torch and kernel, values and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative error that a result computed from inputs of this dtype may have by itself."""


def relative_error(result: Tensor, truth: Tensor) -> float:
    """||result - truth|| / ||truth||; a NaN or an infinity on one side only is infinitely wrong."""
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    if not torch.equal(result.isfinite(), truth.isfinite()):
        return float("inf")
    finite = truth.isfinite()
    error, scale = (result - truth)[finite].norm(), truth[finite].norm()
    return float(error / scale) if scale > 0 else float(error)


def compare(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Tensor,
    dtype: torch.dtype,
    impl: str,
    rounding: float | None = None,
) -> None:
    """`function(inputs, impl=impl)` in `dtype` must be as close to the float64 reference as the reference in `dtype`.

    Both the value and the gradient with respect to `inputs`, up to `rounding`. None: the value's is that of float32, in
    which narrower inputs are accumulated, the gradient's that of `dtype`, in which it is stored. The float64 truth is
    computed from the rounded inputs.
    """
    rounded = inputs.to(DEVICE, dtype)
    truth, eager, fast = (
        _value_and_gradient(call, rounded.to(as_dtype))
        for call, as_dtype in (
            (reference, torch.float64),
            (reference, dtype),
            (lambda x: _poisoned(function, x, impl), dtype),
        )
    )
    exact = ROUNDING[torch.promote_types(dtype, torch.float32)]
    checks = zip(("value", "gradient"), truth, eager, fast, (exact, ROUNDING[dtype]), strict=True)
    for what, true, plain, ours, natural in checks:
        allowed = relative_error(plain, true) + (natural if rounding is None else rounding)
        got = relative_error(ours, true)
        assert got <= allowed, (
            f"{what}: relative error {got:.2e}, the reference in {dtype} and rounding allow {allowed:.2e}"
        )


def bimodal(seed: int, low: float, high: float, share: float, count: int = 40_000) -> np.ndarray:
    """Values in (0, 1): a background around `low`, and a share of foreground around `high`."""
    rng = np.random.default_rng(seed)
    background = rng.normal(low, 0.07, int(count * (1 - share)))
    foreground = rng.normal(high, 0.12, count - len(background))
    values = np.concatenate([background, foreground])
    return values[(values > 0) & (values < 1)]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor made under it; it does not see into operators: call what they call."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def _value_and_gradient(call: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    leaf = inputs.detach().clone().requires_grad_()
    value = call(leaf)
    # Not 1: a backward that forgets the upstream gradient must fail.
    (gradient,) = torch.autograd.grad(value, leaf, torch.full_like(value, 1.7))
    return value, gradient


def _poisoned(function: Callable[..., Tensor], inputs: Tensor, impl: str) -> Tensor:
    with poisoned_memory():
        return function(inputs, impl=impl)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN (or 113): reading what nobody wrote shows."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

        return allocate_poisoned

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield
