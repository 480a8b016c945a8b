"""The evaluation server's archive: what is in it, that it survives a kill, and that the check finds what is wrong."""

from __future__ import annotations

import gzip
import io
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from cosa_fast import submission
from cosa_fast.config import EvalConfig, MultistageConfig, RuntimeConfig
from cosa_fast.data.classes import VOC_CLASSES, voc_palette
from cosa_fast.inference import label_map, normalise, predict, predict_segmenter, resize, square, to_tensor
from cosa_fast.models.checkpoint import load_cosa
from cosa_fast.models.segmenter import build_segmenter, load_segmenter, save_segmenter
from cosa_fast.predictors import Batch, System, Views
from cosa_fast.runtime import resolve
from cosa_fast.submission import check_submission, write_submission
from tests.tiny_photos import write_photo
from tests.tiny_results import write_checkpoint

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared/photos/voc/VOC2012"
CPU = RuntimeConfig(device="cpu")
EVAL = EvalConfig(scales=(1.0, 0.5), flip=True, size=48, batch_size=2)
SIZES = {
    "2008_000006": (40, 61),
    "2008_000011": (56, 40),
    "2008_000012": (33, 33),
    "2009_000002": (20, 75),
    "b": (48, 48),
}
FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOC2012 folder with a test list, not in alphabetical order, and nothing but it."""
    folder = tmp_path_factory.mktemp("voc") / "VOC2012"
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        write_photo(folder / "JPEGImages" / f"{name}.jpg", height, width, seed)
    write_list(folder, "test", [*SIZES][::-1])
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cosa") / "cosa.safetensors", VOC_CLASSES)


@pytest.fixture(scope="module")
def archive(root: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "voc.tgz"
    write(root, path, checkpoint)
    return path


def write_list(root: Path, name: str, ids: list[str]) -> None:
    path = root / "ImageSets/Segmentation" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(ids) + "\n")


def write(root: Path, output: Path, checkpoint: Path | None, segmenter: Path | None = None, **settings: Any) -> None:
    settings = {"evaluation": EVAL, "runtime": CPU, "threads": 1, "image_list": "test"} | settings
    write_submission(root=root, output=output, checkpoint=checkpoint, segmenter=segmenter, **settings)


def members(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


def values(content: bytes) -> np.ndarray:
    with PilImage.open(io.BytesIO(content)) as image:
        assert (image.format, image.mode) == ("PNG", "P")
        return np.array(image)


def rebuilt(archive: Path, output: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with its files changed."""
    files = members(archive)
    change(files)
    with tarfile.open(output, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return output


def encoded(pixels: np.ndarray, palette: bool = True, **options: Any) -> bytes:
    image, buffer = PilImage.fromarray(pixels), io.BytesIO()
    if palette:
        image.putpalette(voc_palette())
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def expected(root: Path, name: str, checkpoint: Path | None, segmenter: Path | None = None) -> np.ndarray:
    """The label-free prediction of one image, step by step."""
    machine = resolve(CPU)
    with PilImage.open(root / "JPEGImages" / f"{name}.jpg") as file:
        image = file.convert("RGB")
    if checkpoint is not None:
        cosa = load_cosa(checkpoint)
        pixels = normalise(square(image, 48)[None], cosa.mean, cosa.std, machine.device)
        scores = predict(cosa.net, pixels, torch.ones(1, 20), EVAL.scales, True, machine).seg[0]
    else:
        assert segmenter is not None
        net = load_segmenter(segmenter)
        pixels = normalise(to_tensor(image)[None], net.mean, net.std, machine.device)
        scores = predict_segmenter(net.net, pixels, EVAL.scales, True, machine)[0]
    return label_map(resize(scores, (image.height, image.width))).numpy()


def test_holds_one_palette_png_per_image_and_nothing_else(root: Path, checkpoint: Path, archive: Path) -> None:
    files = members(archive)
    assert list(files) == [f"{FOLDER}/{name}.png" for name in sorted(SIZES)]
    found = set()
    for name, size in SIZES.items():
        content = files[f"{FOLDER}/{name}.png"]
        assert content[24:26] == bytes([8, 3])  # bits, palette
        with PilImage.open(io.BytesIO(content)) as image:
            assert image.getpalette() == voc_palette()
        labels = values(content)
        assert labels.shape == size
        assert (labels != expected(root, name, checkpoint)).mean() < 0.002
        found |= set(np.unique(labels).tolist())
    assert len(found) > 1
    assert max(found) <= 20
    assert [path.name for path in archive.parent.iterdir()] == ["voc.tgz"]


def test_cosa_ms_at_the_images_own_sizes(root: Path, tmp_path: Path) -> None:
    config = MultistageConfig(architecture="Linknet", encoder="tu-test_resnet", encoder_weights=None)
    torch.manual_seed(0)
    net = build_segmenter(config, 21)
    save_segmenter(tmp_path / "ms", net, classes=VOC_CLASSES, dataset="VOC2012", config=config, store={})
    write(root, tmp_path / "voc.tgz", None, tmp_path / "ms", competition="comp5")
    files = members(tmp_path / "voc.tgz")
    assert set(files) == {f"results/VOC2012/Segmentation/comp5_test_cls/{name}.png" for name in SIZES}
    for name, content in files.items():
        assert (values(content) != expected(root, Path(name).stem, None, tmp_path / "ms")).mean() < 0.002


def test_same_input_gives_the_same_bytes(root: Path, checkpoint: Path, archive: Path, tmp_path: Path) -> None:
    write(root, tmp_path / "other_name.tgz", checkpoint)
    assert (tmp_path / "other_name.tgz").read_bytes() == archive.read_bytes()
    with tarfile.open(archive) as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "", 0o644)}


def test_crf(root: Path, checkpoint: Path, archive: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydensecrf.densecrf")
    from cosa_fast.crf import CRF_PRESETS, dense_crf

    write(root, tmp_path / "crf.tgz", checkpoint, evaluation=EVAL.model_copy(update={"crf": "standard"}))
    files, machine, cosa = members(tmp_path / "crf.tgz"), resolve(CPU), load_cosa(checkpoint)
    for name in SIZES:
        with PilImage.open(root / "JPEGImages" / f"{name}.jpg") as file:
            image = file.convert("RGB")
        pixels = normalise(square(image, 48)[None], cosa.mean, cosa.std, machine.device)
        seg = predict(cosa.net, pixels, torch.ones(1, 20), EVAL.scales, True, machine).seg[0]
        probabilities = resize(seg, (image.height, image.width)).softmax(dim=0)
        wanted = dense_crf(np.array(image), probabilities.numpy(), CRF_PRESETS["standard"])
        assert (values(files[f"{FOLDER}/{name}.png"]) != wanted).mean() < 0.01
    assert members(archive) != files


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Ctrl-C when so many predictions are written; their names."""
    written: list[str] = []
    real = submission.write_atomically

    def write_or_stop(path: Path, content: Any) -> None:
        if path.suffix == ".png":
            if len(written) == after:
                raise KeyboardInterrupt
            written.append(path.stem)
        real(path, content)

    monkeypatch.setattr(submission, "write_atomically", write_or_stop)
    return written


def test_continues_after_a_kill(
    root: Path, checkpoint: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, order = tmp_path / "voc.tgz", [*SIZES][::-1]
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            write(root, output, checkpoint)
    assert not output.exists()
    work = tmp_path / ".voc.tgz.partial"
    assert {path.stem for path in work.glob("*.png")} == set(order[:3])
    (work / f"{order[0]}.png").write_bytes((work / f"{order[1]}.png").read_bytes())  # is kept if it is not done again
    with monkeypatch.context() as patch:
        again = interrupt(patch, after=99)
        with pytest.raises(ValueError, match=f"{order[0]}.png is 75x20, but its image 48x48"):
            write(root, output, checkpoint)
        assert again == order[2:]  # the second batch was done in part
    assert not list(work.glob("*.png"))
    with monkeypatch.context() as patch:
        interrupt(patch, after=4)
        with pytest.raises(KeyboardInterrupt):
            write(root, output, checkpoint)
    write(root, output, checkpoint)
    assert output.read_bytes() == archive.read_bytes()
    assert list(tmp_path.iterdir()) == [output]


def test_other_settings_start_anew(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, after=4)
        with pytest.raises(KeyboardInterrupt):
            write(root, tmp_path / "voc.tgz", checkpoint)
    with monkeypatch.context() as patch:
        written = interrupt(patch, after=99)
        write(root, tmp_path / "voc.tgz", checkpoint, evaluation=EVAL.model_copy(update={"network": "online"}))
    assert written == [*SIZES][::-1]


def test_a_failed_check_leaves_the_former_archive(
    root: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "voc.tgz").write_bytes(b"former")

    def void(system: System, batches: Iterable[Batch], views: Views) -> Iterator[np.ndarray]:
        return (np.full(size, 255, np.uint8) for batch in batches for size in batch.sizes)

    monkeypatch.setattr(submission, "label_maps", void)
    with pytest.raises(ValueError, match=r"5 problems in the submission(.|\n)*holds the value 255: wanted 0 to 20"):
        write(root, tmp_path / "voc.tgz", checkpoint)
    assert (tmp_path / "voc.tgz").read_bytes() == b"former"


def test_refuses_before_any_work(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "voc.tgz"
    for given in [(None, None), (checkpoint, checkpoint)]:
        with pytest.raises(ValueError, match="either the checkpoint of CoSA or the segmenter of CoSA-MS"):
            write(root, output, *given)
    with pytest.raises(ValueError, match=r"voc\.zip must be a \.tgz file"):
        write(root, tmp_path / "voc.zip", checkpoint)
    with pytest.raises(ValueError, match=r"Segmentation/nothing\.txt does not exist: root must be .*VOC2012test\.tar"):
        write(root, output, checkpoint, image_list="nothing")
    write_list(root, "twice", ["b", "2008_000006", "b"])
    with pytest.raises(ValueError, match=r"twice\.txt names 1 images more than once \(b\)"):
        write(root, output, checkpoint, image_list="twice")
    write_list(root, "gone", ["b", "2007_000001", "2007_000002"])
    with pytest.raises(ValueError, match=r"2 problems in the images of .*gone\.txt(.|\n)*2007_000001\.jpg is missing"):
        write(root, output, checkpoint, image_list="gone")
    write_list(root, "empty", [])
    with pytest.raises(ValueError, match="the split 'empty' is empty"):
        write(root, output, checkpoint, image_list="empty")
    other = write_checkpoint(tmp_path / "other", VOC_CLASSES[::-1])
    with pytest.raises(ValueError, match=r"other was trained for 20 classes of Rectangles \(tvmonitor, train, sofa"):
        write(root, output, other)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_damaged_image_keeps_what_is_done(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "VOC2012"
    for name in ("b", "2008_000006", "2008_000011"):
        (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
        content = (root / "JPEGImages" / f"{name}.jpg").read_bytes()
        (folder / "JPEGImages" / f"{name}.jpg").write_bytes(content[:-200] if name == "2008_000011" else content)
    write_list(folder, "test", ["b", "2008_000006", "2008_000011"])
    with pytest.raises(ValueError, match=r"cannot decode .*2008_000011\.jpg .*: restore the file, then run again"):
        write(folder, tmp_path / "voc.tgz", checkpoint)
    assert {path.stem for path in (tmp_path / ".voc.tgz.partial").glob("*.png")} == {"b", "2008_000006"}


def test_says_when_the_list_is_not_the_official_one(
    root: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cosa_fast"):
        write(root, tmp_path / "voc.tgz", checkpoint)
    assert "official test list has 1456 images, this one 5" in caplog.text


# The check.


def test_a_right_archive_passes(root: Path, archive: Path, tmp_path: Path) -> None:
    check_submission(archive, root, "test")
    packed = tmp_path / "by_tar.tgz"
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "files", filter="data")
    with tarfile.open(packed, "w:gz") as tar:  # as `tar czf` does, folders included
        tar.add(tmp_path / "files/results", "results")
    check_submission(packed, root, "test")


def first(files: dict[str, bytes]) -> str:
    return f"{FOLDER}/2008_000006.png"


def put(content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({first(files): content})


FAULTS: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "missing": (lambda files: files.pop(first(files)), "2008_000006 is missing"),
    "extra": (
        lambda files: files.update({f"{FOLDER}/2007_000033.png": files[first(files)]}),
        r"2007_000033\.png does not belong there: no image of test has this name",
    ),
    "note": (lambda files: files.update({"results/README": b"x"}), "results/README does not belong there"),
    "folder": (
        lambda files: files.update({"comp6_test_cls/2008_000006.png": files.pop(first(files))}),
        rf"comp6_test_cls/2008_000006\.png is in the wrong folder: wanted {FOLDER}",
    ),
    "competitions": (
        lambda files: files.update({first(files).replace("comp6", "comp5"): files.pop(first(files))}),
        "in comp5_test_cls and in comp6_test_cls: an archive is for one of them",
    ),
    "twice": (
        lambda files: files.update({first(files).replace("comp6", "comp5"): files[first(files)]}),
        "2008_000006 is there twice",
    ),
    "grey": (put(encoded(np.zeros((40, 61), np.uint8), palette=False)), "mode L with 8 bits: wanted a palette of 8"),
    "colours": (put(encoded(np.zeros((40, 61, 3), np.uint8), palette=False)), "mode RGB with 8 bits"),
    "bits": (put(encoded(np.zeros((40, 61), np.uint8), bits=4)), "mode P with 4 bits: wanted a palette of 8 bits"),
    "size": (put(encoded(np.zeros((61, 40), np.uint8))), r"2008_000006\.png is 40x61, but its image 61x40"),
    "void": (put(encoded(np.full((40, 61), 255, np.uint8), bits=8)), "holds the value 255: wanted 0 to 20"),
    "class": (put(encoded(np.full((40, 61), 21, np.uint8), bits=8)), "holds the value 21: wanted 0 to 20"),
    "jpeg": (put(b"\xff\xd8\xff\xe0 not a png"), r"2008_000006\.png cannot be read as PNG"),
    "short": (
        lambda files: files.update({first(files): files[first(files)][:-40]}),
        r"2008_000006\.png cannot be read as PNG",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds(fault: str, root: Path, archive: Path, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    broken = rebuilt(archive, tmp_path / "broken.tgz", change)
    with pytest.raises(ValueError, match=message) as caught:
        check_submission(broken, root, "test")
    assert "problem" in str(caught.value).splitlines()[0]
    assert len(str(caught.value).splitlines()) == (3 if fault == "twice" else 2)  # and nothing that is not wrong


def test_the_check_finds_a_damaged_archive(root: Path, archive: Path, tmp_path: Path) -> None:
    for number, content in enumerate([archive.read_bytes()[:-300], b"no gzip", b"", gzip.compress(b"no tar")]):
        path = tmp_path / f"{number}.tgz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"the archive cannot be read beyond its first [0-4] predictions"):
            check_submission(path, root, "test")
    with pytest.raises(ValueError, match=r"there is no archive .*none\.tgz"):
        check_submission(tmp_path / "none.tgz", root, "test")


def test_the_check_names_the_first_ten_problems(root: Path, archive: Path, tmp_path: Path) -> None:
    many = rebuilt(archive, tmp_path / "many.tgz", lambda files: files.update({f"x{n}": b"" for n in range(12)}))
    with pytest.raises(ValueError, match="12 problems in the submission") as caught:
        check_submission(many, root, "test")
    assert str(caught.value).count("does not belong there") == 10
    assert "and 2 more" in str(caught.value)


@pytest.mark.photos
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs of ../shared/photos are not here")
def test_photographs(checkpoint: Path, tmp_path: Path) -> None:
    write(
        PHOTOS, tmp_path / "val.tgz", checkpoint, image_list="val", evaluation=EVAL.model_copy(update={"scales": (1,)})
    )
    ids = (PHOTOS / "ImageSets/Segmentation/val.txt").read_text().split()
    files = members(tmp_path / "val.tgz")
    assert list(files) == [f"{FOLDER}/{name}.png" for name in sorted(ids)]
    for name in ids:
        with PilImage.open(PHOTOS / "SegmentationClass" / f"{name}.png") as mask:
            assert values(files[f"{FOLDER}/{name}.png"]).shape == (mask.height, mask.width)
