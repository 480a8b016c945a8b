"""Autograd of operators that return their loss together with its gradient."""

from __future__ import annotations

from typing import Any

import torch


def register_ready_gradient(operator: Any) -> None:
    """Give `operator`, which returns (loss, gradient of its first argument), a backward pass that only scales.

    Raises (in the backward pass):
        RuntimeError: with `create_graph=True`, since the ready gradient is a constant.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.dtype, ctx.arguments = inputs[0].dtype, len(inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, upstream: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{operator._name} has no double backward (create_graph=True): use impl='reference'")
        (gradient,) = ctx.saved_tensors
        # In float32 until here: a gradient scaler's factor comes before the rounding to float16.
        scaled = None if upstream is None else (gradient * upstream).to(ctx.dtype)
        return (scaled, *[None] * (ctx.arguments - 1))

    operator.register_autograd(backward, setup_context=setup_context)
