"""The `evaluate` stage: mIoU of CoSA, CoSA-MS and the pseudo-labels, with and without the image-level labels."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cosa_fast.config import EvalConfig, RuntimeConfig
from cosa_fast.crf import CRF_PRESETS, CrfItem, CrfPool, require_crf
from cosa_fast.data.index import Index
from cosa_fast.data.masks import Masks, load_masks
from cosa_fast.data.store import Pixels, PseudoLabels
from cosa_fast.distributed import World
from cosa_fast.figures import PanelRow, write_panel
from cosa_fast.files import write_atomically
from cosa_fast.gallery import require_gallery, write_gallery
from cosa_fast.inference import for_inference, prefetch, worth_compiling
from cosa_fast.metrics import confusion_matrix, mean_iou
from cosa_fast.models.checkpoint import CosaCheckpoint, load_cosa
from cosa_fast.models.segmenter import SegmenterCheckpoint, load_segmenter
from cosa_fast.pseudo_labels import require_same_classes
from cosa_fast.results import Score, report, table
from cosa_fast.runtime import resolve
from cosa_fast.systems import CAM, COSA, FILTERED, FREE, ORDER, TRUTH, Systems, outcomes, read_truth
from cosa_fast.transfer import to_device

log = logging.getLogger(__name__)


def evaluate(
    index: Path,
    masks: Path,
    checkpoint: Path,
    segmenter: Path | None,
    store: Path | None,
    output: Path,
    csv: Path,
    panel: Path | None = None,
    gallery: Path | None = None,
    *,
    splits: tuple[str, ...] = (),
    evaluation: EvalConfig,
    runtime: RuntimeConfig,
    threads: int,
) -> None:
    """Score everything on every split asked for, and the store on the training split if that has masks.

    A store must come from the checkpoint beside it. CoSA-MS may come from another one or from another store, because
    what it predicts depends on neither; then a warning and the report say so.

    Processes of torchrun share the batches of each split, so that every image is in the batch that it is in for one
    process, and the results are the same to the bit. The first process draws and writes.

    Args:
        index: the dataset index.
        masks: its list of masks.
        checkpoint: CoSA's, of the `train` stage.
        segmenter: CoSA-MS's, of the `multistage` stage; None: it is not scored.
        store: pseudo-labels of the training split; None: they are not scored.
        output: text file: what was evaluated and its mIoU.
        csv: IoU per split, system, setting and class.
        panel: PNG of a few images of the first split, evenly spaced through it.
        gallery: folder with the same images, one file for each of their maps.
        splits: names in the index, each with a mask for every image; (): the index's eval_splits.

    Raises:
        ValueError: a split has no masks, a file is not of this index or damaged, or the disk is full.
    """
    if evaluation.crf != "none":
        require_crf()
    machine = resolve(runtime, threads)
    world = machine.world
    dataset = Index.load(index)
    truth = load_masks(masks, index)
    splits = _checked_splits(splits, dataset, index, truth, masks)
    if gallery is not None:
        require_gallery(gallery)
    cosa = load_cosa(checkpoint, evaluation.network, machine.device)
    require_same_classes(cosa.classes, checkpoint, dataset, index)
    images = sum(len(dataset.splits[split]) for split in splits)
    compiled = worth_compiling(runtime, machine, images)
    for_inference(cosa.net, machine, compiled)
    standalone = labels = None
    if segmenter is not None:
        standalone = load_segmenter(segmenter, machine.device)
        require_same_classes(standalone.classes, segmenter, dataset, index)
        for_inference(standalone.net, machine)
    if store is not None:
        labels = PseudoLabels(store)
        labels.require_match(dataset)
        labels.require_checkpoint(cosa.sha256, checkpoint)
    remarks = list(_remarks(cosa, standalone, labels)) if world.first else []
    for remark in remarks:
        log.warning("%s", remark)
    systems = Systems(
        dataset,
        truth,
        cosa,
        standalone,
        labels,
        evaluation,
        machine,
        threads,
        evaluation.batch_size if compiled else None,
    )
    scores: list[Score] = []
    rows: list[PanelRow] = []
    for split in splits:
        shown = rows if split == splits[0] and (panel, gallery) != (None, None) else None
        scores += _score_split(systems, split, shown)
    if labels is not None and truth.has(dataset.train_split):
        scores += _score_store(systems, labels)
    if not world.first:
        return
    if panel is not None:
        write_panel(
            panel,
            rows,
            dataset.classes,
            f"{dataset.name} {splits[0]}",
            f"{len(rows)} images at even distances; CAMs use their labels, the predictions of CoSA"
            f"{' and CoSA-MS' if standalone else ''} do not",
            "Synthetic images: comparable with nothing on PASCAL VOC" if dataset.synthetic else None,
        )
    if gallery is not None:
        write_gallery(gallery, dataset, splits[0], rows, [_image_iou(row, len(dataset.classes) + 1) for row in rows])
    text = report(systems, splits, scores, {"checkpoint": checkpoint, "segmenter": segmenter, "store": store}, remarks)
    write_atomically(csv, table(dataset, scores).encode())
    write_atomically(output, text.encode())
    log.info("%s\n%s", output, text)


def _checked_splits(
    splits: tuple[str, ...], dataset: Index, index: Path, masks: Masks, masks_path: Path
) -> tuple[str, ...]:
    splits = splits or dataset.eval_splits
    if not splits:
        raise ValueError(f"{index} has no evaluation split: name one in eval_splits and make the index again")
    for split in splits:
        if split not in dataset.splits:
            raise ValueError(f"{index} has no split {split!r}: choose among {', '.join(dataset.splits)}")
        if not dataset.splits[split]:
            raise ValueError(f"the split {split!r} of {index} has no images: nothing can be measured on it")
        if not masks.has(split):
            otherwise = "choose another split" if split == dataset.train_split else "take the split out of eval_splits"
            raise ValueError(
                f"{masks_path} has no masks for the split {split!r}: evaluation needs one for each image; add them and "
                f"run `cosa-fast data masks` again, or {otherwise}"
            )
    return tuple(dict.fromkeys(splits))


def _remarks(cosa: CosaCheckpoint, segmenter: SegmenterCheckpoint | None, store: PseudoLabels | None) -> Iterator[str]:
    """Where CoSA-MS does not come from the CoSA and the store beside it."""
    if segmenter is None:
        return
    made = str(segmenter.store.get("checkpoint_sha256", "unknown"))
    if made != cosa.sha256:
        yield f"CoSA-MS was trained on pseudo-labels of another CoSA checkpoint ({made[:12]})"
    elif store is not None and segmenter.store["sha256"] != store.digest():
        yield f"CoSA-MS was trained on another store of this CoSA checkpoint than {store.path}"


class _Totals:
    """One confusion matrix for each system and setting, on the device of the truth."""

    def __init__(self, classes: int) -> None:
        self.kinds = classes + 1
        self.confusions: dict[tuple[str, str], Tensor] = {}

    def count(self, system: str, setting: str, truth: Tensor, prediction: Tensor) -> None:
        """Count (H, W) class maps."""
        self._add({(system, setting): confusion_matrix(truth, prediction, self.kinds)})

    def scores(self, split: str, world: World) -> list[Score]:
        """Of all processes' images, in the order of the report; elsewhere than in the first process an empty list."""
        everything = _Totals(self.kinds - 1)
        for confusions in world.gather({key: confusion.cpu() for key, confusion in self.confusions.items()}):
            everything._add(confusions)
        keys = [(system, setting) for system in ORDER for setting in (FREE, FILTERED)]
        return [Score(split, *key, everything.confusions[key]) for key in keys if key in everything.confusions]

    def _add(self, confusions: Mapping[tuple[str, str], Tensor]) -> None:
        for key, confusion in confusions.items():
            self.confusions[key] = self.confusions[key] + confusion if key in self.confusions else confusion


def _score_split(systems: Systems, split: str, rows: list[PanelRow] | None) -> list[Score]:
    """Score everything on one split; fills the first process's `rows` of the panel unless it is None."""
    images, config, world = systems.dataset.splits[split], systems.config, systems.machine.world
    shown = {images[int(k)].id for k in np.linspace(0, len(images) - 1, config.panel_images).round()}
    own = world.share(images, whole=config.batch_size)
    own_rows: list[PanelRow] = []
    totals = _Totals(len(systems.dataset.classes))
    refining: deque[tuple[str, str, Tensor, Tensor]] = deque()

    def items() -> Iterator[CrfItem]:
        """Counts every image, and gives what the CRF is to refine, if it is on."""
        everything = outcomes(systems, split, own)
        for outcome in tqdm(everything, f"evaluate {split}", len(own), unit="image", disable=world.quiet):
            truth = to_device(outcome.sample.truth, systems.machine.device)
            for (system, setting), values in outcome.maps.items():
                totals.count(system, setting, truth, values)
            if rows is not None and outcome.sample.image.id in shown:
                own_rows.append(outcome.panel_row())
            if config.crf != "none":
                for system, setting, channels, item in outcome.crf_items():
                    refining.append((system, setting, channels, outcome.sample.truth))
                    yield item

    with torch.inference_mode():
        if config.crf == "none":
            deque(items(), maxlen=0)
        else:
            with CrfPool(systems.threads, CRF_PRESETS[config.crf]) as pool:
                for best in pool.map(items()):  # the networks run on while processes refine
                    system, setting, channels, truth = refining.popleft()
                    totals.count(system, setting, truth, channels[torch.from_numpy(best).int()])
    if rows is not None:
        rows += chain.from_iterable(world.gather(own_rows))
    return totals.scores(split, world)


def _image_iou(row: PanelRow, kinds: int) -> float | None:
    """Mean IoU of CoSA, label-free, over the classes in the image's truth or prediction; None: all is void."""
    value = mean_iou(confusion_matrix(torch.from_numpy(row.maps[TRUTH]), torch.from_numpy(row.maps[COSA]), kinds))
    return None if value != value else round(value, 6)


def _score_store(systems: Systems, store: PseudoLabels) -> list[Score]:
    """Score the stored pseudo-labels against the training masks, which nothing else looks at."""
    dataset, threads, world = systems.dataset, systems.threads, systems.machine.world
    split, images = dataset.train_split, dataset.train
    own = world.share(range(len(images)))

    def load(position: int) -> tuple[Pixels, Pixels, Pixels]:
        return read_truth(systems, split, images[position]), store.labels(position), store.segmentation(position)

    totals = _Totals(len(dataset.classes))
    loaded = prefetch(load, own, threads, ahead=4 * threads)
    for maps in tqdm(loaded, f"score store {split}", len(own), unit="image", disable=world.quiet):
        truth, labels, segmentation = (torch.tensor(values) for values in maps)
        totals.count(CAM, FILTERED, truth, labels)
        totals.count(COSA, FILTERED, truth, segmentation)
    return totals.scores(f"{split} (store)", world)
