"""Cross-entropy of up-sampled logits: what it refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
from cosa_kernels import upsample_cross_entropy
from three_way import DEVICE


class TestErrors:
    logits, labels = torch.zeros(2, 5, 3, 3), torch.zeros(2, 24, 24, dtype=torch.uint8)

    def message(self, *args: object, **kwargs: object) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the callers look at the message
            upsample_cross_entropy(*args, **kwargs)  # type: ignore[arg-type]
        return str(error.value)

    def test_shapes(self) -> None:
        assert "floating (B, C, h, w)" in self.message(self.logits[0], self.labels)
        assert "no empty dimension" in self.message(self.logits[:, :, :0], self.labels)
        assert "no empty dimension" in self.message(self.logits[:0], self.labels[:0])
        assert "integer (2, H, W)" in self.message(self.logits, self.labels[:1])
        assert "integer (2, H, W)" in self.message(self.logits, self.labels.float())
        assert "target's shape" in self.message(self.logits, self.labels, weight=torch.ones(2, 24, 23))

    def test_options(self) -> None:
        assert "'mean' or 'sum'" in self.message(self.logits, self.labels, reduction="none")
        assert "impl must be one of" in self.message(self.logits, self.labels, impl="cuda")
        assert "float64" in self.message(self.logits.to(DEVICE).double(), self.labels.to(DEVICE), impl="triton")

    def test_a_label_without_a_channel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = self.labels.clone()
        wrong[1, 3, 4] = 7
        says = "holds the label 7; the 5 channels allow 0 to 4"
        assert says in self.message(self.logits, wrong, impl="torch")
        logits, wrong = self.logits.to(DEVICE), wrong.to(DEVICE)
        if DEVICE != "cpu":  # looking would mean waiting
            assert upsample_cross_entropy(logits, wrong, impl="triton").isnan()
            monkeypatch.setenv("COSA_KERNELS_DEBUG", "1")
        assert says in self.message(logits, wrong, impl="triton")

    def test_weight_with_gradient(self) -> None:
        weight = torch.ones(2, 24, 24, requires_grad=True)
        assert "weight.detach()" in self.message(self.logits, self.labels, weight=weight)

    def test_devices(self) -> None:
        assert "target is on meta and logits on cpu" in self.message(self.logits, self.labels.to("meta"))

    def test_nan_under_the_debug_switch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        spoilt = torch.full_like(self.logits, float("nan"))
        assert upsample_cross_entropy(spoilt, self.labels).isnan()
        monkeypatch.setenv("COSA_KERNELS_DEBUG", "1")
        assert "logits holds NaN" in self.message(spoilt, self.labels)


def test_triton_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        upsample_cross_entropy(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.uint8), impl="triton")
