"""Float8 layers against a rounding to the format's numbers by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_results import write_checkpoint, write_dataset, write_masks
from torch import Tensor, nn

from benchmarks.float8 import Options, run
from cosa_fast.config import ModelConfig
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.fp8 import CAPABILITY, Float8Linear, quantize, use_float8

# e4m3: 3 bits of mantissa, exponents -6 to 8, subnormal steps of 2^-9; the top mantissa of the top exponent is NaN.
GRID = torch.tensor(
    [step / 8 * 2.0**-6 for step in range(8)]
    + [(1 + step / 8) * 2.0**power for power in range(-6, 9) for step in range(8)][:-1],
    dtype=torch.float64,
)
SIGNED = torch.cat([-GRID.flip(0), GRID])


def nearest(values: Tensor) -> Tensor:
    """The closest numbers of the format."""
    return SIGNED[(values[..., None].double() - SIGNED).abs().argmin(dim=-1)]


def linear(inputs: int = 48, outputs: int = 32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layer.weight *= torch.logspace(-3, 3, outputs)[:, None]  # channels of very different sizes
    return layer


def by_hand(layer: nn.Linear, x: Tensor) -> Tensor:
    rows, weight = x.double(), layer.weight.double()
    scales = [448 / side.abs().amax(dim=-1, keepdim=True) for side in (rows, weight)]
    y = (nearest(rows * scales[0]) / scales[0]) @ (nearest(weight * scales[1]) / scales[1]).T
    return y if layer.bias is None else y + layer.bias.double()


@pytest.mark.parametrize("bias", [True, False])
def test_equals_rounding_by_hand(bias: bool) -> None:
    layer = linear(bias=bias)
    x = torch.randn(2, 5, 48) * torch.logspace(-4, 4, 5)[:, None]
    expected = by_hand(layer, x)
    y = Float8Linear(layer)(x)
    assert y.shape == (2, 5, 32)
    assert y.dtype == torch.float32
    # A value in the middle of two numbers may go either way: its scale is float32 here.
    assert (y - expected).norm() / expected.norm() < 1e-3
    error = (layer(x) - expected).norm() / expected.norm()
    assert 0.005 < error < 0.06  # the format's rounding, at most 1 / 16 for each factor


def test_zeros_and_what_is_not_finite() -> None:
    values, scale = quantize(torch.tensor([[0.0, 0.0], [-3.0, 1.5], [float("nan"), 1.0], [1e-30, 0.0]]))
    assert torch.equal(values.float()[:2], torch.tensor([[0.0, 0.0], [-448.0, 224.0]]))
    assert (values.float() * scale)[2].isnan().all()
    torch.testing.assert_close((values.float() * scale)[3], torch.tensor([1e-30, 0.0]))


def test_parameters_are_shared_and_followed() -> None:
    layer = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    plain = copy.deepcopy(layer)
    use_float8(layer)
    assert [type(part) for part in layer] == [Float8Linear, nn.GELU, Float8Linear]
    assert layer.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 32)
    before = layer(x)
    with torch.no_grad():
        torch._foreach_lerp_(list(layer.parameters()), [torch.zeros_like(p) for p in layer.parameters()], 0.5)
    assert not torch.equal(layer(x), before)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer(x), before)
    assert not before.requires_grad


def test_autocast_gives_its_dtype() -> None:
    layer, x = Float8Linear(linear()), torch.randn(4, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x).bfloat16())


@pytest.mark.parametrize("name", ["mini_vit", "test_vit"])
def test_a_whole_network_stays_close(name: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name=name, aux_block=0, aux_norm=True, decoder_dim=16, decoder_dilation=1)
    net = CosaNet(config, 3, 64, pretrained=False).eval()
    rough = copy.deepcopy(net)
    use_float8(rough)
    assert sum(isinstance(part, Float8Linear) for part in rough.modules()) >= 12
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact, close = net(images), rough(images)
    for what in ("logits", "cams", "aux_cams", "seg"):
        true, got = getattr(exact, what), getattr(close, what)
        assert 0 < (true - got).norm() / true.norm() < 0.1, what


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bias", [True, False])
def test_the_gpu_computes_what_the_cpu_emulates(bias: bool) -> None:
    """But for the result's bfloat16, and sums of some 14 bits on Hopper."""
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("this GPU has no float8")
    layer = linear(64, 32, bias)
    x = torch.randn(3, 16, 64)
    expected = Float8Linear(layer)(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = Float8Linear(layer.cuda())(x.cuda())
    assert found.dtype == torch.bfloat16
    error = (found.cpu().float() - expected).norm(dim=(0, 1)) / expected.norm(dim=(0, 1))
    assert error.max() < 1e-2


def test_what_the_products_cannot_take() -> None:
    with pytest.raises(ValueError, match="multiples of 16 as inputs and outputs, got 48 to 20"):
        Float8Linear(nn.Linear(48, 20))


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    layer = nn.Linear(16, 16)
    monkeypatch.setattr(nn.Module, "parameters", lambda self: iter([_OnGpu()]))
    with pytest.raises(ValueError, match=r"8\.9 or newer, cuda:0 has 8\.6: use bf16"):
        use_float8(layer)


class _OnGpu:
    is_cuda, device = True, torch.device("cuda", 0)


def test_the_benchmark_compares_with_float32(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, val=3)
    masks, checkpoint = write_masks(index), write_checkpoint(tmp_path / "cosa.safetensors")
    table = tmp_path / "out.csv"
    rows = run(Options(checkpoint=checkpoint, index=index, masks=masks, size=48, csv=table))
    found = {(row["kind"], row["precision"]): float(row["agreement"]) for row in rows}
    assert len(found) == 4 * 4
    assert all(found[kind, "fp32"] == 100.0 for kind, _ in found)
    assert any(value < 100.0 for value in found.values())
    # The columns of "same label" and mIoU belong together: nothing changed, so the mIoU is that of float32.
    exact = {row["kind"]: row["miou"] for row in rows if row["precision"] == "fp32"}
    assert all(row["miou"] == exact[row["kind"]] for row in rows if row["agreement"] == "100.000")
    assert len(table.read_text().splitlines()) == 17
