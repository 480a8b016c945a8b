"""The modules hold arguments and call the functions: nothing may be lost on the way."""

from __future__ import annotations

import inspect

import cosa_kernels
import pytest
import torch
from cosa_kernels import CSCInfoNCELoss, RAWCrossEntropyLoss, SegToCAMLoss, UpsampleCrossEntropyLoss, reference

LOGITS, CAMS = torch.randn(2, 4, 5, 5), torch.rand(2, 3, 5, 5)
LABELS = torch.randint(0, 4, (2, 5, 5))
BOX = torch.tensor([[0, 9, 0, 9], [2, 10, 1, 8]])


@pytest.mark.parametrize(
    ("module", "function", "arguments", "options", "call"),
    [
        (
            UpsampleCrossEntropyLoss,
            reference.upsample_cross_entropy,
            (LOGITS, LABELS),
            {"ignore_index": 1, "reduction": "sum"},
            {"weight": torch.rand(2, 5, 5)},
        ),
        (
            RAWCrossEntropyLoss,
            reference.raw_cross_entropy,
            (LOGITS, CAMS, 0.4),
            {"lambda_alpha": 0.6, "lambda_beta": 2.0},
            {"size": (10, 10), "valid_box": BOX, "classes": torch.tensor([[0, 1, 2], [0, 2, -1]])},
        ),
        (
            SegToCAMLoss,
            reference.seg_to_cam_loss,
            (LOGITS[:, 1:], [LOGITS, LOGITS[..., :3, :3]], torch.ones(2, 3)),
            {"temperature": 0.3},
            {"size": (10, 10)},
        ),
        (
            CSCInfoNCELoss,
            reference.csc_info_nce,
            (CAMS, LABELS, torch.rand(2, 5, 5)),
            {"epsilon": 0.7, "temperature": 0.2, "similarity": "dot", "scope": "batch"},
            {},
        ),
    ],
)
def test_module_passes_everything_on(module: type, function, arguments, options: dict, call: dict) -> None:  # type: ignore[no-untyped-def]
    loss = module(**options)(*arguments, **call)
    assert float(loss) == pytest.approx(float(function(*arguments, **options, **call)), rel=1e-5)
    assert float(module()(*arguments, **call)) != pytest.approx(float(loss), rel=1e-3)  # the options matter
    assert all(repr(value) in repr(module(**options)) for value in options.values())


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (UpsampleCrossEntropyLoss, {"reduction": "none"}, "'mean' or 'sum'"),
        (RAWCrossEntropyLoss, {"lambda_alpha": 1.0}, "lambda_alpha"),
        (RAWCrossEntropyLoss, {"lambda_beta": -1.0}, "lambda_beta"),
        (SegToCAMLoss, {"temperature": 0.0}, "temperature"),
        (CSCInfoNCELoss, {"scope": "all"}, "'image' or 'batch'"),
        (CSCInfoNCELoss, {"impl": "cuda"}, "impl"),
    ],
)
def test_impossible_options_are_found_at_once(module: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


@pytest.mark.parametrize("name", [name for name in cosa_kernels.__all__ if name.islower()])
def test_every_function_has_a_reference_with_the_same_arguments(name: str) -> None:
    """So that swapping one for the other is a change of one word."""
    fast = dict(inspect.signature(getattr(cosa_kernels, name)).parameters)
    assert fast.pop("impl").default == "auto"
    plain = inspect.signature(getattr(reference, name)).parameters
    extra = {"values", "bins"} if name == "fit_bimodal_threshold" else set()  # makes a histogram of values first
    assert set(fast) - extra == set(plain)
    for parameter in set(plain) - {"histogram"}:
        assert fast[parameter].default == plain[parameter].default, parameter
