"""flows/chart.py: what is drawn, looked up in matplotlib's own objects, and that it is a picture."""

import math

import pytest
from PIL import Image

from flows import chart
from flows.chart import Point

SIZES = [Point("S/8", 0.4, 150.0, "S"), Point("S/2", 6.1, 66.0, "S"), Point("B/4", 5.6, 66.0, "B")]
SIZES += [Point("XL/2", 118.6, 18.0, "XL")]


def drawn(monkeypatch, points, file, **options):
    """The figure that `bubbles` writes."""
    from matplotlib.figure import Figure

    figures, real = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (figures.append(self), real(self, *args, **more))
    )
    chart.bubbles(points, file, title="sizes", metric="fid_x_1k", lower_is_better=True, **options)
    return figures[0]


def test_areas_are_proportional_to_gflops_and_families_share_a_colour(monkeypatch, tmp_path):
    figure = drawn(monkeypatch, SIZES, tmp_path / "new" / "chart.png")
    [axes] = figure.axes
    found = {}
    for family in axes.collections:
        for (x, y), area in zip(family.get_offsets(), family.get_sizes(), strict=True):
            found[x, y] = area, family.get_label(), tuple(family.get_facecolor()[0])
    assert {point.family: found[point.gflops, point.value][1] for point in SIZES} == {"S": "S", "B": "B", "XL": "XL"}
    area = {point.name: found[point.gflops, point.value][0] for point in SIZES}
    assert area["S/2"] / area["XL/2"] == pytest.approx(6.1 / 118.6) and area["S/8"] >= chart.LEAST_AREA
    assert len({colour for _, _, colour in found.values()}) == 3
    assert axes.get_xscale() == axes.get_yscale() == "log" and "lower is better" in axes.get_ylabel()
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"S", "B", "XL"}
    with Image.open(tmp_path / "new" / "chart.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 600


def test_no_name_covers_another_or_leaves_the_picture(monkeypatch, tmp_path):
    crowd = [Point(f"network {number}", 5 + 0.2 * number, 60 + number, "") for number in range(4)]
    figure = drawn(monkeypatch, SIZES + crowd, tmp_path / "chart.png")
    [axes] = figure.axes
    names = [text for text in axes.texts if text.get_text() in {point.name for point in SIZES + crowd}]
    boxes = [text.get_window_extent() for text in names]
    assert len(names) == len(SIZES + crowd)
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize("points", [SIZES[:1], [Point("a", 1.0, 0.0), Point("b", 1.0, -0.5)]])
def test_one_network_equal_ones_and_figures_below_zero_are_drawn(monkeypatch, tmp_path, points):
    [axes] = drawn(monkeypatch, points, tmp_path / "chart.png").axes
    assert axes.get_xscale() == axes.get_yscale() == "linear" and axes.get_legend() is None


def test_the_correlation_is_that_of_the_logarithm():
    line = [Point(str(x), math.exp(x), 10 - 2 * x) for x in range(5)]
    assert chart.correlation(line) == pytest.approx(-1)
    assert chart.correlation(SIZES) == pytest.approx(-0.97326, abs=1e-5)  # numpy.corrcoef
    assert chart.correlation(line[:3]) is None and chart.correlation([Point("a", 2.0, 1.0)] * 5) is None
