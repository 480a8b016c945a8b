"""Every study's table and figure on made-up runs."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image as PilImage
from tiny_runs import (
    COEXISTING,
    SETTINGS,
    inputs_of,
    set_last,
    table,
    write_gallery,
    write_index,
    write_inputs,
    write_run,
    write_segmenter,
    write_speed,
    write_tables,
)

from cosa_fast.config import StudiesConfig
from cosa_fast.data.index import Index
from cosa_fast.studies import qualitative
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.needs import LADDER, LEAVE_ONE_OUT, STUDIES, needs
from cosa_fast.studies.study import write_study
from cosa_fast.studies.style import style


def make(folder: Path, name: str, inputs: Inputs) -> tuple[list[dict[str, str]], Path]:
    """Rows of the CSV and the figure's path."""
    figure = folder / f"{name}{needs(name, SETTINGS).suffix}"
    write_study(name, inputs, folder / f"{name}.csv", figure)
    with open(folder / f"{name}.csv", newline="") as handle:
        return list(csv.DictReader(handle)), figure


def words(figure: Path) -> str:
    """The text in an SVG, lines joined."""
    return " ".join(text.strip() for element in ET.parse(figure).iter() if (text := element.text))


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_writes_a_table_and_a_figure(tmp_path: Path, name: str) -> None:
    rows, figure = make(tmp_path, name, inputs_of(tmp_path, name))
    assert rows
    assert rows[0]["dataset"] == "MiniVOC (synthetic)"
    assert not list(tmp_path.glob(".*"))  # no temporary file is left
    if figure.suffix == ".svg":
        assert "MiniVOC (synthetic)" in words(figure)  # text is text, and says what data it is
        assert "<dc:date>" not in figure.read_text()
    else:
        with PilImage.open(figure) as image:
            assert image.width == 1200


@pytest.mark.parametrize("name", ["ladder", "confidence"])
def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    inputs = inputs_of(tmp_path, name)
    rows, figure = make(tmp_path, name, inputs)
    first = figure.read_bytes()
    assert make(tmp_path, name, inputs) == (rows, figure)
    assert figure.read_bytes() == first


def test_real_data_is_not_called_synthetic(tmp_path: Path) -> None:
    given = write_inputs(tmp_path, needs("cpl", SETTINGS))
    rows = table("cpl", Inputs(index=Index.load(write_index(tmp_path, synthetic=False)), **given))
    assert rows[0]["dataset"] == "MiniVOC"


def test_ladder_and_leave_one_out(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "ladder")
    for variant, values in {"baseline": (40.0, 44.0), "gc": (50.0, 52.0)}.items():
        for seed, value in enumerate(values):
            set_last(inputs.runs[variant][seed], "seg_filtered", value)
    rows = table("ladder", inputs)
    assert len(rows) == 3 * len(LADDER)
    base, gc = rows[:2]
    assert (base["variant"], base["quantity"], base["n"], base["seeds"]) == (
        "baseline", "segmentation, label-filtered", "2", "0 1",
    )  # fmt: skip
    # t(0.975; 1) = 12.7062; the two seeds' standard error is half their difference.
    assert (base["values"], base["miou"], base["miou_ci95"]) == ("40.00 44.00", "42.00", f"{12.7062 * 2:.2f}")
    assert (base["difference"], base["paper_voc"], base["paper_coco"]) == ("", "55.96", "37.32")
    assert (gc["difference_to"], gc["difference"], gc["difference_ci95"]) == ("baseline", "+9.00", "12.71")
    assert (gc["paper_voc_difference"], gc["paper_coco_difference"]) == ("+7.13", "+5.23")
    assert [gc[part] for part in ("GC", "SA", "RAW", "CSC", "DT")] == ["yes", "no", "no", "no", "no"]
    assert "VOC 2012" in gc["note"]
    assert "MiniVOC (synthetic)" in gc["note"]
    assert {row["paper_voc"] for row in rows if row["quantity"] != "segmentation, label-filtered"} == {""}

    rows = table("leave_one_out", inputs_of(tmp_path, "leave_one_out"))
    assert [row["variant"] for row in rows[: len(LEAVE_ONE_OUT)]] == list(LEAVE_ONE_OUT)
    assert (rows[2]["difference_to"], rows[2]["paper_voc_difference"], rows[2]["CSC"]) == ("cosa", "-6.30", "no")


def test_a_single_seed_has_no_interval(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "ladder")
    one = {variant: {0: seeds[0]} for variant, seeds in inputs.runs.items()}
    rows = table("ladder", Inputs(index=inputs.index, runs=one))
    assert (rows[1]["n"], rows[1]["miou_ci95"], rows[1]["difference_ci95"]) == ("1", "", "")
    assert rows[1]["difference"]


def test_systems(tmp_path: Path) -> None:
    rows = table("systems", inputs_of(tmp_path, "systems"))
    found = {(row["system"], row["network"], row["crf"], row["split"], row["setting"]): row for row in rows}
    assert len(found) == len(rows)
    val = found["CoSA", "mini_vit", "none", "val", "label-filtered"]
    assert (val["miou"], val["paper_voc"], val["paper_coco"]) == ("62.50", "76.20", "51.00")
    assert found["CoSA", "mini_vit", "none", "val", "label-free"]["paper_voc"] == ""
    test = found["CoSA", "mini_vit", "release", "test", "label-free"]
    assert (test["miou"], test["paper_voc"], test["paper_coco"]) == ("58.20", "75.20", "")
    assert found["CoSA-MS", "DeepLabV3Plus tu-test_resnet", "none", "val", "label-filtered"]["paper_voc"] == ""
    absent = found["CoSA-MS", "SWIN", "none", "val", "label-filtered"]
    assert (absent["miou"], absent["paper_voc"], absent["note"]) == ("", "81.40", "not trained here")


def test_systems_with_the_papers_network(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "systems")
    write_segmenter(inputs.checkpoints["segmenter"], encoder="tu-resnet101d")
    rows = table("systems", inputs)
    ours = [row for row in rows if row["network"] == "DeepLabV3Plus tu-resnet101d" and row["paper_voc"]]
    assert [(row["crf"], row["miou"], row["paper_voc"]) for row in ours] == [
        ("none", "64.30", "76.50"),
        ("none", "59.40", "75.30"),
    ]
    assert {row["network"] for row in rows if row["note"] == "not trained here"} == {"WR38", "SWIN"}


def test_cpl(tmp_path: Path) -> None:
    rows = table("cpl", inputs_of(tmp_path, "cpl"))
    assert [(row["split"], row["cams"], row["miou"], row["paper_voc"]) for row in rows] == [
        ("train", "main CAMs", "61.30", "78.50"),
        ("train", "auxiliary CAMs", "53.80", ""),
        ("train", "mean of both", "62.50", "78.90"),
        ("val", "main CAMs", "59.20", "76.40"),
        ("val", "auxiliary CAMs", "51.70", ""),
        ("val", "mean of both", "60.40", "77.20"),
    ]


def test_guidance(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "guidance")
    set_last(inputs.runs["no_gc"][0], "cam", 40.0)
    set_last(inputs.runs["detach_feat"][0], "cam", 41.5)
    rows = table("guidance", inputs)
    chosen = {row["variant"]: row for row in rows}
    assert (chosen["no_gc"]["cpl_miou"], chosen["no_gc"]["difference_to_no_guidance"]) == ("40.00", "")
    feat = chosen["detach_feat"]
    assert (feat["source"], feat["detached"], feat["difference_to_no_guidance"]) == ("SPL", "features", "+1.50")
    assert (feat["paper_voc_train"], feat["paper_voc_val"]) == ("74.19", "73.36")


def test_coexistence(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "coexistence")
    for seed, (without, with_csc) in enumerate(((20.0, 50.0), (22.0, 54.0))):
        for variant, value in (("no_csc", without), ("cosa", with_csc)):
            values = [90.0, *(value if name in COEXISTING else 60.0 for name in inputs.index.classes)]
            set_last(inputs.runs[variant][seed], "cam", values)
    rows = table("coexistence", inputs)
    chosen = {(row["method"], row["quantity"]): row for row in rows}
    without = chosen["without CSC", "C-mIoU"]
    assert (without["cpl"], without["values"], without["paper_voc"]) == ("21.00", "20.00 22.00", "62.61")
    with_csc = chosen["with CSC (CoSA)", "C-mIoU"]
    assert (with_csc["cpl"], with_csc["difference"], with_csc["difference_ci95"]) == ("52.00", "+31.00", "12.71")
    assert with_csc["classes"] == "aeroplane bird boat train"
    # Over seven classes, four of which gain 30 and 32.
    assert chosen["with CSC (CoSA)", "mIoU"]["difference"] == f"{31 * 4 / 7:+.2f}"
    assert chosen["SeCo", "C-mIoU"]["paper_voc"] == "73.18"
    assert chosen["SeCo", "C-mIoU"]["dataset"] == ""


def test_speed(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "speed")
    rows = table("speed", inputs)
    chosen = {(row["system"], row["scales"], row["batch"], row["crf"]): row for row in rows}
    assert len(chosen) == len(rows) == 16
    standalone = chosen["CoSA-MS", "1.0 0.5", "1", "standard"]
    assert [standalone[column] for column in ("images_per_second", "slowest", "fastest")] == ["6.83", "4.78", "7.52"]
    assert (standalone["miou_label_free"], standalone["miou_label_filtered"]) == ("60.70", "64.90")
    assert (standalone["paper_images_per_second"], standalone["paper_voc"]) == ("2.36", "76.50")
    plain = chosen["CoSA", "1.0 0.5", "16", "none"]
    assert (plain["miou_label_filtered"], plain["paper_images_per_second"], plain["paper_voc"]) == (
        "62.50",
        "",
        "76.20",
    )
    # A single view is timed but not evaluated.
    assert chosen["CoSA", "1.0", "16", "none"]["miou_label_free"] == ""
    path = write_speed(tmp_path / "rates.csv")
    text = path.read_text()
    path.write_text(text.replace("standard", "heavy"))
    with pytest.raises(ValueError, match=r"rates.csv, line 3: crf = 'heavy' is none of none, release, standard"):
        table("speed", inputs)
    path.write_text(text.replace("60.0", "fast"))
    with pytest.raises(ValueError, match=r"line 2: could not convert string to float: 'fast': make it with"):
        table("speed", inputs)
    path.write_text(text.replace("60.0", "90.0"))
    with pytest.raises(ValueError, match=r"line 2: 90 images per second are not between 42 and 66: make it with"):
        table("speed", inputs)


def test_threshold(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "threshold")
    for variant, value in (("threshold_0.3", 30.0), ("threshold_0.5", 50.0), ("gc_sa_raw_csc", 45.0), ("cosa", 55.0)):
        set_last(inputs.runs[variant][0], "seg_filtered", value)
    rows = table("threshold", inputs)
    assert [(row["threshold"], row["seg_miou_label_filtered"], row["paper_voc"]) for row in rows] == [
        ("0.3", "30.00", ""),
        ("0.4", "45.00", ""),
        ("0.5", "50.00", "75.54"),  # the best fixed one
        ("dynamic", "55.00", "76.19"),
    ]
    assert [row["final_xi"] for row in rows[:3]] == ["0.3000", "0.4000", "0.5000"]


def test_curves(tmp_path: Path) -> None:
    rows = table("oracle", inputs_of(tmp_path, "oracle"))
    assert len(rows) == 4 * 10
    assert {row["network"] for row in rows} == {"assignment"}
    rows = table("swap", inputs_of(tmp_path, "swap"))
    assert len(rows) == 2 * 2 * 10
    rows = table("confidence", inputs_of(tmp_path, "confidence"))
    assert len(rows) == 10 * 32
    assert (rows[1]["confidence_from"], rows[1]["confidence_to"]) == ("0.03125", "0.06250")


def test_aux_cam_counts_confident_pixels(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "aux_cam")
    prefix = inputs.runs["cosa"][0]
    for quantity, value in (("cam", 50.0), ("cam_confident", 70.0)):
        set_last(prefix, quantity, value)
    path = prefix.with_name("cosa.validation.jsonl")
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1])
    last["cam_confident"]["truth"] = [2_500] * 7
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]))
    rows = table("aux_cam", inputs)
    main = rows[-2]
    assert (main["iteration"], main["cam"], main["miou"], main["confident_pixels"]) == (
        "1000", "main CAM", "50.00", "25.00",
    )  # fmt: skip


def test_swap_needs_both_networks(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "swap")
    path = inputs.runs["no_sa"][0].with_name("cosa.validation.jsonl")
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"online"' not in line))
    with pytest.raises(ValueError, match=r"no_sa/0/cosa.validation.jsonl has no validation of the online network"):
        table("swap", inputs)


def test_raw(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "raw")
    path = inputs.runs["cosa"][0].with_name("cosa.validation.jsonl")
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1])
    last["per_image"] = {"id": ["a", "b", "c"], "iou": [0.2, 0.6, float("nan")], "perplexity": [1.0, 0.4, 3.0]}
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]))
    rows = table("raw", inputs)
    chosen = {(row["variant"], row["quantity"], row["iteration"]): row for row in rows}
    iou, mae = (chosen["cosa", f"{measure} per image", "1000"] for measure in ("iou", "mae"))
    assert (iou["n"], iou["mean"], iou["q1"], iou["median"], iou["q3"]) == ("2", "0.4000", "0.3000", "0.4000", "0.5000")
    assert (mae["mean"], mae["median"]) == ("0.6500", "0.6500")  # (0.8 + 1.0) / 2 and (0.4 + 0.4) / 2
    assert chosen["no_raw", "perplexity of all pixels", "100"]["mean"]
    path.write_text("\n".join([*lines[:-1], json.dumps({k: v for k, v in last.items() if k != "per_image"})]))
    with pytest.raises(ValueError, match="has no per_image values"):
        table("raw", inputs)


def test_qualitative(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "qualitative")
    rows = table("qualitative", inputs)
    # One image of each coexisting class in turn, then of the others; the gallery repeats its six classes.
    assert [(row["image"], row["labels"], row["coexisting"]) for row in rows] == [
        ("000", "aeroplane", "yes"), ("001", "bird", "yes"), ("002", "boat", "yes"), ("005", "train", "yes"),
        ("006", "aeroplane", "yes"), ("003", "cat", "no"), ("004", "person", "no"), ("009", "cat", "no"),
    ]  # fmt: skip
    assert rows[3]["miou_label_free"] == "55.00"
    main = {"main": inputs.galleries["main"]}
    with style():
        _, alone = qualitative.study(Inputs(index=inputs.index, studies=SETTINGS, galleries=main))
        _, both = qualitative.study(inputs)
    assert [len(figure.axes) for figure in (alone, both)] == [8 * 5, 8 * 6]
    said = "CAM without CSC: of a second training, which may have another seed"
    assert [said in "\n".join(text.get_text() for text in figure.texts) for figure in (alone, both)] == [False, True]
    assert {row["note"] for row in rows} == {said}
    fewer = main | {"no_csc": write_gallery(tmp_path / "fewer", images=3)}
    with pytest.raises(ValueError, match=r"fewer lacks the image 003 of .*same eval.panel_images"):
        table("qualitative", Inputs(index=inputs.index, studies=SETTINGS, galleries=fewer))
    (inputs.galleries["main"] / "0000_cosa.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*0000_cosa.png .*make the gallery again"):
        table("qualitative", inputs)
    (inputs.galleries["main"] / "gallery.json").write_text('{"images": [{}], "layers": []}')
    with pytest.raises(ValueError, match=r"gallery.json is damaged \(KeyError\('id'\)\)"):
        table("qualitative", inputs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("systems", "needs the table 'main': give --table main:PATH"),
        ("cpl", "needs the table 'cpl': give --table cpl:PATH"),
        ("ladder", "needs runs of 'baseline': give --run baseline:SEED:PREFIX"),
        ("speed", "needs the table of `cosa-fast speed`: give --speed PATH"),
        ("qualitative", "needs the gallery 'main': give --gallery main:FOLDER"),
        ("table9", "there is no study 'table9'"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, name: str, message: str) -> None:
    inputs = Inputs(index=Index.load(write_index(tmp_path)))
    with pytest.raises(ValueError, match=message):
        write_study(name, inputs, tmp_path / "out.csv", tmp_path / "out.svg")
    assert not (tmp_path / "out.csv").exists()


def test_other_refusals(tmp_path: Path) -> None:
    index = Index.load(write_index(tmp_path))
    tables = write_tables(tmp_path)
    with pytest.raises(ValueError, match="needs the checkpoint 'cosa': give --checkpoint cosa:PATH"):
        write_study("systems", Inputs(index=index, tables=tables), tmp_path / "out.csv", tmp_path / "out.svg")
    with pytest.raises(ValueError, match=r"give a file that ends in .svg or .png"):
        write_study("cpl", Inputs(index=index, tables=tables), tmp_path / "out.csv", tmp_path / "out.pdf")
    tables["cpl"].write_text(tables["cpl"].read_text().replace("MiniVOC", "VOC2012"))
    with pytest.raises(ValueError, match=r"cpl_iou.csv is of the dataset VOC2012, the index of MiniVOC"):
        write_study("cpl", Inputs(index=index, tables=tables), tmp_path / "out.csv", tmp_path / "out.svg")
    run = write_run(tmp_path, "cosa")
    strange = StudiesConfig(coexisting=("zebra",))
    with pytest.raises(ValueError, match=r"studies.coexisting names zebra"):
        write_study(
            "coexistence",
            Inputs(index=index, runs={"cosa": {0: run}, "no_csc": {0: write_run(tmp_path, "no_csc")}}, studies=strange),
            tmp_path / "out.csv",
            tmp_path / "out.svg",
        )
