"""Fig. 5: pseudo-labels of the main and of the auxiliary CAMs, on all pixels and on confident ones."""

from __future__ import annotations

from matplotlib.figure import Figure

from cosa_fast.studies.inputs import NOISE, Inputs
from cosa_fast.studies.style import BLUE, ORANGE, draw_curve, iterations_axis, label_ends, mark_start, new_figure
from cosa_fast.studies.tables import Row, percent

CAMS = {"cam": ("main CAM", BLUE), "aux_cam": ("auxiliary CAM", ORANGE)}


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure."""
    run = inputs.compare(("cosa",))["cosa"][0]
    curve, last = run.curve(), run.last()
    rows: list[Row] = [
        {
            **inputs.identity(record),
            "seed": str(run.seed),
            "network": record.network,
            "iteration": str(record.iteration),
            "cam": name,
            "miou": percent(record.miou(cam)),
            "miou_confident": percent(record.miou(f"{cam}_confident")),
            "confident_pixels": percent(100 * record.pixels[f"{cam}_confident"] / record.pixels[cam]),
        }
        for record in curve
        for cam, (name, _) in CAMS.items()
    ]
    figure = new_figure(
        "Main and auxiliary CAMs (Fig. 5)",
        f"mIoU of the pseudo-labels of the assignment network on {inputs.about_curve(run)}. Confident: perplexity "
        f"(Eq. 4) at most {run.cosa.epsilon:g}; in brackets, their share of the pixels at the end. One run (seed "
        f"{run.seed}): {NOISE}.",
        3.0,
    )
    both = figure.subplots(1, 2, sharey=True)
    for axes, title, suffix in zip(both, ("(a) all pixels", "(b) confident pixels"), ("", "_confident"), strict=True):
        for cam, (_, colour) in CAMS.items():
            values = [record.miou(cam + suffix) for record in curve]
            draw_curve(axes, [record.iteration for record in curve], values, colour)
        axes.set_title(title)
        iterations_axis(axes, last.iteration)
        mark_start(axes, run.train.guidance_start, last.iteration, "guidance\nstarts")
    both[0].set_ylabel("mIoU [%]")
    for axes, suffix in zip(both, ("", "_confident"), strict=True):  # once the shared limits are final
        ends = []
        for cam, (name, colour) in CAMS.items():
            share = last.pixels[cam + suffix] / last.pixels[cam]
            ends.append((last.miou(cam + suffix), f"{name} ({100 * share:.0f} %)" if suffix else name, colour))
        label_ends(axes, ends)
    return rows, figure
