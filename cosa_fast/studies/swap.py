"""Fig. 8: pseudo-labels of the online and the assignment network, with and without swapping assignments."""

from __future__ import annotations

from matplotlib.figure import Figure

from cosa_fast.studies.inputs import NOISE, Inputs
from cosa_fast.studies.style import BLUE, ORANGE, draw_curve, iterations_axis, label_ends, mark_start, new_figure
from cosa_fast.studies.tables import Row, percent

VARIANTS = {"cosa": ("with SA", BLUE), "no_sa": ("without SA", ORANGE)}
NETWORKS = {"online": ("ON", "-"), "assignment": ("AN", "--")}


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure."""
    runs = {variant: of_seeds[0] for variant, of_seeds in inputs.compare(tuple(VARIANTS)).items()}
    for run in runs.values():
        if not run.curve("online"):
            raise ValueError(f"{run.path} has no validation of the online network: delete it and run snakemake again")
    rows: list[Row] = [
        {
            **inputs.identity(record),
            "variant": variant,
            "seed": str(run.seed),
            "network": network,
            "iteration": str(record.iteration),
            "spl_miou": percent(record.miou("seg_filtered")),
            "cpl_miou": percent(record.miou("cam")),
        }
        for variant, run in runs.items()
        for network in NETWORKS
        for record in run.curve(network)
    ]
    reference = runs["cosa"]
    last = reference.last()
    figure = new_figure(
        "The two networks, with and without swapping assignments (Fig. 8)",
        f"{inputs.about_curve(reference)}. Solid: online network (ON); dashed: assignment network (AN), its "
        f"moving average, which makes the pseudo-labels only with SA. One run with and one "
        f"without (seed {reference.seed}): {NOISE}.",
        3.0,
    )
    for axes, title, quantity in zip(
        figure.subplots(1, 2),
        ("segmentation pseudo-labels (SPL)", "CAM pseudo-labels (CPL)"),
        ("seg_filtered", "cam"),
        strict=True,
    ):
        ends = []
        for variant, run in runs.items():
            for network, (short, linestyle) in NETWORKS.items():
                curve = run.curve(network)
                values = [record.miou(quantity) for record in curve]
                name, colour = VARIANTS[variant]
                draw_curve(axes, [record.iteration for record in curve], values, colour, linestyle)
                ends.append((values[-1], f"{short} {name}", colour))
        axes.set_title(title)
        axes.set_ylabel("mIoU [%]")
        iterations_axis(axes, last.iteration)
        mark_start(axes, reference.train.guidance_start, last.iteration, "guidance\nstarts")
        label_ends(axes, ends)
    return rows, figure
