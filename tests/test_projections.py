import numpy as np
import pytest
from scipy.spatial import procrustes
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from ijepa.errors import UserError
from ijepa.projections import align, make_maps, project_pca, project_tsne, project_tsne_cached


def embeddings(n: int = 24, d: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) + 0.5).astype(np.float32)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (8, 30)])
def test_pca_equals_scikit_learn_with_the_largest_loading_positive(n, d):
    X = embeddings(n, d)
    pca = project_pca(X, 3)
    expected = PCA(n_components=min(n, d), svd_solver="full").fit(X.astype(np.float64))
    loadings = expected.components_[:3]
    signs = [np.sign(row[np.argmax(np.abs(row))]) for row in loadings]
    scores = (X - X.mean(axis=0)) @ loadings.T * signs
    np.testing.assert_allclose(pca.coordinates, scores, atol=1e-5)  # float32 embeddings
    np.testing.assert_allclose(
        pca.variance_shares[: min(n, d)], expected.explained_variance_ratio_, atol=1e-9
    )
    assert pca.variance_shares.shape == (d,)


def test_pca_of_fewer_dimensions_than_asked_for_or_of_no_variance_is_zero_there():
    line = project_pca(embeddings(d=1), 2)
    assert np.all(line.coordinates[:, 1] == 0)
    assert "PC1 (100.0%), up: PC2 (0.0%)" in line.note
    constant = project_pca(np.ones((5, 3), np.float32), 2)
    assert np.all(constant.coordinates == 0)
    assert np.all(constant.variance_shares == 0)


def test_align_equals_scipys_procrustes_in_the_size_and_at_the_center_of_the_reference():
    reference, moving = np.random.default_rng(0).normal(size=(2, 30, 2)) + 4
    center = reference.mean(axis=0)
    expected = procrustes(reference, moving)[1] * np.linalg.norm(reference - center) + center
    np.testing.assert_allclose(align(reference, moving), expected)
    spot = align(reference, np.ones((30, 2)))
    np.testing.assert_allclose(spot, np.tile(center, (30, 1)))


def test_tsne_gives_the_same_map_whatever_the_threads_and_the_lengths_of_embeddings():
    X = embeddings(60)
    first = project_tsne(X, seed=3)
    with threadpool_limits(limits=2):
        second = project_tsne(X, seed=3)
    np.testing.assert_equal(vars(first), vars(second))
    lengths = np.random.default_rng(0).choice([0.5, 1, 2, 4], size=(60, 1)).astype(np.float32)
    scaled = project_tsne(X * lengths, seed=3)
    np.testing.assert_array_equal(first.coordinates, scaled.coordinates)


def test_the_perplexity_is_that_of_a_model_that_has_a_map():
    labels, equal = np.arange(24) % 2, np.ones((24, 6), np.float32)
    assert make_maps({"local": equal, "hf": embeddings()}, labels, 0).perplexity == 23 / 3
    assert make_maps({"local": equal}, labels, 0).perplexity is None


def test_kept_neighbors_are_counted_by_two_sorts():
    X = embeddings(40)
    projection = project_tsne(X, seed=0)
    unit, place = X / np.linalg.norm(X, axis=1, keepdims=True), projection.coordinates
    apart = 1 - unit @ unit.T, np.linalg.norm(place[:, None] - place, axis=2)
    lists = [np.argsort(d + 99 * np.eye(40), axis=1)[:, :10].tolist() for d in apart]
    kept = sum(len({*a} & {*b}) for a, b in zip(*lists, strict=True))
    assert 0.3 < projection.kept_neighbors < 1
    assert projection.kept_neighbors == pytest.approx(kept / 400)
    assert f"keeps {kept / 400:.0%} of the 10 nearest" in projection.note
    assert "keeps" not in project_tsne(X[:11], seed=0).note  # all are near


@pytest.mark.parametrize(("n", "expected"), [(4, 1.0), (31, 10.0), (91, 30.0), (100, 30.0)])
def test_perplexity_is_30_or_less_than_a_third_of_the_images(n, expected):
    assert project_tsne(embeddings(n), seed=0).perplexity == expected
    assert expected < n / 3


@pytest.mark.parametrize("X", [*map(embeddings, (1, 2, 3)), np.ones((9, 4), np.float32)])
def test_too_few_or_equal_embeddings_are_shown_by_their_principal_components(X):
    projection = project_tsne(X, seed=0)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    np.testing.assert_allclose(projection.coordinates, project_pca(unit, 2).coordinates, atol=1e-6)
    assert "no t-SNE" in projection.note
    assert np.isnan(projection.kl_divergence)
    assert np.isnan(projection.perplexity)
    assert np.isnan(projection.kept_neighbors)


@pytest.mark.parametrize("n", [30, 2, 1])
def test_a_map_is_made_once_read_bit_for_bit_and_made_again_where_it_is_damaged(tmp_path, n):
    X = embeddings(n)
    made = project_tsne_cached(X, 3, tmp_path)
    for again in (project_tsne(X, 3), project_tsne_cached(X, 3, tmp_path)):
        np.testing.assert_equal(vars(again), vars(made))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-8], whole.replace(b"kl_div", b"kl_dib")):
        assert damaged != whole
        file.write_bytes(damaged)
        np.testing.assert_equal(vars(project_tsne_cached(X, 3, tmp_path)), vars(made))
        assert file.read_bytes() == whole
    with pytest.raises(UserError):
        project_tsne_cached(X, 3, file)  # which is no folder
    with np.load(file) as kept:
        moved = {**kept, "coordinates": kept["coordinates"] + 1}
    np.savez(file, **moved)
    found = project_tsne_cached(X, 3, tmp_path).coordinates
    np.testing.assert_array_equal(found, made.coordinates + 1)


def test_other_numbers_or_another_seed_are_another_map(tmp_path):
    X = embeddings(12)
    moved = X.copy()
    moved[-1, -1] = np.nextafter(moved[-1, -1], np.float32(9))
    for what in ((X, 0), (X, 1), (moved, 0), (X.reshape(6, 12), 0), (X.astype(np.float64), 0)):
        project_tsne_cached(*what, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_maps_of_two_models_are_those_of_each_turned_to_look_alike(tmp_path):
    X, labels = embeddings(40), np.arange(40) % 4
    Z = np.concatenate([-X, embeddings(40, seed=1)], axis=1)
    maps = make_maps({"local": X, "hf": Z}, labels, 3, tmp_path)
    np.testing.assert_array_equal(maps.rows, np.arange(40))
    tsne = {"local": project_tsne(X, 3), "hf": project_tsne(Z, 3)}
    np.testing.assert_array_equal(maps.tsne["local"].coordinates, tsne["local"].coordinates)
    expected = align(*(map_.coordinates for map_ in tsne.values()))
    np.testing.assert_array_equal(maps.tsne["hf"].coordinates, expected)
    assert maps.tsne["hf"].kept_neighbors == tsne["hf"].kept_neighbors
    local, hf = (maps.pca[name].coordinates for name in ("local", "hf"))
    np.testing.assert_allclose(local, project_pca(X, 2).coordinates)
    np.testing.assert_allclose(np.abs(hf), np.abs(project_pca(Z, 2).coordinates))
    assert all(np.corrcoef(local[:, axis], hf[:, axis])[0, 1] > 0 for axis in (0, 1))
    assert len(list(tmp_path.iterdir())) == 2


def test_maps_show_a_balanced_seeded_sample_in_order_when_images_are_many():
    X = np.ones((6000, 2))  # no variance: no t-SNE, which would take minutes
    labels = np.arange(6000) % 2
    first, again, other = (make_maps({"local": X}, labels, seed).rows for seed in (0, 0, 1))
    assert len(first) == 5000
    assert (np.diff(first) > 0).all()
    np.testing.assert_array_equal(np.bincount(labels[first]), [2500, 2500])
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
