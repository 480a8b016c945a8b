"""The pseudo-label store: a sharded, compressed Zarr v3 group that appears whole or not at all.

Images differ in size, so all arrays share a canvas of the largest height and width, filled with 255 outside an image:

| array | shape, dtype | meaning |
|---|---|---|
| labels | (N, H, W) uint8 | CAM pseudo-labels (Eq. 3): 0 background, c + 1 for class c |
| confidence | (N, H, W) uint8 | largest CAM of the present classes, in 1/255 |
| segmentation | (N, H, W) uint8 | the network's own segmentation, absent classes left out |
| size | (N, 2) int32 | height and width of each image |

One chunk is one image, so that any image can be read alone. The attributes say everything else (`StoreInfo`). The
same input gives the same bytes: there is no date in it.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from cosa_fast.data.classes import IGNORED
from cosa_fast.data.index import Index
from cosa_fast.files import describe_os_error

SCHEMA = 1
ARRAYS = ("labels", "confidence", "segmentation")
REMAKE = "make it again with `cosa-fast pseudo-labels`"
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """Where the pseudo-labels come from."""

    dataset: str
    synthetic: bool
    split: str
    classes: tuple[str, ...]
    """Foreground class names; value c + 1 of `labels` and `segmentation` is class c."""
    ids: tuple[str, ...]
    """Image ids in the order of the arrays: the training split's."""
    threshold: float
    """The CAM threshold xi between background and foreground."""
    checkpoint_sha256: str
    iteration: int
    """Training iterations of the checkpoint."""
    config: dict[str, Any]
    """The training sections of the checkpoint, and `pseudo`."""
    versions: dict[str, str]
    """Of the packages that computed it."""


@dataclass(frozen=True, slots=True)
class PseudoLabel:
    """What is stored of one image; (h, w) uint8 each."""

    labels: Pixels
    confidence: Pixels
    segmentation: Pixels


def write_store(
    path: Path, info: StoreInfo, sizes: Sequence[tuple[int, int]], rows: Iterable[PseudoLabel], shard: int
) -> None:
    """Write `rows`, one per image of `info.ids` in that order, `shard` images per file; replaces a former store.

    Everything goes to a sibling folder that is renamed at the end, so a killed run leaves no half store behind.

    Args:
        sizes: (height, width) of each image.

    Raises:
        ValueError: a row has another size than announced, rows are too few or too many, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_group(temporary, info, sizes, rows, shard)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        raise ValueError(describe_os_error(error, path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_group(
    path: Path, info: StoreInfo, sizes: Sequence[tuple[int, int]], rows: Iterable[PseudoLabel], shard: int
) -> None:
    count, (height, width) = len(info.ids), np.max(sizes, axis=0).tolist()
    attributes = {"schema": SCHEMA, "format": "cosa-fast pseudo-labels", **asdict(info)}
    group = zarr.create_group(path, zarr_format=3, attributes=attributes)
    group.create_array("size", data=np.asarray(sizes, dtype=np.int32), dimension_names=("image", "height_width"))
    arrays = {
        name: group.create_array(
            name,
            shape=(count, height, width),
            chunks=(1, height, width),
            shards=(shard, height, width),
            dtype="uint8",
            fill_value=IGNORED,
            compressors=BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
            dimension_names=("image", "y", "x"),
            config={"write_empty_chunks": True},  # so that a shard that is not there is a shard that is lost
        )
        for name in ARRAYS
    }
    block = {name: np.full((shard, height, width), IGNORED, dtype=np.uint8) for name in ARRAYS}
    source = iter(rows)
    for start in range(0, count, shard):
        stop = min(start + shard, count)
        for position in range(start, stop):
            row = next(source, None)
            if row is None:
                raise ValueError(f"{path.name}: {position} rows for {count} images")
            for name in ARRAYS:
                pixels = getattr(row, name)
                if pixels.shape != tuple(sizes[position]):
                    raise ValueError(
                        f"{name} of {info.ids[position]} has {pixels.shape} pixels, wanted {tuple(sizes[position])}"
                    )
                canvas = block[name][position - start]
                canvas.fill(IGNORED)
                canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
        for name in ARRAYS:
            arrays[name][start:stop] = block[name][: stop - start]
    if next(source, None) is not None:
        raise ValueError(f"{path.name}: more rows than the {count} images")


class PseudoLabels:
    """A store opened for reading; safe to share between threads and forked processes.

    Raises:
        ValueError: the folder is no complete store of this schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise ValueError(f"there is no pseudo-label store {path}: {REMAKE}")
        try:
            group = zarr.open_group(path, mode="r", zarr_format=3)
            attributes: dict[str, Any] = dict(group.attrs)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a Zarr v3 group ({error}): {REMAKE}") from None
        if attributes.get("schema") != SCHEMA:
            raise ValueError(f"{path} is not a pseudo-label store of schema {SCHEMA}: {REMAKE}")
        try:
            values = {field.name: attributes[field.name] for field in fields(StoreInfo)}
            arrays = {name: _array(group, name) for name in ARRAYS}
            self.sizes: NDArray[np.int32] = np.asarray(_array(group, "size")[:])
        except (KeyError, OSError) as error:
            raise ValueError(f"the pseudo-label store {path} lacks {error}: {REMAKE}") from None
        values |= {"classes": tuple(values["classes"]), "ids": tuple(values["ids"])}
        self.info = StoreInfo(**values)
        self._arrays: dict[str, zarr.Array[Any] | Pixels] = {**arrays}
        for name, array in arrays.items():
            count, wanted = array.shape[0], math.ceil(len(self) / (array.shards or (1,))[0])
            found = sum(file.is_file() for file in (path / name / "c").rglob("*"))
            if not count == len(self.sizes) == len(self) or found != wanted:
                raise ValueError(
                    f"{path}: {name} has {count} images in {found} files, wanted {len(self)} in {wanted}: {REMAKE}"
                )

    def __len__(self) -> int:
        return len(self.info.ids)

    def labels(self, position: int) -> Pixels:
        """(h, w) uint8 CAM pseudo-labels of an image."""
        return self._read("labels", position)

    def confidence(self, position: int) -> Pixels:
        """(h, w) uint8 largest CAM of the present classes, in 1/255."""
        return self._read("confidence", position)

    def segmentation(self, position: int) -> Pixels:
        """(h, w) uint8 label-filtered segmentation of the network."""
        return self._read("segmentation", position)

    def reliability(self, position: int) -> NDArray[np.float32]:
        """(h, w) distance of the confidence from the threshold, 0 at it and 1 at the extremes (d of Eq. 4)."""
        confidence = self.confidence(position).astype(np.float32) / 255
        xi = self.info.threshold
        return np.where(confidence > xi, (confidence - xi) / (1 - xi), (xi - confidence) / xi).astype(np.float32)

    def load(self, limit: int = 2**30) -> None:
        """Keep labels and confidences in memory if they take at most `limit` bytes: a Zarr read is 1.5 ms per image."""
        names = ("labels", "confidence")
        if sum(self._arrays[name].nbytes for name in names) <= limit:
            self._arrays |= {name: np.asarray(self._arrays[name][:]) for name in names}

    def require_match(self, index: Index) -> None:
        """Check that the store was made from this index's training split.

        Raises:
            ValueError: other classes, other images or other image sizes.
        """
        if self.info.classes != index.classes:
            raise ValueError(
                f"{self.path} has the classes {_short(self.info.classes)}, the index {_short(index.classes)}: {REMAKE}"
            )
        if self.info.ids != tuple(image.id for image in index.train):
            raise ValueError(
                f"{self.path} holds {len(self)} images of {self.info.dataset} {self.info.split}, not the "
                f"{len(index.train)} of {index.name} {index.train_split} in the index's order: {REMAKE}"
            )
        for image, (height, width) in zip(index.train, self.sizes.tolist(), strict=True):
            if (image.height, image.width) != (height, width):
                raise ValueError(
                    f"{self.path}: {image.id} is {width}x{height}, in the index {image.width}x{image.height}: {REMAKE}"
                )

    def digest(self) -> str:
        """Hexadecimal SHA-256 of everything in the store."""
        total = hashlib.sha256()
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            total.update(str(file.relative_to(self.path)).encode())
            with open(file, "rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
        return total.hexdigest()

    def _read(self, name: str, position: int) -> Pixels:
        height, width = self.sizes[position]
        try:
            canvas = np.asarray(self._arrays[name][position])
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.path}: {name} of image {self.info.ids[position]} cannot be read ({error}): {REMAKE}"
            ) from None
        return canvas[:height, :width]


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(name)
    return array


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" ... ({len(names)})" if len(names) > 4 else "")
