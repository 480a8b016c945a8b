"""Linear layers in float8 for a network without a gradient, such as the assignment network.

Both factors are float8_e4m3fn, scaled so that the largest value of each row (a token's activations, an output channel's
weights) is the format's largest. The GPU part has not run yet: no GPU was at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
CAPABILITY = (8, 9)
"""The oldest NVIDIA GPUs that multiply float8 (Ada Lovelace)."""


class Float8Linear(nn.Linear):
    """Computes what `linear` does in float8, from the very same parameters.

    They are rounded anew in each pass, which is little beside the products: whoever changes them (a moving average, a
    loaded state) need not tell. The names in the state dict stay. On the CPU the rounding is the same and the products
    are float32.

    Args:
        linear: a layer whose inputs and outputs are multiples of 16, as the GPU's products need them.

    Raises:
        ValueError: they are not.
    """

    def __init__(self, linear: nn.Linear) -> None:
        sides = linear.in_features, linear.out_features
        if sides[0] % 16 or sides[1] % 16:
            raise ValueError(f"float8 layers need multiples of 16 as inputs and outputs, got {sides[0]} to {sides[1]}")
        super().__init__(*sides, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype that nn.Linear would return."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows, row_scale = quantize(x.flatten(0, -2))
        channels, channel_scale = quantize(self.weight)
        with torch.autocast(kind, enabled=False):
            if kind == "cuda":
                # bfloat16 is the one result that every GPU's kernels for scales by row have. Fast sums have fewer bits
                # than float32 on Hopper, but more than what is added.
                y = torch._scaled_mm(
                    rows, channels.T, row_scale, channel_scale.T, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            else:
                # A product of two such numbers is exact in float32.
                y = rows.float() @ channels.float().T * row_scale * channel_scale.T
        y = y if self.bias is None else y + self.bias
        return y.to(dtype).unflatten(0, x.shape[:-1])


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) rows as (N, K) float8_e4m3fn and their (N, 1) float32 scales: rows = values * scales, up to rounding."""
    rows = rows.float()
    # A row of zeros has some scale too.
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return (rows / scale).to(FP8), scale


def use_float8(module: nn.Module) -> None:
    """Replace every nn.Linear in `module`, which must be on its device, by a `Float8Linear` of the same parameters.

    Raises:
        ValueError: the GPU has no float8, or a layer does not fit.
    """
    for parameter in module.parameters():
        if parameter.is_cuda and (found := torch.cuda.get_device_capability(parameter.device)) < CAPABILITY:
            raise ValueError(
                f"float8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer, "
                f"{parameter.device} has {found[0]}.{found[1]}: use bf16"
            )
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Float8Linear(child))
