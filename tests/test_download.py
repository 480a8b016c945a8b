"""Downloading, against a server on this machine; the real addresses are never contacted."""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage
from scipy.io import savemat
from tiny_datasets import small_voc, write_mask

from cosa_fast.config import CocoConfig, DataConfig, MiniVocConfig, VocConfig
from cosa_fast.data import download
from cosa_fast.data.download import COCO, SBD, VOC_TRAINVAL, Archive, download_coco, download_voc
from cosa_fast.data.masks import load_masks, prepare_masks, read_mask
from cosa_fast.data.prepare import prepare_index
from cosa_fast.files import exclusive

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves `files`; `cut` breaks each transfer off after so many bytes, as often as `cuts` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.cut = 0
        self.cuts = 0
        self.log: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def archive(self, name: str, content: bytes) -> Archive:
        self.files[name] = content
        return Archive(name, (self.url(name),), hashlib.md5(content).hexdigest(), len(content), len(content))


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.log.append((self.path, asked))
        content = self.server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if asked and self.server.ranges else 200)
        if asked and self.server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if self.server.cuts > 0:
            self.server.cuts -= 1
            body = body[: self.server.cut]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "RETRY_WAITS", (0, 0))
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


# One archive


def test_interrupted_transfer_goes_on_by_range(tmp_path: Path, server: Server) -> None:
    archive = server.archive("a.bin", CONTENT)
    server.cut, server.cuts = download.CHUNK + 34_464, 2  # the incomplete read is lost
    path = download._fetch(archive, tmp_path)
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in server.log] == [None, "bytes=65536-", "bytes=131072-"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin"]


def test_a_new_run_goes_on_where_the_last_one_was_stopped(tmp_path: Path, server: Server) -> None:
    archive = server.archive("a.bin", CONTENT)
    server.cut, server.cuts = 0, 100
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:123_456])
    with pytest.raises(ValueError, match="run again to go on from the 123456 bytes received") as caught:
        download._fetch(archive, tmp_path)
    assert "the connection broke off" in str(caught.value)
    server.cuts = 0
    server.log.clear()
    assert download._fetch(archive, tmp_path).read_bytes() == CONTENT
    assert server.log == [("/a.bin", "bytes=123456-")]
    server.log.clear()
    download._fetch(archive, tmp_path)
    assert server.log == []  # complete and checked: not fetched again


def test_stopped_between_the_last_byte_and_the_check(tmp_path: Path, server: Server) -> None:
    archive = server.archive("a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    assert download._fetch(archive, tmp_path).read_bytes() == CONTENT
    assert len(server.log) == 1


def test_leftover_of_another_longer_file_is_dropped(tmp_path: Path, server: Server) -> None:
    archive = server.archive("a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    assert download._fetch(archive, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.log] == ["bytes=300004-", None]


def test_server_without_range_sends_everything_again(tmp_path: Path, server: Server) -> None:
    archive = server.archive("a.bin", CONTENT)
    server.ranges = False
    server.cut, server.cuts = download.CHUNK, 1
    assert download._fetch(archive, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.log] == [None, "bytes=65536-"]


def test_wrong_checksum_is_refused_and_fetched_anew(tmp_path: Path, server: Server) -> None:
    archive = server.archive("a.bin", CONTENT)
    server.files["a.bin"] = CONTENT[:-1] + b"x"
    with pytest.raises(ValueError, match=f"checksum is not md5 {archive.md5}"):
        download._fetch(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.files["a.bin"] = CONTENT
    assert download._fetch(archive, tmp_path).read_bytes() == CONTENT


def test_damaged_leftover_is_found_by_the_checksum(tmp_path: Path, server: Server) -> None:
    archive = server.archive("a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="damaged and was deleted"):
        download._fetch(archive, tmp_path)
    assert download._fetch(archive, tmp_path).read_bytes() == CONTENT


def test_next_address_is_tried_and_goes_on(tmp_path: Path, server: Server) -> None:
    archive = server.archive("a.bin", CONTENT)
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:1000])
    urls = (server.url("absent.bin"), "http://127.0.0.1:1/a.bin", *archive.urls)
    mirrored = Archive(archive.name, urls, archive.md5, archive.size, archive.unpacked)
    assert download._fetch(mirrored, tmp_path).read_bytes() == CONTENT
    assert server.log == [("/absent.bin", "bytes=1000-"), ("/a.bin", "bytes=1000-")]
    with pytest.raises(ValueError, match=r"(?s)absent.bin: the server answered 404 .*:1/a.bin: no connection"):
        download._fetch(Archive("b.bin", urls[:2], "0" * 32, 1, 1), tmp_path)


def test_full_disk_is_told_before_anything_is_fetched(tmp_path: Path, server: Server) -> None:
    archive = server.archive("a.bin", CONTENT)
    huge = Archive(archive.name, archive.urls, archive.md5, 10**18, 10**18)
    with pytest.raises(ValueError, match=r"MiB free but downloading and unpacking a.bin needs"):
        download._fetch(huge, tmp_path)
    assert server.log == []


def test_disk_filling_up_keeps_what_was_received(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco = {"val2017": server.archive("val2017.zip", zipped({"val2017/1.jpg": b"image"}))}
    monkeypatch.setattr(download, "COCO", coco)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text("{}")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", full)
    with pytest.raises(ValueError, match="no space left to write"):
        download_coco(tmp_path, 2017, ["val"])
    assert not (tmp_path / "val2017").exists()
    assert (tmp_path / ".download/val2017.zip").exists()


# The datasets


def test_published_archives_are_complete() -> None:
    archives = [VOC_TRAINVAL, SBD, *COCO.values()]
    assert len({archive.md5 for archive in archives}) == len(archives) == 8
    for archive in archives:
        assert len(bytes.fromhex(archive.md5)) == 16
        assert all(url.startswith("http") and url.endswith(f"/{archive.name}") for url in archive.urls)


@pytest.fixture
def voc_server(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """VOC: train a, b; val c; e, f unlisted. SBD: train a, c, e; val f. Masks hold 1 in VOC and 2 in SBD."""
    source = small_voc(tmp_path / "source")
    for name in ("e", "f"):
        (source / f"JPEGImages/{name}.jpg").write_bytes((source / "JPEGImages/a.jpg").read_bytes())
        (source / f"Annotations/{name}.xml").write_bytes((source / "Annotations/a.xml").read_bytes())
    for name in ("a", "b", "c"):
        write_mask(source / f"SegmentationClass/{name}.png", np.ones((8, 12)))
    files = {
        f"VOCdevkit/VOC2012/{path.relative_to(source)}": path.read_bytes()
        for path in source.rglob("*")
        if path.is_file()
    }
    files["VOCdevkit/VOC2012/SegmentationObject/a.png"] = b"not wanted"
    matrix = io.BytesIO()
    savemat(matrix, {"GTcls": {"Segmentation": np.full((8, 12), 2, dtype=np.uint8), "CategoriesPresent": [2]}})
    sbd = {f"benchmark_RELEASE/dataset/cls/{name}.mat": matrix.getvalue() for name in ("a", "c", "e", "f")}
    sbd |= {
        "benchmark_RELEASE/dataset/inst/a.mat": b"not wanted",
        "benchmark_RELEASE/dataset/train.txt": b"a\nc\ne\n",
        "benchmark_RELEASE/dataset/val.txt": b"f\n",
    }
    monkeypatch.setattr(download, "VOC_TRAINVAL", server.archive("voc.tar", tar(files)))
    monkeypatch.setattr(download, "SBD", server.archive("benchmark.tgz", tar(sbd, "w:gz")))
    return server


def test_voc_with_sbd_from_download_to_masks(
    tmp_path: Path, voc_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        index = prepare_index(
            tmp_path / "index.json",
            tmp_path / "cache",
            data=DataConfig(),
            voc=VocConfig(download=True),
            coco=CocoConfig(),
            minivoc=MiniVocConfig(),
        )
    root = tmp_path / "cache/VOC2012"
    assert "train_aug: 4 images" in caplog.text
    assert (root / "ImageSets/Segmentation/train_aug.txt").read_text() == "a\nb\ne\nf\n"
    assert [image.id for image in index.train] == ["a", "b", "e", "f"]
    assert (index.name, index.root) == ("VOC2012", str(root.resolve()))
    assert not (root / "SegmentationObject").exists()
    assert not (root / ".download").exists()
    prepare_masks(tmp_path / "index.json", tmp_path / "masks.json", tmp_path / "cache")
    masks = load_masks(tmp_path / "masks.json")
    values = {image.id: int(read_mask(masks.path("train_aug", image.id), (12, 8))[0, 0]) for image in index.train}
    assert values == {"a": 1, "b": 1, "e": 2, "f": 2}  # VOC's own masks where it has them
    assert masks.path("val", "c").parent.name == "SegmentationClass"
    with PilImage.open(masks.path("train_aug", "e")) as image:
        assert image.mode == "P"

    voc_server.log.clear()
    download_voc(root, train_aug=True)
    assert voc_server.log == []


def test_sbd_is_fetched_only_for_train_aug_and_later_too(tmp_path: Path, voc_server: Server) -> None:
    root = tmp_path / "VOC2012"
    download_voc(root, train_aug=False)
    assert [path for path, _ in voc_server.log] == ["/voc.tar"]
    assert not (root / "SegmentationClassAug").exists()
    download_voc(root, train_aug=True)
    assert [path for path, _ in voc_server.log] == ["/voc.tar", "/benchmark.tgz"]


def test_stopped_while_unpacking(tmp_path: Path, voc_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "VOC2012"
    moves: list[str] = []
    replace = download.os.replace

    def stop_at_images(source: Path, target: Path) -> None:
        moves.append(Path(target).name)
        if Path(target).name == "JPEGImages":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(download.os, "replace", stop_at_images)
    with pytest.raises(KeyboardInterrupt):
        download_voc(root, train_aug=False)
    assert moves[-4:] == ["SegmentationClass", "Annotations", "ImageSets", "JPEGImages"]
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    voc_server.log.clear()
    archive = voc_server.archive("voc.tar", voc_server.files["voc.tar"])
    monkeypatch.setattr(download, "VOC_TRAINVAL", archive)
    mine = root / "Annotations/a.xml"
    mine.write_text(mine.read_text() + "\n")
    download_voc(root, train_aug=False)
    assert voc_server.log == []
    assert (root / "JPEGImages/a.jpg").is_file()
    assert mine.read_text().endswith("\n")  # what is there already is left alone


def test_coco_fetches_only_the_used_splits(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = {
        f"annotations/{kind}_{split}2017.json": b"{}"
        for kind in ("instances", "captions")
        for split in ("train", "val")
    }
    coco = {
        "annotations2017": server.archive("annotations_trainval2017.zip", zipped(annotations)),
        "val2017": server.archive("val2017.zip", zipped({"val2017/1.jpg": b"one", "val2017/2.jpg": b"two"})),
    }
    monkeypatch.setattr(download, "COCO", coco)
    download_coco(tmp_path / "coco", 2017, ["val"])
    files = sorted(path.relative_to(tmp_path / "coco").as_posix() for path in (tmp_path / "coco").rglob("*.*"))
    assert files == ["annotations/instances_val2017.json", "val2017/1.jpg", "val2017/2.jpg"]
    server.log.clear()
    download_coco(tmp_path / "coco", 2017, ["val"])
    assert server.log == []
    with pytest.raises(ValueError, match="fetches the splits train and val: put minival into"):
        download_coco(tmp_path / "coco", 2017, ["minival"])


def test_one_download_at_a_time(tmp_path: Path, voc_server: Server) -> None:
    root = tmp_path / "VOC2012"
    with exclusive(root / ".download"), pytest.raises(ValueError, match="another process is working in"):
        download_voc(root, train_aug=False)
    assert voc_server.log == []


def test_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file"):
        download_voc(tmp_path / "file", train_aug=False)
