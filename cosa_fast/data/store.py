"""The pseudo-label store: a sharded, compressed Zarr v3 group that appears whole or not at all.

Images differ in size, so all arrays share a canvas of the largest height and width, filled with 255 outside an image:

| array | shape, dtype | meaning |
|---|---|---|
| labels | (N, H, W) uint8 | CAM pseudo-labels (Eq. 3): 0 background, c + 1 for class c |
| confidence | (N, H, W) uint8 | largest CAM of the present classes, in 1/255 |
| segmentation | (N, H, W) uint8 | the network's own segmentation, absent classes left out |
| size | (N, 2) int32 | height and width of each image |

One chunk is one image, so that any image can be read alone, and carries Zstandard's checksum, so that a changed byte
is an error and not another label. The attributes say everything else (`StoreInfo`). The same input gives the same
bytes: there is no date in it.

Any Zarr v3 library reads a store. `PseudoLabels` takes the images' bytes straight from the shards, because zarr-python
spends more than a millisecond on finding one chunk, several times what decompressing it takes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import zstd
from numcodecs.checksum32 import CRC32C
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from cosa_fast.data.classes import IGNORED
from cosa_fast.data.index import Index
from cosa_fast.distributed import ALONE, World
from cosa_fast.files import describe_os_error, sigterm_exits, sigterm_later

SCHEMA = 2
ARRAYS = ("labels", "confidence", "segmentation")
CODEC = ZstdCodec(level=3, checksum=True)
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
    path: Path,
    info: StoreInfo,
    sizes: Sequence[tuple[int, int]],
    rows: Iterable[PseudoLabel],
    shard: int,
    positions: Sequence[int] | None = None,
    world: World = ALONE,
) -> None:
    """Write `rows`, one per image of `info.ids` in that order, `shard` images per file; replaces a former store.

    Everything goes to a sibling folder that the first process makes, and renames once all have written, so a killed
    run leaves no half store behind; the next one deletes that folder.

    Args:
        sizes: (height, width) of each image.
        positions: consecutive images that this process has the rows of, whole shards; None: all of them.
        world: the processes that write together.

    Raises:
        ValueError: a row has another size than announced, rows are too few or too many, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.partial")
    # Another process than the first one that fails leaves the folder alone: the others write to it, and must not fail
    # before its own error is told. Whoever torchrun ends then deletes it after its last write.
    deletes = world.first
    with sigterm_exits():
        try:
            if world.first:
                shutil.rmtree(temporary, ignore_errors=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                _create_group(temporary, info, sizes, shard)
            world.wait()
            everything = range(len(info.ids))
            _write_rows(temporary, info, sizes, rows, shard, everything if positions is None else positions)
            world.wait()
            if world.first:
                with sigterm_later():
                    if path.exists():
                        shutil.rmtree(path)
                    temporary.rename(path)
        except OSError as error:
            raise ValueError(describe_os_error(error, path)) from error
        except SystemExit:
            deletes = True
            raise
        finally:
            if deletes:
                with sigterm_later():
                    shutil.rmtree(temporary, ignore_errors=True)


def _create_group(path: Path, info: StoreInfo, sizes: Sequence[tuple[int, int]], shard: int) -> None:
    count, (height, width) = len(info.ids), np.max(sizes, axis=0).tolist()
    attributes = {"schema": SCHEMA, "format": "cosa-fast pseudo-labels", **asdict(info)}
    group = zarr.create_group(path, zarr_format=3, attributes=attributes)
    group.create_array("size", data=np.asarray(sizes, dtype=np.int32), dimension_names=("image", "height_width"))
    for name in ARRAYS:
        group.create_array(
            name,
            shape=(count, height, width),
            chunks=(1, height, width),
            shards=(shard, height, width),
            dtype="uint8",
            fill_value=IGNORED,
            compressors=CODEC,
            dimension_names=("image", "y", "x"),
        )


def _write_rows(
    path: Path,
    info: StoreInfo,
    sizes: Sequence[tuple[int, int]],
    rows: Iterable[PseudoLabel],
    shard: int,
    positions: Sequence[int],
) -> None:
    # Empty chunks too, so that a shard that is not there is a shard that is lost.
    with zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(path, mode="r+", zarr_format=3)
        arrays = {name: _array(group, name) for name in ARRAYS}
    block = {name: np.full((shard, *arrays[name].shape[1:]), IGNORED, dtype=np.uint8) for name in ARRAYS}
    source = iter(rows)
    for start in positions[::shard]:
        stop = min(start + shard, len(info.ids))
        for position in range(start, stop):
            row = next(source, None)
            if row is None:
                raise ValueError(f"{path.name}: {position - positions[0]} rows for {len(positions)} images")
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
        raise ValueError(f"{path.name}: more rows than the {len(positions)} images")


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
        except (KeyError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"the pseudo-label store {path} lacks {error}: {REMAKE}") from None
        values |= {"classes": tuple(values["classes"]), "ids": tuple(values["ids"])}
        self.info = StoreInfo(**values)
        for name, length in [("size", len(self.sizes)), *((name, array.shape[0]) for name, array in arrays.items())]:
            if length != len(self):
                raise ValueError(f"{path}: {name} has {length} images, the list of ids {len(self)}: {REMAKE}")
        self._shards = {name: _Shards(path / name, array) for name, array in arrays.items()}
        # Zarr reads a chunk that is not there as zeros.
        if (self.sizes < 1).any() or any((self.sizes > shards.canvas).any() for shards in self._shards.values()):
            raise ValueError(f"{path}: the sizes of the images are lost or damaged: {REMAKE}")
        self._memory: dict[str, list[Pixels]] = {}

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
        """Keep labels and confidences in memory, decompressed, if they take at most `limit` bytes."""
        names = ("labels", "confidence")
        if len(names) * int(self.sizes.prod(axis=1, dtype=np.int64).sum()) <= limit:
            self._memory = {name: [self._read(name, at).copy() for at in range(len(self))] for name in names}

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

    def require_checkpoint(self, sha256: str, checkpoint: Path) -> None:
        """Check that the store was made from the checkpoint with this SHA-256.

        Raises:
            ValueError: it was made from another one.
        """
        if self.info.checkpoint_sha256 != sha256:
            raise ValueError(
                f"{self.path} was made from the checkpoint {self.info.checkpoint_sha256[:12]}, but {checkpoint} is "
                f"{sha256[:12]}: {REMAKE}"
            )

    def digest(self) -> str:
        """Hexadecimal SHA-256 of everything in the store, without what Snakemake hides in it."""
        total = hashlib.sha256()
        for file in sorted(path for path in self.path.rglob("[!.]*") if path.is_file()):
            total.update(str(file.relative_to(self.path)).encode())
            with open(file, "rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
        return total.hexdigest()

    def _read(self, name: str, position: int) -> Pixels:
        if name in self._memory:
            return self._memory[name][position]
        height, width = self.sizes[position]
        try:
            canvas = self._shards[name].read(position)
        except (OSError, OverflowError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.path}: {name} of image {self.info.ids[position]} cannot be read ({error}): {REMAKE}"
            ) from None
        return canvas[:height, :width]


class _Shards:
    """The chunks of an array as `write_store` lays them out (Zarr v3, codec `sharding_indexed`), one image each.

    A shard file ends with the offset and length of each of its chunks (two little-endian 64-bit words) and the CRC-32C
    of that index. All indices are read here, which also finds every missing and every truncated file.

    Raises:
        ValueError: the array has another layout, or a file is missing or damaged.
    """

    def __init__(self, folder: Path, array: zarr.Array[Any]) -> None:
        count, *canvas = array.shape
        if array.shards is None or array.chunks != (1, *canvas) or array.compressors != (CODEC,):
            raise ValueError(f"{folder} was not written by cosa-fast (other chunks or compression): {REMAKE}")
        self.canvas, self.per_shard = tuple(canvas), array.shards[0]
        self.files = [folder / "c" / str(shard) / "0" / "0" for shard in range(-(-count // self.per_shard))]
        index = [self._index(file) for file in self.files]
        self.chunks: list[list[int]] = np.concatenate(index)[:count].tolist()

    def read(self, position: int) -> Pixels:
        """(H, W) uint8, the canvas of one image."""
        offset, length = self.chunks[position]
        with open(self.files[position // self.per_shard], "rb", buffering=0) as handle:
            handle.seek(offset)
            compressed = handle.read(length)
        pixels = np.empty(self.canvas, dtype=np.uint8)
        zstd.decompress(compressed, pixels)
        return pixels

    def _index(self, file: Path) -> NDArray[np.uint64]:
        """(per_shard, 2) offset and length of each chunk of a shard, in bytes."""
        size = 16 * self.per_shard + 4
        try:
            with open(file, "rb") as handle:
                handle.seek(-size, 2)
                words = CRC32C(location="end").decode(handle.read())
        except FileNotFoundError:
            raise ValueError(f"{file} is missing: {REMAKE}") from None
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): {REMAKE}") from None
        return np.frombuffer(words, dtype="<u8").reshape(-1, 2)


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(name)
    return array


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" ... ({len(names)})" if len(names) > 4 else "")
