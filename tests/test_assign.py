"""Assignments of the present classes against the same with maps of all classes."""

from __future__ import annotations

import pytest
import torch
from cosa_kernels import cam_pseudo_labels, merge_cams
from torch import Tensor

from cosa_fast.assign import Assignments, assign, banded_labels
from cosa_fast.config import CosaConfig
from cosa_fast.data.batch import Batch
from cosa_fast.models.multi_scale import MultiScale

CROP = 24
PRESENT = torch.tensor([[1, 4, 6], [5, -1, -1], [-1, -1, -1]])
"""Of 7 classes; the last image has none."""
LABELS = torch.tensor([[0.0, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]])
BOX = torch.tensor([[0, CROP, 0, CROP], [3, 20, 8, CROP], [0, CROP, 0, 5]])


def views(flip: bool) -> MultiScale:
    generator = torch.Generator().manual_seed(0)

    def maps() -> tuple[Tensor, ...]:
        return tuple(torch.randn(3, 7, side, side, generator=generator) for side in (3, 2, 5))

    cams, aux_cams = maps(), maps()
    mirrored, mirrored_aux = (maps(), maps()) if flip else ((), ())
    return MultiScale(cams, mirrored, aux_cams, mirrored_aux, seg=(), logits=())


def assigned(config: CosaConfig, flip: bool) -> Assignments:
    image = torch.zeros(3, 3, CROP, CROP)
    batch = Batch(image, image, labels=LABELS, present=PRESENT, valid_box=BOX, index=torch.arange(3))
    return assign(views(flip), batch, config)


@pytest.mark.parametrize(("side", "flip"), [(None, True), (16, True), (None, False)])
def test_present_classes_have_the_maps_that_all_classes_have(side: int | None, flip: bool) -> None:
    targets, size = assigned(CosaConfig(label_size=side), flip), (side or CROP, side or CROP)
    given = views(flip)
    for few, cams, mirrored in (
        (targets.cams, given.cams, given.mirrored_cams),
        (targets.aux_cams, given.aux_cams, given.mirrored_aux_cams),
    ):
        everything = merge_cams(cams, mirrored, class_labels=LABELS, size=size)
        assert few.shape == (3, 3, *size)
        for image, classes in enumerate(PRESENT.tolist()):
            for position, name in enumerate(classes):
                assert torch.equal(few[image, position], everything[image, name] if name >= 0 else torch.zeros(size))


def test_banded_labels_are_those_of_all_classes() -> None:
    targets, given = assigned(CosaConfig(), True), views(True)
    everything = merge_cams(given.cams, given.mirrored_cams, class_labels=LABELS, size=(CROP, CROP))
    got = banded_labels(targets.cams, targets.present, (0.3, 0.6), BOX)
    low, high = (cam_pseudo_labels(everything, threshold, valid_box=BOX)[0] for threshold in (0.3, 0.6))
    assert torch.equal(got, low.where(low == high, 255))
    assert set(got[0].unique().tolist()) == {0, 2, 5, 7, 255}
