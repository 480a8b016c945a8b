"""Fetching VOC 2012, SBD and COCO from their official servers: resumable, checksums verified.

Archives and half-written files stay in `<root>/.download`. A folder of the dataset appears under `root` by one rename
once it is complete, so its existence means that it need not be fetched again.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import pooch
import requests
from PIL import Image as PilImage
from tqdm import tqdm

from cosa_fast.data.classes import voc_palette
from cosa_fast.data.voc import AUG_MASKS, find_list, read_split
from cosa_fast.files import describe_os_error, exclusive, require_space, write_atomically

logger = logging.getLogger(__name__)

TIMEOUT = 60
"""Seconds without a byte after which a connection counts as broken."""
RETRY_WAITS = (1, 5, 15, 60)
"""Seconds to wait before each attempt to go on with a broken transfer; progress starts the count again."""
CHUNK = 2**16
"""Bytes per read; a broken connection loses at most the read under way."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A published file."""

    name: str
    urls: tuple[str, ...]
    """The same bytes at several addresses, tried in this order."""
    md5: str
    size: int
    """Bytes."""
    unpacked: int
    """Bytes of what is used of it, roughly."""


VOC_TRAINVAL = Archive(
    "VOCtrainval_11-May-2012.tar",
    (
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar",
    ),
    "6cd6e144f989b92b3379bac3b3de84fd",
    1_999_639_040,
    2_000_000_000,
)
SBD = Archive(
    "benchmark.tgz",
    (
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    ),
    "82b4d87ceb2ed10f6038a1cba92111cb",
    1_419_539_633,
    100_000_000,
)


def _coco(path: str, md5: str, size: int, unpacked: int) -> Archive:
    # The bucket's own name holds dots, which its HTTPS certificate does not cover.
    urls = (f"https://s3.amazonaws.com/images.cocodataset.org/{path}", f"http://images.cocodataset.org/{path}")
    return Archive(PurePosixPath(path).name, urls, md5, size, unpacked)


COCO = {
    "train2014": _coco("zips/train2014.zip", "0da8c0bd3d6becc4dcb32757491aca88", 13_510_573_713, 13_600_000_000),
    "val2014": _coco("zips/val2014.zip", "a3d79f5ed8d289b7a7554ce06a5782b3", 6_645_013_297, 6_700_000_000),
    "train2017": _coco("zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", 19_336_861_798, 19_400_000_000),
    "val2017": _coco("zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", 815_585_330, 820_000_000),
    "annotations2014": _coco(
        "annotations/annotations_trainval2014.zip", "0a379cfc70b0e71301e0f377548639bd", 252_872_794, 520_000_000
    ),
    "annotations2017": _coco(
        "annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c", 252_907_541, 520_000_000
    ),
}


def download_voc(root: Path, *, train_aug: bool) -> None:
    """Fetch VOC 2012 trainval to `root`, the VOC2012 folder itself, and for `train_aug` the SBD annotations.

    SBD's .mat masks become palette PNGs in SegmentationClassAug, with VOC's own masks where VOC has one, and
    ImageSets/Segmentation/train_aug.txt lists (SBD train + SBD val + VOC train) less VOC val: 10,582 images.

    Raises:
        ValueError: a server cannot be reached, a checksum is wrong, or the disk is full.
    """
    # Masks first: once the folders that are looked for exist, so do the masks.
    folders = ("SegmentationClass", "Annotations", "ImageSets", "JPEGImages")
    needs_voc = any(not (root / folder).is_dir() for folder in folders[1:])
    needs_sbd = train_aug and find_list(root, "train_aug") is None and not (root / AUG_MASKS).is_dir()
    if not needs_voc and not needs_sbd:
        return
    with _staging(root) as staging:
        if needs_voc:
            archive = _fetch(VOC_TRAINVAL, staging)
            _unpack(archive, staging, root, "VOCdevkit/VOC2012/", folders)
        if needs_sbd:
            _convert_sbd(_fetch(SBD, staging), staging, root)


def download_coco(root: Path, year: int, splits: Sequence[str]) -> None:
    """Fetch the images and instance annotations of `splits` (train, val) of COCO 2014 or 2017 to `root`.

    Raises:
        ValueError: a split has no official archive, a server cannot be reached, a checksum is wrong, or the disk is
            full.
    """
    files = [f"annotations/instances_{split}{year}.json" for split in splits]
    folders = [f"{split}{year}" for split in splits]
    missing_folders = [folder for folder in folders if not (root / folder).is_dir()]
    missing_files = [file for file in files if not (root / file).is_file()]
    if not missing_folders and not missing_files:
        return
    if others := [split for split in splits if split not in ("train", "val")]:
        raise ValueError(
            f"coco.download fetches the splits train and val: put {', '.join(others)} into {root} yourself"
        )
    with _staging(root) as staging:
        if missing_files:
            _unpack(_fetch(COCO[f"annotations{year}"], staging), staging, root, "", missing_files)
        for folder in missing_folders:
            _unpack(_fetch(COCO[folder], staging), staging, root, "", [folder])


class ResumingDownloader:
    """A pooch downloader that goes on from the bytes it has, by HTTP Range, after a broken transfer or a restart."""

    def __init__(self, part: Path) -> None:
        """`part` keeps the bytes received so far until the file is complete."""
        self.part = part

    def __call__(self, url: str, output_file: str, pooch: object) -> None:
        """Fetch `url` into `output_file` (pooch's temporary file, whose checksum it then verifies).

        Raises:
            requests.RequestException: the server cannot be reached, refuses, or keeps breaking the connection.
        """
        failures = 0
        received = False
        while True:
            before = self._have()
            try:
                self._transfer(url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
                progress = self._have() > before
                received |= progress
                failures = 1 if progress else failures + 1
                if not received or failures > len(RETRY_WAITS):
                    raise
                wait = RETRY_WAITS[failures - 1]
                logger.warning("the transfer of %s broke off at byte %d; again in %d s", url, self._have(), wait)
                time.sleep(wait)
        os.replace(self.part, output_file)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _transfer(self, url: str) -> None:
        have = self._have()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            span = response.headers.get("Content-Range", "")
            if response.status_code == 416 and span == f"bytes */{have}":
                return  # killed between the last byte and the checksum
            if have and (response.status_code == 416 or (response.status_code == 206 and f"bytes {have}-" not in span)):
                self.part.unlink()  # not a piece of this file
                return self._transfer(url)
            response.raise_for_status()
            resumed = response.status_code == 206
            start = have if resumed else 0  # a server without Range sends everything again
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with (
                open(self.part, "ab" if resumed else "wb") as handle,
                tqdm(
                    total=total,
                    initial=start,
                    desc=self.part.stem,
                    unit="B",
                    unit_scale=True,
                    unit_divisor=1024,
                    disable=None,
                ) as bar,
            ):
                for chunk in response.iter_content(CHUNK):
                    handle.write(chunk)
                    bar.update(len(chunk))
        if total is not None and self._have() != total:
            raise requests.ConnectionError(f"{url} ended at byte {self._have()} of {total}")


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """`<root>/.download`, held by this process; removed after success, kept to go on from otherwise."""
    folder = root / ".download"
    try:
        with exclusive(folder):
            yield folder
            shutil.rmtree(folder)
    except OSError as error:
        raise ValueError(describe_os_error(error, folder)) from error


def _fetch(archive: Archive, staging: Path) -> Path:
    """Download an archive with the right checksum into `staging`, from the first server that has it."""
    part = staging / f"{archive.name}.part"
    have = sum(path.stat().st_size for path in (part, staging / archive.name) if path.exists())
    require_space(staging, archive.size - have + archive.unpacked, f"downloading and unpacking {archive.name}")
    logger.info("fetching %s (%.1f GB, %.1f GB are here already)", archive.name, archive.size / 1e9, have / 1e9)
    pooch.get_logger().setLevel(logging.WARNING)
    reasons = []
    for url in archive.urls:
        try:
            path = pooch.retrieve(
                url, f"md5:{archive.md5}", fname=archive.name, path=staging, downloader=ResumingDownloader(part)
            )
            return Path(path)
        except requests.RequestException as error:
            reasons.append(f"  {url}: {_reason(error)}")
        except ValueError:  # pooch, after removing the file
            reasons.append(f"  {url}: the checksum is not md5 {archive.md5}, what was sent is damaged and was deleted")
    lines = "\n".join(reasons)
    raise ValueError(
        f"cannot download {archive.name}; run again to go on from the {part.stat().st_size if part.exists() else 0} "
        f"bytes received, or fetch it yourself into {staging}:\n{lines}"
    )


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    if isinstance(error, requests.exceptions.ChunkedEncodingError) or not isinstance(error.args[0], Exception):
        return "the connection broke off"
    return "no connection"


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of every file of a tar or zip archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as content:
            for info in content.infolist():
                if not info.is_dir():
                    with content.open(info) as stream:
                        yield info.filename, stream
    else:
        with tarfile.open(archive) as tape:
            for member in tape:
                if member.isfile() and (file := tape.extractfile(member)):
                    yield member.name, file


def _unpack(archive: Path, staging: Path, root: Path, prefix: str, wanted: Sequence[str]) -> None:
    """Give `root` the wanted files and folders of an archive that it lacks, each by one rename, in that order."""
    unpacked = staging / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    for name, stream in tqdm(_members(archive), desc=f"unpacking {archive.name}", unit="file", disable=None):
        inside = name.removeprefix(prefix)
        if ".." not in PurePosixPath(inside).parts and any(f"{inside}/".startswith(f"{item}/") for item in wanted):
            target = unpacked / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as handle:
                shutil.copyfileobj(stream, handle, CHUNK)
    for item in wanted:
        if not (root / item).exists():
            (root / item).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unpacked / item, root / item)
    archive.unlink()


def _convert_sbd(archive: Path, staging: Path, root: Path) -> None:
    """Write SegmentationClassAug and train_aug.txt from SBD's benchmark.tgz and the VOC folders of `root`."""
    from scipy.io import loadmat

    masks = staging / AUG_MASKS
    shutil.rmtree(masks, ignore_errors=True)
    masks.mkdir()
    palette = voc_palette()
    voc_train, voc_val = set(read_split(root, "train")), set(read_split(root, "val"))
    ids = set(voc_train)
    for name, stream in tqdm(_members(archive), desc="converting SBD masks", unit="file", disable=None):
        path = PurePosixPath(name)
        if path.name in ("train.txt", "val.txt"):
            ids.update(stream.read().decode().split())
        elif path.parent.name == "cls" and path.suffix == ".mat" and path.stem not in voc_val:
            mask = loadmat(io.BytesIO(stream.read()), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
            image = PilImage.fromarray(mask.astype("uint8"))
            image.putpalette(palette)
            image.save(masks / f"{path.stem}.png")
    for image_id in voc_train:
        official = root / "SegmentationClass" / f"{image_id}.png"
        if official.is_file():
            shutil.copyfile(official, masks / official.name)
    os.replace(masks, root / AUG_MASKS)
    train_aug = sorted(ids - voc_val)
    content = "".join(f"{image_id}\n" for image_id in train_aug).encode()
    write_atomically(root / "ImageSets/Segmentation/train_aug.txt", content)
    logger.info("train_aug: %d images", len(train_aug))
    archive.unlink()
