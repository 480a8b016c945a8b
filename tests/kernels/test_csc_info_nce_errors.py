"""`csc_info_nce`: what it refuses, and how it says so."""

from __future__ import annotations

import math

import pytest
import torch
from cosa_kernels import csc_info_nce
from three_way import DEVICE

CAMS, LABELS, PERPLEXITY = torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.uint8), torch.zeros(2, 4, 5)
NEGATIVE, BEYOND = LABELS.long().index_fill(2, torch.tensor([1]), -7), LABELS.index_fill(2, torch.tensor([1]), 4)
BAD_CALLS = {
    r"cams must be a floating \(B, C, h, w\) tensor with no empty dimension, got torch.float32 \(3, 4, 5\)": (
        CAMS[0],
        LABELS,
        PERPLEXITY,
        {},
    ),
    r"cams must be a floating \(B, C, h, w\) tensor with no empty dimension, got torch.int64": (
        CAMS.long(),
        LABELS,
        PERPLEXITY,
        {},
    ),
    r"cams must be .* got torch.float32 \(2, 3, 0, 5\)": (CAMS[:, :, :0], LABELS[:, :0], PERPLEXITY[:, :0], {}),
    r"labels must be an integer \(2, 4, 5\) tensor, .*, got torch.uint8 \(2, 4, 4\)": (
        CAMS,
        LABELS[..., :4],
        PERPLEXITY,
        {},
    ),
    r"labels must be an integer .* got torch.float32": (CAMS, LABELS.float(), PERPLEXITY, {}),
    r"labels must be an integer .* got torch.bool": (CAMS, LABELS.bool(), PERPLEXITY, {}),
    r"perplexity must be a floating \(2, 4, 5\) tensor, .*, got torch.float32 \(1, 4, 5\)": (
        CAMS,
        LABELS,
        PERPLEXITY[:1],
        {},
    ),
    r"perplexity must be a floating .* got torch.uint8": (CAMS, LABELS, LABELS, {}),
    "perplexity is on meta and cams on cpu": (CAMS, LABELS, PERPLEXITY.to("meta"), {}),
    "labels is on meta and cams on cpu": (CAMS, LABELS.to("meta"), PERPLEXITY, {}),
    "labels holds 4 at a position with perplexity <= epsilon; the 3 channels of cams allow": (
        CAMS,
        BEYOND,
        PERPLEXITY,
        {},
    ),
    "labels holds -7 at a position with": (CAMS, NEGATIVE, PERPLEXITY, {}),
    "epsilon must be a finite number, got inf": (CAMS, LABELS, PERPLEXITY, {"epsilon": math.inf}),
    "epsilon must be a finite number, got nan": (CAMS, LABELS, PERPLEXITY, {"epsilon": math.nan}),
    "temperature must be > 0, got 0": (CAMS, LABELS, PERPLEXITY, {"temperature": 0}),
    "temperature must be > 0, got nan": (CAMS, LABELS, PERPLEXITY, {"temperature": math.nan}),
    "similarity must be 'cosine' or 'dot', got 'l2'": (CAMS, LABELS, PERPLEXITY, {"similarity": "l2"}),
    "scope must be 'image' or 'batch', got 'pixel'": (CAMS, LABELS, PERPLEXITY, {"scope": "pixel"}),
    "impl must be one of .*; got 'cuda'": (CAMS, LABELS, PERPLEXITY, {"impl": "cuda"}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_impossible_arguments_say_what_is_wanted(message: str) -> None:
    *arguments, options = BAD_CALLS[message]
    with pytest.raises(ValueError, match=message):
        csc_info_nce(*arguments, **options)


def test_vectors_too_long_for_the_kernels() -> None:
    cams = torch.rand(1, 257, 2, 2, device=DEVICE)
    labels, perplexity = torch.zeros(1, 2, 2, dtype=torch.int64, device=DEVICE), torch.zeros(1, 2, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"cams have 257 classes; the kernels take up to 256: use impl='torch'"):
        csc_info_nce(cams, labels, perplexity, impl="triton")
    assert csc_info_nce(cams, labels, perplexity).item() == 0.0


def test_nan_is_found_under_the_debug_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSA_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="cams holds NaN or infinity"):
        csc_info_nce(CAMS * math.nan, LABELS, PERPLEXITY)
