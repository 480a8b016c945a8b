"""Line charts as small inline SVG: they take the page's colours, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cosa_fast.report.markup import Html, element, join

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 40, 18, 14, 26
POINTS = 240
"""More points than this are averaged in groups: a chart is hardly wider in pixels."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve."""

    name: str
    points: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at an iteration."""

    x: float
    name: str


def line_chart(title: str, lines: Sequence[Line], marks: Sequence[Mark] = (), right: float | None = None) -> Html:
    """A figure: title, curves, and a legend with each curve's last value.

    Args:
        lines: at least one point each.
        marks: those outside the range are left out.
        right: end of the x axis; None: the last point.
    """
    ends = [line.points[-1][0] for line in lines]
    last = max([*ends, right or 0.0])
    first = min(0.0, *(line.points[0][0] for line in lines))
    low, high, ticks = _scale([y for line in lines for _, y in line.points])

    def x(value: float) -> float:
        return round(LEFT + (value - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts: list[Html] = []
    for tick in ticks:
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(element("text", _short(tick), x=LEFT - 6, y=y(tick) + 4, class_="tick end"))
    for tick in _ticks(first, last, 4):
        parts.append(element("text", _short(tick), x=x(tick), y=HEIGHT - 8, class_="tick middle"))
    for mark in marks:
        if first < mark.x < last:
            late = x(mark.x) > WIDTH * 0.6
            place = x(mark.x) + (-4 if late else 4)
            parts.append(element("line", x1=x(mark.x), x2=x(mark.x), y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"))
            parts.append(element("text", mark.name, x=place, y=TOP + 8, class_=f"tick {'end' if late else ''}".strip()))
    for place, line in enumerate(lines, start=1):
        points = " ".join(f"{x(a)},{y(b)}" for a, b in _thin(line.points))
        if len(line.points) == 1:  # a line of one point is invisible
            points = f"{points} {points}"
        parts.append(element("polyline", points=points, class_=f"curve s{place}"))
    spoken = "; ".join(f"{line.name} ends at {_value(line.points[-1][1])}" for line in lines)
    drawing = element(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title} by iteration: {spoken}"
    )
    legend = element("ul", *(_entry(place, line) for place, line in enumerate(lines, start=1)), class_="legend")
    return element("figure", element("figcaption", title), drawing, legend, class_="chart")


def _entry(place: int, line: Line) -> Html:
    sample = element(
        "svg",
        element("polyline", points="0,5 24,5", class_=f"curve s{place}"),
        viewBox="0 0 24 10",
        class_="swatch",
        aria_hidden="true",
    )
    return element("li", sample, join(line.name, " "), element("b", _value(line.points[-1][1])))


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of equally many neighbours each, so that at most POINTS remain."""
    group = math.ceil(len(points) / POINTS)
    if group == 1:
        return points
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Low end, high end and ticks of an axis; from 0 unless that would squeeze the curve."""
    low, high = min(values), max(values)
    if 0 <= low < 0.6 * high:
        low = 0.0
    if high - low < 1e-9:
        low, high = low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1)
    step = _step(high - low, 4)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high, [low + step * place for place in range(round((high - low) / step) + 1)]


def _ticks(low: float, high: float, count: int) -> list[float]:
    step = _step(high - low, count)
    first = math.ceil(low / step - 1e-9)
    return [step * place for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _step(extent: float, count: int) -> float:
    """1, 2 or 5 times a power of ten, about `count` of which make the extent."""
    wanted = (extent or 1) / count
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted * 0.999)


def _short(value: float) -> str:
    """A tick's label: 0.25, 12, 10k."""
    if abs(value) >= 10000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    return f"{round(value, 10):g}"


def _value(value: float) -> str:
    """Three significant digits, all digits of the integer part."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
