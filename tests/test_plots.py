import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ijepa import plots
from ijepa.plots import Caption, Neighbors
from ijepa.projections import PcaProjection, TsneProjection, align, project_pca, project_tsne

CAPTION = Caption("t-SNE of digits, test split, n = 24", "seed 0, perplexity 7.7")
CLASSES = ("cat", "dog", "ship")
LABELS = np.arange(24) % 3


def embeddings(n: int = 24, d: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) + 0.5).astype(np.float32)


PANELS = {"local": embeddings(), "hf": embeddings(d=9, seed=1)}
ONE = {"local": PANELS["local"]}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def shown(figure: Figure) -> None:
    """Draw: Matplotlib warns of missing glyphs and squeezed layouts only then."""
    figure.draw_without_rendering()


@pytest.mark.parametrize("centered", [False, True])
def test_class_similarity_equals_a_naive_loop(centered):
    X, labels = embeddings(), np.array([0, 2, 5] * 8)
    moved = X.astype(np.float64) - (X.astype(np.float64).mean(axis=0) if centered else 0)
    means = [moved[labels == label].mean(axis=0) for label in (0, 2, 5)]
    expected = [[a @ b / np.sqrt((a @ a) * (b @ b)) for b in means] for a in means]
    actual = plots.class_similarity(X, labels, centered=centered)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_class_similarity_ignores_an_offset_only_when_centered():
    X = embeddings().astype(np.float64)
    same, moved = (plots.class_similarity(Z, LABELS, centered=True) for Z in (X, X + 5))
    np.testing.assert_allclose(same, moved, atol=1e-9)
    assert plots.class_similarity(X + 5, LABELS, centered=False).min() > 0.99


def test_class_similarity_of_a_vanishing_mean_is_nan():
    X = embeddings()
    assert np.isnan(plots.class_similarity(X, np.zeros(24, int), centered=True)).all()


def test_cifar10_has_the_colors_that_keep_its_confusable_classes_apart():
    assert plots.CLASS_COLORS == {
        "airplane": "#3f90da",
        "automobile": "#a96b59",
        "bird": "#bd1f01",
        "cat": "#832db6",
        "deer": "#ffa90e",
        "dog": "#94a4a2",
        "frog": "#b9ac70",
        "horse": "#717581",
        "ship": "#e76300",
        "truck": "#92dadd",
    }
    assert plots.class_styles(["truck", "cat"]) == [("#92dadd", "^"), ("#832db6", "o")]


@pytest.mark.parametrize("count", [2, 10, 11, 40])
def test_classes_differ_in_color_and_those_of_near_colors_in_marker(count):
    styles = plots.class_styles([f"class {i}" for i in range(count)])
    assert len({color for color, _ in styles}) == count
    assert all(a[1] != b[1] for a, b in itertools.pairwise(styles))


def test_tsne_points_lie_at_the_aligned_coordinates_in_the_colors_of_their_classes():
    projections = {key: project_tsne(X, seed=0) for key, X in PANELS.items()}
    figure = plots.plot_tsne(projections, LABELS, CLASSES, CAPTION)
    left, right = (ax.collections[0] for ax in figure.findobj(matplotlib.axes.Axes))
    order = np.random.default_rng(0).permutation(24)
    local, hf = (projections[key].coordinates for key in ("local", "hf"))
    np.testing.assert_allclose(left.get_offsets(), local[order])
    np.testing.assert_allclose(right.get_offsets(), align(local, hf)[order])
    colors = [to_hex(color) for color in left.get_facecolors()]
    assert colors == [plots.CLASS_COLORS[CLASSES[label]] for label in LABELS[order]]
    assert len(left.get_paths()) == 24
    written = " ".join(texts(figure)).replace("\n", " ")
    assert f"KL {projections['hf'].kl_divergence:.2f}" in written
    assert f"{projections['hf'].kept_neighbors:.0%} of the 10-NN kept" in written
    assert "Distances between clusters and cluster sizes carry no meaning" in written
    assert "seed 0, perplexity 7.7" in written


def test_pca_axes_tell_the_shares_of_variance():
    projections = {key: project_pca(X, 2) for key, X in PANELS.items()}
    figure = plots.plot_pca(projections, LABELS, CLASSES, CAPTION)
    for ax, pca in zip(figure.findobj(matplotlib.axes.Axes), projections.values(), strict=True):
        assert ax.get_xlabel() == f"PC1 ({pca.variance_shares[0]:.1%})"
        assert ax.get_ylabel() == f"PC2 ({pca.variance_shares[1]:.1%})"
        order = np.random.default_rng(0).permutation(24)
        np.testing.assert_allclose(ax.collections[0].get_offsets(), pca.scores[order])


@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_names_that_would_lie_on_each_other_are_moved_apart_inside_the_frame(corner):
    points = corner + np.random.default_rng(0).normal(size=(200, 2)) * 1e-3
    points[:2] = [[-1, -1], [1, 1]]
    classes = [f"a rather long {i}" for i in range(15)]
    labels = np.arange(200) % 15
    pca = PcaProjection(points, np.array([0.6, 0.4]))
    figure = plots.plot_pca({"local": pca}, labels, classes, CAPTION)
    shown(figure)
    (ax,) = figure.findobj(matplotlib.axes.Axes)
    notes = [text for text in ax.texts if text.get_text()]
    boxes = [matplotlib.text.Text.get_window_extent(note) for note in notes]
    assert len(boxes) == 15
    for i, box in enumerate(boxes):
        assert ax.bbox.x0 <= box.x0 < box.x1 <= ax.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert any(note.arrow_patch.get_visible() for note in notes)


def test_matrices_hold_local_hf_and_difference_and_print_their_numbers():
    figure = plots.plot_similarity_matrices(PANELS, LABELS, CLASSES, CAPTION)
    axes = [ax for ax in figure.findobj(matplotlib.axes.Axes) if ax.images]
    assert len(axes) == 6
    for row, centered in ((axes[:3], False), (axes[3:], True)):
        local, hf = (plots.class_similarity(X, LABELS, centered=centered) for X in PANELS.values())
        for ax, matrix in zip(row, (local, hf, hf - local), strict=True):
            np.testing.assert_allclose(ax.images[0].get_array(), matrix)
            numbers = [float(text.get_text()) for text in ax.texts]
            np.testing.assert_allclose(numbers, matrix.ravel(), atol=0.00501)
    low, high = axes[5].images[0].get_clim()
    assert low == -high
    assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim()


def test_matrices_of_many_classes_print_no_numbers():
    labels = np.arange(60) % 21
    X = {"local": embeddings(60)}
    figure = plots.plot_similarity_matrices(X, labels, [f"c{i}" for i in range(21)], CAPTION)
    axes = [ax for ax in figure.findobj(matplotlib.axes.Axes) if ax.images]
    assert len(axes) == 2
    assert not any(ax.texts for ax in axes)


def test_matrices_leave_out_classes_without_images_and_show_a_single_class():
    two = np.arange(24) % 2 * 2
    figure = plots.plot_similarity_matrices(PANELS, two, CLASSES, CAPTION)
    assert "ship" in texts(figure)
    assert "dog" not in texts(figure)
    shown(plots.plot_similarity_matrices(PANELS, np.zeros(24, int), CLASSES, CAPTION))


def test_variance_curves_hold_shares_and_sums_and_mark_10_and_50():
    projections = {"local": project_pca(embeddings(80, 60), 2), "hf": project_pca(embeddings(9), 2)}
    figure = plots.plot_variance_explained(projections, CAPTION)
    single, total, relative = figure.findobj(matplotlib.axes.Axes)
    for i, pca in enumerate(projections.values()):
        d, sums = len(pca.variance_shares), np.cumsum(pca.variance_shares)
        np.testing.assert_allclose(single.lines[i].get_ydata(), pca.variance_shares)
        np.testing.assert_allclose(single.lines[i].get_xdata(), np.arange(1, d + 1))
        np.testing.assert_allclose(total.lines[i].get_ydata(), sums)
        np.testing.assert_allclose(relative.lines[i].get_ydata(), sums)
        np.testing.assert_allclose(relative.lines[i].get_xdata(), np.arange(1, d + 1) / d)
    marked = total.lines[0].get_xdata()[total.lines[0].get_markevery()]
    assert list(marked) == [10, 50]
    sums = np.cumsum(projections["local"].variance_shares)
    assert f"Local model, {sums[9]:.1%} in 10 PCs, {sums[49]:.1%} in 50 PCs" in texts(figure)
    assert total.lines[0].get_color() == plots.MODEL_COLORS["local"]
    assert total.lines[1].get_color() == plots.MODEL_COLORS["hf"]


def image_of(index: int) -> np.ndarray:
    return np.full((3, 4, 8), index, np.uint8)


QUERIES = np.array([9, 2])
FOUND = {
    "local": Neighbors(np.array([[3, 4], [7, 5]]), np.array([[0.91, 0.52], [0.43, -0.04]])),
    "hf": Neighbors(np.array([[6, 1], [4, 0]]), np.array([[0.8, 0.7], [0.6, 0.5]])),
}


def test_neighbors_are_the_right_images_with_tick_or_cross_and_color():
    figure = plots.plot_neighbors(FOUND, QUERIES, LABELS, CLASSES, image_of, CAPTION)
    (ax,) = figure.findobj(matplotlib.axes.Axes)
    pictures = [int(image.get_array()[0, 0, 0]) for image in ax.images]
    assert pictures == [9, 2, 3, 4, 7, 5, 6, 1, 4, 0]
    words = [text.get_text() for text in ax.texts]
    assert words[1:3] == ["cat", "ship"]
    assert words[4:8] == ["✓ 0.91\ncat", "✗ 0.52\ndog", "✗ 0.43\ndog", "✓ -0.04\nship"]
    green, red = "#1a7f37", "#b3261e"
    frames = [to_hex(frame.get_edgecolor()) for frame in ax.patches if frame.get_linewidth()]
    assert frames == [green, red, red, green, green, red, red, red]


def test_cosines_that_are_almost_all_near_1_get_more_decimals():
    near, far = np.array([[0.9987, 0.9979, 0.3]]), np.array([[0.9987, 0.97, 0.3]])
    assert [plots.similarity_digits(found) for found in (near, far, near[:0])] == [4, 2, 2]
    found = {"local": Neighbors(np.array([[3, 4, 7]]), near)}
    figure = plots.plot_neighbors(found, QUERIES[:1], LABELS, CLASSES, image_of, CAPTION)
    words = [text.get_text().split()[1] for text in figure.axes[0].texts if "\n" in text.get_text()]
    assert words == ["0.9987", "0.9979", "0.3000"]


def test_pictures_keep_their_shape_and_their_pixels():
    figure = plots.plot_neighbors(FOUND, QUERIES, LABELS, CLASSES, image_of, CAPTION)
    (ax,) = figure.findobj(matplotlib.axes.Axes)
    left, right, bottom, top = ax.images[0].get_extent()
    assert (right - left) / (bottom - top) == pytest.approx(8 / 4)
    assert bottom == 1  # the words stand right below
    assert ax.get_aspect() == 1
    assert {image.get_interpolation() for image in ax.images} == {"nearest"}
    lefts = [image.get_extent()[0] for image in ax.images]
    assert lefts[0] < lefts[2] < lefts[3] < lefts[6] < lefts[7]


def test_training_curves_skip_what_was_not_measured_and_draw_zero():
    rows = [
        {"epoch": 1, "loss": 0.5, "lr": 0.0, "precision_at_5": None, "seconds": 9.0},
        {"epoch": 2, "loss": 0.4, "lr": 1e-3, "precision_at_5": 0.3},
        {"epoch": 3, "loss": float("nan"), "lr": 0.0, "precision_at_5": 0.4},
    ]
    figure = plots.plot_training_curves(rows, CAPTION)
    drawn = {ax.get_title(): ax for ax in figure.findobj(matplotlib.axes.Axes) if ax.lines}
    assert list(drawn) == ["prediction loss", "learning rate", "held-out precision@5"]
    (loss, lr, precision) = (ax.lines[0].get_xydata().tolist() for ax in drawn.values())
    assert loss == [[1, 0.5], [2, 0.4]]
    assert lr == [[1, 0.0], [2, 1e-3], [3, 0.0]]
    assert precision == [[2, 0.3], [3, 0.4]]


ODD = ("$x^2$ & $y$", "_hidden", r"a\$b", "中文", "tab\tnew\nline", "100% {a} " + "long" * 20, "")


def drawn_text(text: matplotlib.text.Text) -> str:
    """What Matplotlib itself draws for a text, or a failure where it would read mathematics."""
    clean, is_math = text._preprocess_math(text.get_text())
    assert not is_math
    return clean


def test_odd_class_names_are_drawn_literally_everywhere():
    labels = np.arange(28) % 7
    panels = {"local": embeddings(28), "hf": embeddings(28, seed=1)}
    pca = {key: project_pca(X, 2) for key, X in panels.items()}
    queries = np.arange(7)
    found = {"local": Neighbors(queries[:, None] + 7, np.ones((7, 1)))}
    expected = ["$x^2$ & $y$", "_hidden", r"a\$b", r"\u4e2d\u6587", r"tab\tnew\nline", ""]
    for figure in (
        plots.plot_pca(pca, labels, ODD, CAPTION),
        plots.plot_similarity_matrices(panels, labels, ODD, CAPTION),
        plots.plot_neighbors(found, queries, labels, ODD, image_of, CAPTION),
    ):
        shown(figure)
        words = {drawn_text(text).strip() for text in figure.findobj(matplotlib.text.Text)}
        assert {name for name in expected if name not in words} == set()
        assert "100% {a…nglong" in words
        for legend in figure.findobj(matplotlib.legend.Legend):
            assert len(legend.get_texts()) == len(ODD)


def test_a_long_name_keeps_both_its_ends_and_names_cut_alike_are_numbered():
    assert plots.literal("photographs of dogs", 12) == "photog… dogs"
    assert len(plots.literal("x" * 50, 14)) == 14
    assert plots.literal("exactly this", 12) == "exactly this"
    classes = ["kind", *(f"photographs of {animal} at night" for animal in ("cats", "dogs"))]
    pca = {"local": project_pca(embeddings(), 2)}
    words = texts(plots.plot_pca(pca, LABELS, classes, CAPTION))
    assert {"kind", "1 photo… night", "2 photo… night"} <= set(words)


def test_long_titles_and_footers_are_broken_inside_the_figure():
    caption = Caption("A title of $many$ words, " * 12, "/a/path/without/blanks_" * 30)
    figure = plots.plot_pca({"local": project_pca(embeddings(), 2)}, LABELS, CLASSES, caption)
    shown(figure)
    (ax,) = figure.findobj(matplotlib.axes.Axes)
    title, footer = (text.get_window_extent() for text in (figure._suptitle, figure._supxlabel))
    for box in (title, footer):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
    assert footer.y1 < ax.get_tightbbox().y0
    assert title.y0 > ax.get_tightbbox().y1


def test_every_figure_takes_one_model_and_few_images_and_leaves_the_style_alone():
    before = dict(matplotlib.rcParams)
    X, labels = {"local": embeddings(4, 3)}, np.array([0, 1, 2, 0])
    tsne = {"local": project_tsne(X["local"], seed=0)}
    pca = {"local": project_pca(X["local"], 2)}
    found = {"local": Neighbors(np.array([[1, 2, 3]]), np.ones((1, 3)))}
    for figure in (
        plots.plot_tsne(tsne, labels, CLASSES, CAPTION),
        plots.plot_pca(pca, labels, CLASSES, CAPTION),
        plots.plot_similarity_matrices(X, labels, CLASSES, CAPTION),
        plots.plot_variance_explained(pca, CAPTION),
        plots.plot_neighbors(found, np.array([0]), labels, CLASSES, image_of, CAPTION),
        plots.plot_training_curves([{"epoch": 1, "loss": 0.5}], CAPTION),
    ):
        shown(figure)
        assert figure.dpi == 150
        assert CAPTION.title in " ".join(texts(figure)).replace("\n", " ")
        assert "HF model" not in " ".join(texts(figure))
    assert dict(matplotlib.rcParams) == before


def test_a_map_without_tsne_says_so():
    flat = TsneProjection(np.zeros((24, 2)), float("nan"), 1.0, float("nan"))
    figure = plots.plot_tsne({"local": flat}, LABELS, CLASSES, CAPTION)
    shown(figure)
    assert "Local model: no t-SNE, principal components instead" in texts(figure)
