"""The losses as modules, which hold the arguments and call the functions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cosa_kernels.checks import check_choice, check_open_fraction, check_positive
from cosa_kernels.implementation import Impl
from cosa_kernels.ops.csc_info_nce import Scope, Similarity, csc_info_nce
from cosa_kernels.ops.raw_cross_entropy import raw_cross_entropy
from cosa_kernels.ops.seg_to_cam_loss import seg_to_cam_loss
from cosa_kernels.ops.upsample_cross_entropy import Reduction, upsample_cross_entropy
from cosa_kernels.reference import Size


class UpsampleCrossEntropyLoss(nn.Module):
    """`upsample_cross_entropy` with fixed options.

    Args:
        ignore_index: target of pixels that do not count.
        reduction: "mean" or "sum".
        impl: see `upsample_cross_entropy`.

    Raises:
        ValueError: an option is impossible.
    """

    def __init__(self, *, ignore_index: int = 255, reduction: Reduction = "mean", impl: Impl = "auto") -> None:
        super().__init__()
        check_choice("reduction", reduction, Reduction)
        check_choice("impl", impl, Impl)
        self.ignore_index, self.reduction, self.impl = ignore_index, reduction, impl

    def forward(self, logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """See `upsample_cross_entropy`."""
        return upsample_cross_entropy(
            logits,
            target,
            weight=weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The options, for `print`."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, impl={self.impl!r}"


class RAWCrossEntropyLoss(nn.Module):
    """`raw_cross_entropy` with fixed options (Eq. 3 to 5).

    Args:
        lambda_alpha: scale of the normalised distance to the threshold, in (0, 1).
        lambda_beta: exponent of the perplexity, > 0.
        impl: see `raw_cross_entropy`.

    Raises:
        ValueError: an option is impossible.

    Example:
        >>> import torch
        >>> loss = RAWCrossEntropyLoss(lambda_alpha=0.8)
        >>> logits = torch.zeros(1, 21, 28, 28, requires_grad=True)
        >>> loss(logits, torch.rand(1, 20, 28, 28), 0.5, size=(448, 448)).backward()
    """

    def __init__(self, *, lambda_alpha: float = 0.8, lambda_beta: float = 1.0, impl: Impl = "auto") -> None:
        super().__init__()
        check_open_fraction("lambda_alpha", lambda_alpha)
        check_positive("lambda_beta", lambda_beta)
        check_choice("impl", impl, Impl)
        self.lambda_alpha, self.lambda_beta, self.impl = lambda_alpha, lambda_beta, impl

    def forward(
        self,
        logits: Tensor,
        cams: Tensor | Sequence[Tensor],
        threshold: float | Tensor | Sequence[float | Tensor],
        size: Size | None = None,
        valid_box: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        """See `raw_cross_entropy`."""
        return raw_cross_entropy(
            logits,
            cams,
            threshold,
            classes=classes,
            size=size,
            valid_box=valid_box,
            lambda_alpha=self.lambda_alpha,
            lambda_beta=self.lambda_beta,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The options, for `print`."""
        return f"lambda_alpha={self.lambda_alpha}, lambda_beta={self.lambda_beta}, impl={self.impl!r}"


class SegToCAMLoss(nn.Module):
    """`seg_to_cam_loss` with fixed options (Eq. 7, 8).

    Args:
        temperature: of the softmax over the segmentation logits, > 0.
        impl: see `seg_to_cam_loss`.

    Raises:
        ValueError: an option is impossible.
    """

    def __init__(self, *, temperature: float = 0.01, impl: Impl = "auto") -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_choice("impl", impl, Impl)
        self.temperature, self.impl = temperature, impl

    def forward(
        self,
        cam_logits: Tensor,
        seg_logits: Tensor | Sequence[Tensor],
        class_labels: Tensor,
        size: Size | None = None,
    ) -> Tensor:
        """See `seg_to_cam_loss`."""
        return seg_to_cam_loss(
            cam_logits, seg_logits, class_labels, temperature=self.temperature, size=size, impl=self.impl
        )

    def extra_repr(self) -> str:
        """The options, for `print`."""
        return f"temperature={self.temperature}, impl={self.impl!r}"


class CSCInfoNCELoss(nn.Module):
    """`csc_info_nce` with fixed options (Eq. 9, 10).

    Args:
        epsilon: positions with perplexity <= epsilon take part.
        temperature: of the InfoNCE, > 0.
        similarity: "cosine" or "dot".
        scope: "image" or "batch".
        impl: see `csc_info_nce`.

    Raises:
        ValueError: an option is impossible.
    """

    def __init__(
        self,
        *,
        epsilon: float = 1.0,
        temperature: float = 0.5,
        similarity: Similarity = "cosine",
        scope: Scope = "image",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_choice("similarity", similarity, Similarity)
        check_choice("scope", scope, Scope)
        check_choice("impl", impl, Impl)
        self.epsilon, self.temperature, self.similarity, self.scope = epsilon, temperature, similarity, scope
        self.impl = impl

    def forward(self, cams: Tensor, labels: Tensor, perplexity: Tensor) -> Tensor:
        """See `csc_info_nce`."""
        return csc_info_nce(
            cams,
            labels,
            perplexity,
            epsilon=self.epsilon,
            temperature=self.temperature,
            similarity=self.similarity,
            scope=self.scope,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The options, for `print`."""
        return (
            f"epsilon={self.epsilon}, temperature={self.temperature}, similarity={self.similarity!r}, "
            f"scope={self.scope!r}, impl={self.impl!r}"
        )
