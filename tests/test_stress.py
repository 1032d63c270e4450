"""Numbers at their limits against a float64 oracle that knows nothing of how they are computed."""

import math

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from ijepa.comparison import compare
from ijepa.errors import UserError


def clusters(n, d=12, num_classes=4):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % num_classes
    centers = 1.5 * rng.normal(size=(num_classes, d))
    return (centers[labels] + rng.normal(size=(n, d))).astype(np.float32), labels


X, LABELS = clusters(120)
ROW = np.arange(120)[:, None] == 3
CASES = {
    "ordinary": (X, LABELS),
    **{f"times {scale}": (X * np.float32(scale), LABELS) for scale in (1e-42, 1e37)},
    "one row huge": (np.where(ROW, X * np.float32(1e30), X), LABELS),
    "one row tiny": (np.where(ROW, X * np.float32(1e-38), X), LABELS),
    "far from the origin": (X + np.float32(100), LABELS),
    "all equal": (np.ones_like(X), LABELS),
    "one dimension": (X[:, :1].copy(), LABELS),
    "two classes": clusters(60, num_classes=2),
    "one image per class": (X, np.arange(120)),
    "a thousand classes": clusters(1500, num_classes=1000),
    "300 to 1": (clusters(301)[0], (np.arange(301) == 150).astype(int)),
    "four images": (X[:4], LABELS[:4] % 2),
    "two images of each class": clusters(20, num_classes=10),
}


def oracle(X, labels):
    """P@5, silhouette and explained variance, in float64 throughout."""
    wide = X.astype(np.float64)
    wide = wide / np.abs(wide).max()
    unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    # Rounded, so that the oracle does not order exact ties by their last bit.
    similarity = (unit @ unit.T).round(7)
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :5]
    hits = (labels[nearest] == labels[:, None]).mean()
    spread = np.ptp(wide, axis=0).any() and min(len(wide) - 1, wide.shape[1]) >= 10
    shares = PCA().fit(wide).explained_variance_ratio_ if spread else np.array([math.nan])
    defined = len(np.unique(labels)) < len(labels)
    return {
        "precision_at_5": hits if len(wide) > 5 and defined else math.nan,
        "silhouette": silhouette_score(wide, labels) if defined else math.nan,
        "variance_10pc": shares[:10].sum(),
    }


SLOW = {"a thousand classes": pytest.mark.slow}
# Where debiased CKA has no value: nothing varies, too few images, or one carries all variance.
NO_CKA = {"all equal", "four images", "one row huge"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in CASES])
def test_numbers_at_their_limits_equal_the_float64_oracle(name):
    X, labels = CASES[name]
    found = compare({"local": X, "hf": X[::-1].copy()}, {}, labels, 0)
    for metric, value in oracle(X, labels).items():
        ours = found.metrics["local"][metric].value
        assert ours == pytest.approx(value, abs=1e-6, nan_ok=True), metric
    assert math.isfinite(found.agreement["cka"]) or name in NO_CKA
    shuffled = math.isfinite(found.agreement["cka_null_p99"])
    assert shuffled or name in {*NO_CKA, "one image per class"}


def test_a_power_of_two_changes_no_bit_of_any_number():
    scaled = (X * np.float32(scale) for scale in (2.0**-100, 1, 2.0**100))
    small, same, large = (compare({"local": a, "hf": a}, {}, LABELS, 0) for a in scaled)
    assert small.metrics == same.metrics == large.metrics
    assert small.agreement == same.agreement == large.agreement


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 0])
def test_what_is_no_number_or_direction_is_refused_with_the_image(bad):
    broken = X.copy()
    broken[[7, 9]] = bad
    with pytest.raises(UserError, match=r"hf model gives .* for image 7 \(2 of 120 images\)"):
        compare({"local": X, "hf": broken}, {"pixels": X}, LABELS, 0)
