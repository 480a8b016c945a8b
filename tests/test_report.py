"""The report: what is on the page, what is left out, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_report import LAYERS, SVG, write_checkpoint, write_csv, write_gallery, write_results

from cosa_fast.report import make_report
from cosa_fast.report.charts import Line, line_chart
from cosa_fast.report.images import embed
from cosa_fast.report.studies import TITLES
from cosa_fast.studies.needs import STUDIES


class Outline(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._hidden = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [values for name, values in self.tags if name == tag]


def report(folder: Path) -> Outline:
    output = folder.parent / "report.html"
    make_report(folder, output)
    return Outline(output.read_text(encoding="utf-8"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_results(tmp_path / "results")


def test_everything_there_is_on_the_page(results: Path) -> None:
    page = report(results)
    for words in (
        "CoSA on MiniVOC",
        "MiniVOC is synthetic",
        "50.2",  # the headline
        "CAM threshold 0.421",  # the text result
        "Table 3a · Adding the parts one by one",
        "49.9 ± 0.5",
        "6 images, 3 classes, 0.3 M parameters, cpu",
        "0.0.7",  # of the store
        "2 min 50 s",  # 170 s of the index
    ):
        assert words in page.text
    assert "iterations: 50" in page.text.partition("Every recorded setting")[0]
    assert "momentum: 0.9994" not in page.text.partition("Every recorded setting")[0]  # a default
    assert "momentum: 0.9994" in page.text


def test_nothing_is_loaded_from_elsewhere(results: Path) -> None:
    page = report(results)
    sources = [image["src"] for image in page.attributes("img") if "src" in image]
    assert len(sources) == 3 * len(LAYERS) + 2
    assert all(source and source.startswith("data:image/") for source in sources)
    assert not [values for tag, values in page.tags if tag in ("script", "link") and "src" in values]
    assert all(image.get("alt") for image in page.attributes("img") if "src" in image)
    policy = page.attributes("meta")[3]["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_same_files_give_the_same_page(results: Path, tmp_path: Path) -> None:
    make_report(results, tmp_path / "a.html")
    make_report(results, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_validation_is_the_mean_over_classes_that_occur(results: Path) -> None:
    labels = [svg.get("aria-label") or "" for svg in report(results).attributes("svg")]
    assert "Segmentation, label-free: mIoU in % by iteration: assignment ends at 35.0; online ends at 35.0" in labels


def test_a_real_dataset_has_no_banner(results: Path) -> None:
    path = results / "pseudo_labels.zarr/zarr.json"
    path.write_text(path.read_text().replace('"synthetic": true', '"synthetic": false'))
    assert "synthetic:" not in report(results).text


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("per_class_iou.csv", "per-class table: snakemake --cores all"),
        ("gallery", "panels: snakemake --cores all"),
        ("cosa.metrics.jsonl", "learning curves: snakemake --cores all"),
        ("cosa.validation.jsonl", "validation during the training: validation.every above 0"),
        ("studies", "studies: snakemake --cores all studies"),
        ("benchmarks", "time per stage: snakemake --cores all"),
    ],
)
def test_what_is_missing_is_named_with_its_command(results: Path, gone: str, named: str) -> None:
    before = report(results).text
    assert re.sub(r"\W+", " ", named) not in re.sub(r"\W+", " ", before)
    path = results / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    after = report(results).text.partition("Not in this report")[2]
    assert re.sub(r"\W+", " ", named) in re.sub(r"\W+", " ", after)


def test_metrics_alone_or_a_text_result_alone_are_enough(results: Path) -> None:
    for keep in ("cosa.metrics.jsonl", "voc_val_miou.txt"):
        small = results.parent / keep.partition(".")[0]
        small.mkdir()
        shutil.copy(results / keep, small)
        page = report(small)
        assert "Not in this report" in page.text
        assert ("CAM threshold 0.421" in page.text) == (keep == "voc_val_miou.txt")


def test_names_are_text_not_markup(results: Path) -> None:
    wicked = "<b>x</b>\"'&"
    table = results / "per_class_iou.csv"
    table.write_text(table.read_text().replace("bird", "<b>x</b>").replace("CoSA-MS", "<script>alert(1)</script>"))
    path = results / "gallery/gallery.json"
    content = json.loads(path.read_text())
    content["palette"][wicked] = "#808000"
    content["images"][0] |= {"id": wicked, "labels": [wicked]}
    path.write_text(json.dumps(content))
    write_csv(results / "studies/ladder.csv", [[wicked], ["</table><img src=x onerror=alert(1)>"]])
    (results / "studies/ladder.svg").rename(results / "studies/<i>.svg")
    page = report(results)
    assert wicked in page.text
    assert "<script>alert(1)</script>" in page.text
    assert not page.attributes("i")
    assert len(page.attributes("script")) == 1
    assert all(not any(key.startswith("on") for key in values) for _, values in page.tags)


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "per_class_iou.csv",
        lambda path: path.write_text("dataset,split\nMiniVOC,val\n"),
        "has the columns dataset,split",
    ),
    ("per_class_iou.csv", lambda path: path.write_text(path.read_text().replace("9.50", "nine")), "'nine' is no IoU"),
    ("per_class_iou.csv", lambda path: path.write_text(path.read_text() + "MiniVOC,val\n"), "row 42 has 2 cells"),
    ("per_class_iou.csv", lambda path: path.write_text(""), "has no rows"),
    ("per_class_iou.csv", lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not a text file"),
    ("cosa.metrics.jsonl", lambda path: path.write_text('{"iteration": 1}\n{"itera'), "line 2 is not valid JSON"),
    ("cosa.metrics.jsonl", lambda path: path.write_text('{"iteration": 1, "loss": "x"}'), "loss of iteration 1 is 'x'"),
    ("cosa.metrics.jsonl", lambda path: path.write_text(""), "is empty"),
    (
        "cosa.validation.jsonl",
        lambda path: path.write_text('{"iteration": 1, "network": "online", "seg_free": 3}'),
        "seg_free of iteration 1 has no pixel counts",
    ),
    ("cosa.safetensors", lambda path: path.write_bytes(b"no"), "is not a readable safetensors file"),
    ("cosa.safetensors", lambda path: write_checkpoint(path, config=None), "is not a checkpoint of cosa-fast"),
    ("pseudo_labels.zarr/zarr.json", lambda path: path.write_text("{"), "is not valid JSON"),
    ("benchmarks/train.tsv", lambda path: path.write_text("s\tx\n-\t1\n"), "has no seconds"),
    ("studies/ladder.svg", lambda path: path.write_text(SVG[:50]), "is not a whole SVG file"),
    ("studies/ladder.csv", lambda path: path.write_text("a,b\n1\n"), "row 2 has 1 cells, the header 2"),
    ("studies/qualitative.png", lambda path: path.write_bytes(path.read_bytes()[:60]), "is not a whole picture"),
    ("gallery/gallery.json", lambda path: path.write_text("[]"), "does not hold a JSON object"),
    ("gallery/gallery.json", lambda path: path.write_text("{}"), "KeyError: 'layers'"),
    ("gallery/0001_cam.png", lambda path: path.unlink(), "there is no picture"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES, ids=[f"{file}-{text}" for file, _, text in DAMAGES])
def test_a_damaged_file_is_named(results: Path, file: str, damage: Callable[[Path], object], message: str) -> None:
    damage(results / file)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        report(results)
    assert file.removesuffix("/zarr.json") in str(caught.value)
    assert re.search(r"make it again|delete it", str(caught.value))
    assert not (results.parent / "report.html").exists()


@pytest.mark.parametrize("value", ["../per_class_iou.csv", "/etc/hostname"])
def test_the_gallery_stays_in_its_folder(results: Path, value: str) -> None:
    path = results / "gallery/gallery.json"
    path.write_text(path.read_text().replace("0000_cam.png", value))
    with pytest.raises(ValueError, match="must be a file of that folder"):
        report(results)


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no results folder .*nowhere: make it with `snakemake --cores all`"):
        make_report(tmp_path / "nowhere", tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no result and no training log yet: run `snakemake --cores all`"):
        make_report(tmp_path / "empty", tmp_path / "report.html")


def test_every_study_has_a_title() -> None:
    assert tuple(TITLES) == STUDIES


def test_maps_keep_their_colours_and_photographs_shrink(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (200, 3), dtype=np.uint8)
    pixels = palette[rng.integers(0, 200, (90, 70))]
    Image.fromarray(pixels).save(tmp_path / "map.png")
    whole = embed(tmp_path / "map.png", 640, "")
    assert np.array_equal(_decode(whole.uri), pixels)
    assert whole.colours == {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(pixels.reshape(-1, 3), axis=0)}
    shrunk = embed(tmp_path / "map.png", 45, "")
    assert (shrunk.width, shrunk.height) == (35, 45)
    assert {tuple(colour) for colour in _decode(shrunk.uri).reshape(-1, 3)} <= {tuple(colour) for colour in palette}
    Image.fromarray(rng.integers(0, 256, (1200, 900, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    photo = embed(tmp_path / "photo.png", 640, "")
    assert (photo.width, photo.height) == (480, 640)
    assert photo.uri.startswith("data:image/jpeg")
    assert not photo.colours


def _decode(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))


def test_many_large_images_stay_below_8_mb(tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", sizes=((1, 1),))
    shutil.rmtree(results / "gallery")
    write_gallery(results / "gallery", ((375, 500),))
    # Photographs are smoother than noise: blobs as large as real photographs of that size, 47 kB on average.
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (55, 73, 3), dtype=np.uint8)).resize((500, 375))
    for layer in ("image.jpg", "cam.png", "error.png"):
        blobs.save(results / f"gallery/0000_{layer}")
    assert len(embed(results / "gallery/0000_cam.png", 560, "").uri) > 47e3 * 4 / 3
    path = results / "gallery/gallery.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"images": content["images"] * 50}))
    page = report(results)
    assert len([image for image in page.attributes("img") if "data-layer" in image]) == 24 * len(LAYERS)
    assert "24 of 50 images" in page.text
    assert (tmp_path / "report.html").stat().st_size < 8 * 2**20


def test_a_chart_of_a_long_run_is_thinned_and_of_one_point_is_drawn() -> None:
    long = line_chart("t", [Line("a", [(float(x), random.Random(x).random()) for x in range(5000)])])
    points = re.findall(r'<polyline points="([^"]*)"', long)[0].split()
    assert 200 < len(points) <= 240
    xs = [float(point.partition(",")[0]) for point in points]
    assert xs == sorted(xs)
    assert re.search(r'points="([\d.,]+) \1" class="curve', line_chart("t", [Line("a", [(5.0, 1.0)])]))


def test_a_training_without_validation_has_no_curve_of_it(results: Path, tmp_path: Path) -> None:
    (results / "cosa.validation.jsonl").write_text("")
    make_report(results, tmp_path / "page.html")
    assert "validation during the training" in (tmp_path / "page.html").read_text()
