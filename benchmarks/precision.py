"""bf16 against fp32: the same training steps from the same start, `python -m benchmarks.precision`.

Writes every term of the loss in each precision, a figure of the curves, and how far they are apart. Beside them stands
a second fp32 run whose first weights differ by rounding: what it differs by is not precision but the training's chaos.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from benchmarks import common
from benchmarks.step_cases import PRESETS, TINY, Preset, Variant, make_step, synthetic_batch

Curves = dict[str, list[float]]
"""Per term its value at each step."""
RUNS: dict[str, Variant] = {"fp32": "fp32", "fp32, other rounding": "fp32", "bf16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the loss curves of bf16 and fp32."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    preset: Literal["minivoc", "voc_b4", "coco_b8"] = "voc_b4"
    steps: int = 200
    """Half of them guided, a quarter each of warm-up and of c2s alone."""
    batches: int = 8
    """Different synthetic batches, repeated."""
    output: Path | None = None
    """Folder of precision.csv and precision.svg; default: benchmarks/results/MACHINE."""
    tiny: bool = False
    """Tiny sizes: they show that everything works; the numbers mean nothing."""


def run(options: Options) -> str:
    """Train thrice, write the curves; returns the table of differences, which is printed too."""
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    preset = (TINY if options.tiny else PRESETS)[options.preset]
    curves = {name: _trained(name, preset, device, options) for name in RUNS}
    folder = options.output or common.results_folder(device, options.tiny)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "precision.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["run", "term", "step", "value"])
        for name, terms in curves.items():
            for term, values in terms.items():
                first = options.steps - len(values)
                writer.writerows([name, term, first + step, f"{value:.8g}"] for step, value in enumerate(values))
    _draw(curves, options.steps, folder / "precision.svg")
    machine = common.record(device)
    title = f"{preset.name}, {options.steps} steps, {machine['machine']}, torch {machine['torch']}, {machine['date']}"
    text = f"{title}\n\n{table(curves)}"
    print(text)
    return text


def _trained(name: str, preset: Preset, device: str, options: Options) -> Curves:
    net = preset.network()
    if "rounding" in name:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.0 + 1e-7)
    quarter = options.steps // 4
    preset = replace(preset, starts=(quarter, 2 * quarter))
    step = make_step(preset, RUNS[name], device, net)
    batches = [synthetic_batch(preset, device, seed) for seed in range(options.batches)]
    values: list[dict[str, torch.Tensor]] = []
    for number in tqdm(range(options.steps), desc=name, disable=None):
        values.append({term: value.clone() for term, value in step(number, batches[number % len(batches)]).items()})
    return {term: [float(at[term]) for at in values if term in at] for term in values[-1]}


def differences(curve: list[float], truth: list[float]) -> tuple[float, float]:
    """Mean and largest distance, relative to the mean size of `truth`."""
    scale = sum(map(abs, truth)) / len(truth) or 1.0
    distances = [abs(a - b) / scale for a, b in zip(curve, truth, strict=True)]
    return sum(distances) / len(distances), max(distances)


def table(curves: dict[str, Curves]) -> str:
    """Markdown: relative differences from fp32, per term."""
    others = [name for name in curves if name != "fp32"]
    head = " | ".join(f"{name}: mean, largest" for name in others)
    lines = [f"| term | {head} |", "|" + "---|" * (len(others) + 1)]
    for term, truth in curves["fp32"].items():
        pairs = [differences(curves[name][term], truth) for name in others]
        lines.append(f"| {term} | {' | '.join(f'{mean:.1e}, {largest:.1e}' for mean, largest in pairs)} |")
    return "\n".join(lines)


def _draw(curves: dict[str, Curves], steps: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    terms = list(curves["fp32"])
    figure, axes = plt.subplots(1, len(terms), figsize=(2.6 * len(terms), 2.6), layout="constrained", squeeze=False)
    styles = {"fp32": ("#0072b2", "-"), "fp32, other rounding": ("#6b6b6b", ":"), "bf16": ("#d55e00", "--")}
    for axis, term in zip(axes[0], terms, strict=True):
        for name, of in curves.items():
            color, line = styles[name]
            axis.plot(range(steps - len(of[term]), steps), of[term], line, color=color, label=name, linewidth=1.2)
        axis.set_title(term, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
