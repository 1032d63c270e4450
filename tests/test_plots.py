import itertools
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from ijepa import plots, projections
from ijepa.formats import similarity_digits
from ijepa.plots import Caption
from ijepa.projections import PcaProjection, TsneProjection, make_maps, project_pca
from ijepa.uncertainty import Estimate

NAMES = {"local": "small (target)", "hf": "large"}
CLASSES = ("cat", "dog", "ship")
CAPTION = Caption("t-SNE of digits, n = 24", "seed 0, perplexity 7.7", NAMES, CLASSES)
LABELS = np.arange(24) % 3


def embeddings(n: int = 24, d: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) + 0.5).astype(np.float32)


PANELS = {"local": embeddings(), "hf": embeddings(d=9, seed=1)}
PCA = {"local": project_pca(PANELS["local"], 2)}
UNDEFINED = Estimate(np.nan, np.nan, (np.nan, np.nan))


def called(classes) -> Caption:
    return replace(CAPTION, classes=classes)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


def axes_of(figure: Figure) -> list[Axes]:
    """All but the bars beside matrices."""
    return [ax for ax in figure.findobj(Axes) if ax.get_label() != "<colorbar>"]


def shown(figure: Figure) -> Figure:
    """Draw: Matplotlib warns of missing glyphs and squeezed layouts only then."""
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("centered", [False, True])
def test_class_similarity_equals_a_naive_loop(centered):
    X, labels = embeddings(), np.array([0, 2, 5] * 8)
    moved = X.astype(np.float64) - centered * X.astype(np.float64).mean(axis=0)
    means = [moved[labels == label].mean(axis=0) for label in (0, 2, 5)]
    expected = [[a @ b / np.sqrt((a @ a) * (b @ b)) for b in means] for a in means]
    actual = projections.class_similarity(X, labels, centered=centered)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    # A single class has no direction once its mean is subtracted.
    alone = projections.class_similarity(X, np.zeros(24, int), centered=centered)
    assert np.isnan(alone).all() == centered


def test_confusable_classes_of_cifar10_differ_in_color_and_vehicles_in_marker():
    styles = dict(zip(plots.CIFAR10, plots.class_styles(plots.CIFAR10), strict=True))
    assert len({color for color, _ in styles.values()}) == 10
    assert {name for name, (_, marker) in styles.items() if marker == "^"} == plots.VEHICLES
    for pair in (("cat", "dog"), ("automobile", "truck"), ("deer", "horse"), ("airplane", "ship")):
        a, b = (np.array(to_rgb(styles[name][0])) for name in pair)
        assert np.linalg.norm(a - b) > 0.3


@pytest.mark.parametrize("count", [2, 10, 11, 40])
def test_classes_differ_in_color_and_those_of_near_colors_in_marker(count):
    styles = plots.class_styles([f"class {i}" for i in range(count)])
    assert len({color for color, _ in styles}) == count
    assert all(a[1] != b[1] for a, b in itertools.pairwise(styles))


def test_points_are_the_coordinates_in_the_colors_of_their_classes():
    tsne = {name: TsneProjection(X[:, :2], 1.5, 0.5, 7.7) for name, X in PANELS.items()}
    for maps in (tsne, {name: project_pca(X, 2) for name, X in PANELS.items()}):
        figure = plots.plot_maps(maps, LABELS, CAPTION)
        order = np.random.default_rng(0).permutation(24)
        for ax, (role, projection) in zip(axes_of(figure), maps.items(), strict=True):
            dots = ax.collections[0]
            np.testing.assert_allclose(dots.get_offsets(), projection.coordinates[order])
            colors = [to_hex(color) for color in dots.get_facecolors()]
            assert colors == [plots.CLASS_COLORS[CLASSES[label]] for label in LABELS[order]]
            assert len(dots.get_paths()) == 24
            assert NAMES[role] in ax.get_title()
            assert projection.note in ax.get_title()


@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_names_that_would_overlap_are_moved_or_left_out(corner):
    points = corner + np.random.default_rng(0).normal(size=(200, 2)) * 1e-3
    points[:2] = [[-1, -1], [1, 1]]
    maps = {"local": PcaProjection(points, np.array([0.6, 0.4]))}
    caption = called([f"a rather long {i}" for i in range(15)])
    (ax,) = axes_of(shown(plots.plot_maps(maps, np.arange(200) % 15, caption)))
    boxes = [text.get_window_extent() for text in ax.texts]
    assert 3 <= len(boxes) < 15
    for i, box in enumerate(boxes):
        assert ax.bbox.x0 <= box.x0 < box.x1 <= ax.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize(("count", "listed"), [(40, True), (150, False)])
def test_a_legend_of_long_names_fits_or_is_left_out_with_a_note(count, listed):
    classes = [f"W{i:03d} WWWWW a long class name WWWWW {i:03d}" for i in range(count)]
    maps = dict.fromkeys(("local", "hf"), project_pca(embeddings(300), 2))
    figure = shown(plots.plot_maps(maps, np.arange(300) % count, called(classes)))
    legends = figure.findobj(Legend)
    assert bool(legends) == listed
    assert any(f"legend of {count} classes is left out" in text for text in texts(figure)) != listed
    for box in (legend.get_window_extent() for legend in legends):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_matrices_hold_local_hf_and_difference_and_print_their_numbers():
    axes = axes_of(plots.plot_similarity_matrices(PANELS, LABELS, CAPTION))
    assert len(axes) == 6
    for row, centered in ((axes[:3], False), (axes[3:], True)):
        local, hf = (
            projections.class_similarity(X, LABELS, centered=centered) for X in PANELS.values()
        )
        for ax, matrix in zip(row, (local, hf, hf - local), strict=True):
            np.testing.assert_allclose(ax.collections[0].get_array().reshape(3, 3), matrix)
            numbers = [float(text.get_text()) for text in ax.texts]
            np.testing.assert_allclose(numbers, matrix.ravel(), atol=0.00501)
            assert ax.yaxis_inverted()
    low, high = axes[5].collections[0].get_clim()
    assert low == -high
    assert axes[0].collections[0].get_clim() == axes[1].collections[0].get_clim()


def test_matrices_of_many_classes_print_no_numbers_and_none_has_a_class_without_images():
    X, caption = {"local": embeddings(60)}, called([f"c{i}" for i in range(21)])
    figure = plots.plot_similarity_matrices(X, np.arange(60) % 21, caption)
    assert not any(ax.texts for ax in axes_of(figure))
    words = texts(plots.plot_similarity_matrices(PANELS, LABELS // 2 * 2, CAPTION))
    assert {"cat", "dog", "ship"} & set(words) == {"cat", "ship"}


def test_variance_curves_hold_shares_and_sums_and_mark_10_and_50():
    pcas = {"local": project_pca(embeddings(80, 60), 2), "hf": project_pca(embeddings(9), 2)}
    figure = plots.plot_variance_explained(pcas, CAPTION)
    axes = axes_of(figure)
    for i, (role, pca) in enumerate(pcas.items()):
        shares, counts = pca.variance_shares, np.arange(1, len(pca.variance_shares) + 1)
        across = counts, counts, counts / len(shares)
        up = shares, np.cumsum(shares), np.cumsum(shares)
        for ax, *expected in zip(axes, across, up, strict=True):
            np.testing.assert_allclose(ax.lines[i].get_data(), expected)
            assert ax.lines[i].get_color() == plots.MODEL_COLORS[role]
    line = axes[1].lines[0]
    assert list(line.get_xdata()[line.get_markevery()]) == [10, 50]
    sums = np.cumsum(pcas["local"].variance_shares)
    words = f"{NAMES['local']} (d = 60), {sums[9]:.1%} in 10 PCs, {sums[49]:.1%} in 50 PCs"
    assert any(words in text for text in texts(figure))


def image_of(index: int) -> np.ndarray:
    return np.full((3, 4, 8), index, np.uint8)


def test_neighbors_are_the_right_images_with_tick_or_cross_and_color():
    found = {
        "local": (np.array([[3, 4], [7, 5]]), np.array([[0.91, 0.52], [0.43, -0.04]])),
        "hf": (np.array([[6, 1], [4, 0]]), np.array([[0.8, 0.7], [0.6, 0.5]])),
    }
    (ax,) = axes_of(plots.plot_neighbors(found, np.array([9, 2]), LABELS, image_of, CAPTION))
    pictures = [int(image.get_array()[0, 0, 0]) for image in ax.images]
    assert pictures == [9, 2, 3, 4, 7, 5, 6, 1, 4, 0]
    words = [text.get_text() for text in ax.texts]
    assert words[1:3] == ["cat", "ship"]
    assert words[4:8] == ["✓ 0.91\ncat", "✗ 0.52\ndog", "✗ 0.43\ndog", "✓ -0.04\nship"]
    green, red = "#1a7f37", "#b3261e"
    frames = [to_hex(frame.get_edgecolor()) for frame in ax.patches if frame.get_linewidth()]
    assert frames == [green, red, red, green, green, red, red, red]
    left, right, bottom, top = ax.images[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(8 / 4)
    assert ax.get_aspect() == 1
    assert {image.get_interpolation() for image in ax.images} == {"nearest"}


def test_cosines_that_are_almost_all_near_1_get_more_decimals():
    near, far = np.array([[0.9987, 0.9979, 0.3]]), np.array([[0.9987, 0.97, 0.3]])
    assert [similarity_digits(found) for found in (near, far, near[:0])] == [4, 2, 2]
    found = {"local": (np.array([[3, 4, 7]]), near)}
    words = texts(plots.plot_neighbors(found, np.array([9]), LABELS, image_of, CAPTION))
    assert {"✓ 0.9987\ncat", "✗ 0.9979\ndog", "✗ 0.3000\ndog"} <= set(words)


ODD = ("$x^2$ & $y$", "_hidden", r"a\$b", "中文", "tab\tnew\nline", "100% {a} " + "long" * 20, "")
# A font of this machine may have the Chinese characters.
SHOWN = {"$x^2$ & $y$", "_hidden", r"a\$b", plots.readable("中文"), r"tab\tnew\nline"}


@pytest.mark.parametrize(
    ("classes", "names"), [(CLASSES, {*CLASSES}), (ODD, {*SHOWN, "100% {a…nglong"})]
)
def test_every_figure_takes_one_model_and_odd_names_and_leaves_the_style_alone(classes, names):
    before, count = dict(matplotlib.rcParams), len(classes)
    X, labels = {"local": embeddings(4 * count)}, np.arange(4 * count) % count
    queries = np.arange(count)
    found = {"local": (queries[:, None] + count, np.ones((count, 1)))}
    estimates = {"local": [Estimate(0.5, 0.1, (0.3, 0.7))] * count}
    for figure in (
        plots.plot_maps({"local": project_pca(X["local"], 2)}, labels, called(classes)),
        plots.plot_similarity_matrices(X, labels, called(classes)),
        plots.plot_class_precision(estimates, [], called(classes)),
        plots.plot_neighbors(found, queries, labels, image_of, called(classes)),
    ):
        assert shown(figure).dpi == 150
        drawn = [text for text in figure.findobj(Text) if text.get_text()]
        assert not any("$" in text.get_text() and text.get_parse_math() for text in drawn)
        lines = {line.strip() for text in drawn for line in text.get_text().split("\n")}
        assert names - lines == set()
        for legend in figure.findobj(Legend):
            assert len(legend.get_texts()) in (1, count)
    assert dict(matplotlib.rcParams) == before


def test_characters_come_from_an_installed_font_or_are_replaced_and_counted():
    missing, elsewhere = "\U000e0100", "\u24b6"  # a circled A: in Matplotlib's STIX, not in DejaVu
    assert plots.readable(f"{missing}x") == r"\U000e0100x"
    assert "no installed font has 2 characters" in plots.font_note(["cat", f"{missing}\t", missing])
    assert plots.readable(elsewhere) == elsewhere
    assert plots.font_note(["cat", elsewhere, ""]) is None
    estimates = {"local": [Estimate(0.5, 0.1, (0.3, 0.7))]}
    figure = shown(plots.plot_class_precision(estimates, [], called([elsewhere])))
    label = next(t for t in figure.findobj(Text) if t.get_text() == elsewhere)
    assert label.get_fontfamily()[0] == plots.FONT
    assert len(label.get_fontfamily()) == 2


def test_a_long_name_keeps_both_its_ends_and_names_cut_alike_are_numbered():
    assert plots.readable("photographs of dogs", 12) == "photog… dogs"
    assert len(plots.readable("x" * 50, 14)) == 14
    assert plots.readable("exactly this", 12) == "exactly this"
    classes = ["kind", *(f"photographs of {animal} at night" for animal in ("cats", "dogs"))]
    words = texts(plots.plot_maps(PCA, LABELS, called(classes)))
    assert {"kind", "1 photo… night", "2 photo… night"} <= set(words)


def test_long_titles_and_footers_are_broken_inside_the_figure():
    title, footer = "A title of $many$ words, " * 12, "/a/path/without/blanks_" * 30
    caption = replace(CAPTION, title=title, footer=footer)
    figure = shown(plots.plot_maps(PCA, LABELS, caption))
    (ax,) = axes_of(figure)
    title, footer = (text.get_window_extent() for text in (figure._suptitle, figure._supxlabel))
    assert min(title.x0, footer.x0) >= 0
    assert max(title.x1, footer.x1) <= figure.bbox.x1
    assert footer.y1 < ax.get_tightbbox().y0
    assert title.y0 > ax.get_tightbbox().y1


def test_figures_of_few_or_equal_images_show_no_undefined_number_and_no_other_model():
    X, labels = {"local": embeddings(4, 3)}, np.array([0, 1, 2, 0])
    maps = make_maps(X, labels, 0)
    flat = TsneProjection(np.zeros((24, 2)), float("nan"), 1.0, float("nan"))
    one = {"local": [Estimate(0.5, 0.1, (0.3, 0.7)), UNDEFINED, UNDEFINED]}
    for figure in (
        plots.plot_maps(maps.tsne, labels, CAPTION),
        plots.plot_maps({"local": flat}, LABELS, CAPTION),
        plots.plot_similarity_matrices(X, np.zeros(4, int), CAPTION),
        plots.plot_variance_explained(maps.pca, CAPTION),
        plots.plot_class_precision(one, [], CAPTION),
        plots.plot_precision({"local": UNDEFINED, "chance": UNDEFINED}, CAPTION),
    ):
        words = " ".join(texts(shown(figure))).replace("\n", " ")
        assert CAPTION.title in words
        assert "HF" not in words
        assert "nan" not in words
    few = make_maps({"local": embeddings(24, 60)}, np.arange(24) % 2, 0)
    words = " ".join(texts(shown(plots.plot_variance_explained(few.pca, CAPTION))))
    assert "in 10 PCs" in words
    assert "in 50 PCs" not in words  # of 24 images there are 23


PRECISIONS = {
    "local": [Estimate(0.8, 0.05, (0.7, 0.9)), Estimate(0.25, 0.02, (0.2, 0.3))],
    "hf": [Estimate(0.5, 0.05, (0.4, 0.6)), Estimate(0.75, 0.02, (0.7, 0.8))],
}


def spans(ax: Axes) -> list[tuple[float, float]]:
    lines = [line.get_xdata() for line in ax.lines if line.get_marker() == "None"]
    return [tuple(ends) for ends in lines if len(ends) == 2 and np.isfinite(ends).all()]


def test_class_precision_has_the_intervals_and_numbers_of_each_class_and_of_the_difference():
    differences = [Estimate(-0.3, 0.05, (-0.4, -0.2)), Estimate(0.5, 0.02, (0.45, 0.55))]
    figure = plots.plot_class_precision(PRECISIONS, differences, called(["a", "b"]))
    left, right = axes_of(figure)
    assert sorted(spans(left)) == sorted(e.ci95 for found in PRECISIONS.values() for e in found)
    marks = {line.get_label(): list(line.get_xdata()) for line in left.lines}
    assert marks["Local: small (target)"] == [0.8, 0.25]
    assert marks["HF: large"] == [0.5, 0.75]
    assert [text.get_text() for text in left.texts] == ["80.0", "25.0", "50.0", "75.0"]
    assert spans(right)[1:] == [e.ci95 for e in differences]  # behind the line at 0
    assert [text.get_text() for text in right.texts] == ["-30.0", "+50.0"]
    assert [text.get_text() for text in left.get_yticklabels()] == ["a", "b"]
    bare = {name: [replace(UNDEFINED, value=0.5)] for name in PRECISIONS}
    figures = figure, plots.plot_class_precision(bare, bare["hf"], called(["a"]))
    told = [[ax.get_title().count("95%") for ax in axes_of(one)] for one in figures]
    assert told == [[1, 1], [0, 0]]


def test_of_very_many_classes_those_that_differ_most_are_shown():
    differences = [Estimate(size, 0.01, (size - 0.02, size + 0.02)) for size in np.arange(60) / 99]
    same = dict.fromkeys(("local", "hf"), differences)
    classes = [f"class {i}" for i in range(60)]
    figure = plots.plot_class_precision(same, differences, called(classes))
    assert [text.get_text() for text in axes_of(figure)[0].get_yticklabels()] == classes[20:]
    assert any("Of 60 classes, the 40 that differ most" in text for text in texts(figure))
    alone = plots.plot_class_precision({"local": differences}, [], called(classes))
    assert "class 0" in texts(alone)


def test_the_strip_has_models_with_intervals_above_references_without():
    rows = {"local": PRECISIONS["local"][0], "pixels": replace(UNDEFINED, value=0.7285)}
    (ax,) = axes_of(plots.plot_precision(rows, CAPTION))
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["Local: small (target)", "Pixels"]
    assert spans(ax) == [(0.7, 0.9)]
    assert [text.get_text() for text in ax.texts] == ["80.0", "72.9"]
