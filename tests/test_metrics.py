"""mIoU against a case counted by hand and against torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from cosa_fast.data.classes import IGNORED
from cosa_fast.metrics import confusion_matrix, iou_per_class, mean_iou

# Truth and prediction of a 3 x 4 image; background 0, classes 1 and 2, class 3 nowhere.
TRUTH = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255], [2, 2, 0, 255]], dtype=torch.uint8)
PREDICTION = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [2, 0, 0, 2]], dtype=torch.uint8)


def test_hand_computed() -> None:
    confusion = confusion_matrix(TRUTH, PREDICTION, classes=4)
    # Of 5 background pixels 4 are found and 2 others are called background; and so on. The two 255 don't count.
    assert confusion.tolist() == [[4, 1, 0, 0, 0], [1, 2, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    iou = iou_per_class(confusion)
    assert iou[:3].tolist() == pytest.approx([4 / 7, 2 / 4, 1 / 2])
    assert math.isnan(iou[3])
    assert mean_iou(confusion) == pytest.approx((4 / 7 + 1 / 2 + 1 / 2) / 3)


def test_undecided_pixels_are_misses() -> None:
    undecided = PREDICTION.clone()
    undecided[0, 2] = IGNORED  # a hit of class 1 taken back: the union stays, the hits shrink
    iou = iou_per_class(confusion_matrix(TRUTH, undecided, classes=4))
    assert iou[:3].tolist() == pytest.approx([4 / 7, 1 / 4, 1 / 2])


def test_predicted_but_absent_class_counts_as_zero() -> None:
    prediction = PREDICTION.clone()
    prediction[2, 3] = 3  # on an ignored pixel: still nowhere
    assert math.isnan(iou_per_class(confusion_matrix(TRUTH, prediction, 4))[3])
    prediction[0, 0] = 3
    assert iou_per_class(confusion_matrix(TRUTH, prediction, 4))[3] == 0


@pytest.mark.parametrize("classes", [2, 11, 21, 81])
def test_equals_torchmetrics_over_a_dataset(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    metric = MulticlassJaccardIndex(classes, ignore_index=IGNORED)
    total = torch.zeros(classes, classes + 1, dtype=torch.int64)
    for height, width in [(31, 47), (1, 1), (17, 64)]:
        truth = torch.randint(0, max(classes - 3, 1), (height, width), generator=generator)
        prediction = torch.where(
            torch.rand(truth.shape, generator=generator) < 0.7,
            truth,
            torch.randint(0, max(classes - 2, 2), truth.shape, generator=generator),
        )
        truth[torch.rand(truth.shape, generator=generator) < 0.1] = IGNORED
        total += confusion_matrix(truth, prediction, classes)
        metric.update(prediction[None], truth[None])
    assert mean_iou(total) == pytest.approx(float(metric.compute()), abs=1e-6)


def test_nothing_known_is_nan_not_zero() -> None:
    nothing = torch.full((2, 2), IGNORED)
    assert math.isnan(mean_iou(confusion_matrix(nothing, torch.zeros(2, 2), 3)))


def test_other_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"truth is \(3, 4\) but the prediction \(4, 3\)"):
        confusion_matrix(TRUTH, PREDICTION.T, 4)


def test_values_that_are_no_class_do_not_count() -> None:
    truth = torch.tensor([0, 1, 2, 3, 254, 255])
    assert confusion_matrix(truth, torch.zeros(6, dtype=torch.uint8), 2).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_sums_stay_exact_and_inputs_unchanged() -> None:
    truth, prediction = TRUTH.clone(), PREDICTION.clone()
    once = confusion_matrix(truth, prediction, 254)  # the most that fit 8 bits: class 254 is the undecided one
    assert once.shape == (254, 255)
    assert once.dtype == torch.int64
    assert once[:3, :3].tolist() == [[4, 1, 0], [1, 2, 0], [1, 0, 1]]
    assert once.sum() == 10
    assert torch.equal(truth, TRUTH)
    assert torch.equal(prediction, PREDICTION)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counts_on_a_gpu_without_waiting_for_it() -> None:
    expected = confusion_matrix(TRUTH, PREDICTION, 4)
    truth, prediction = TRUTH.cuda(), PREDICTION.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = confusion_matrix(truth, prediction, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)
