"""Joint reading: equal to a plain dense solver, indifferent to order, and safe with odd folders."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from microclip_deploy.errors import DataError, VerificationError
from microclip_deploy.joint import Folder, joint_probabilities, neighbours
from microclip_deploy.joint.folder import NEIGHBOURS, ROUNDS, STEPS
from microclip_deploy.joint.mixture import ANCHOR, VARIANCE_FLOOR, WEIGHT
from microclip_deploy.joint.shortlist import LONGEST

ROUNDING = 1e-4
"""Of float32 over all rounds, as a difference of probabilities."""

Matrix = NDArray[np.float64]


def softmax(scores: Matrix) -> Matrix:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def unit(rows: Matrix) -> Matrix:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def dense(x: Matrix, p: Matrix, t: Matrix) -> Matrix:
    """Return z as docs/joint.md defines it, with N x N and N x C x E arrays."""
    (n, e), k = x.shape, min(NEIGHBOURS, len(x) - 1)
    cosine = x @ x.T
    np.fill_diagonal(cosine, -np.inf)
    w = np.zeros((n, n))
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    np.put_along_axis(w, nearest, np.take_along_axis(cosine, nearest, 1).clip(0), 1)
    w = (w + w.T) / (2 * max(k, 1))

    def squares(mean: Matrix) -> Matrix:
        return np.asarray((x[:, None] - mean) ** 2)

    z, mean = p, t
    start = variance = np.einsum("nc,nce->e", z, squares(t)).clip(n * VARIANCE_FLOOR / e) / n
    for done in range(ROUNDS + 1):
        likelihood = -0.5 * (squares(mean) / variance).sum(axis=2)
        for _ in range(STEPS):
            z = softmax(np.log(p) + WEIGHT / e * likelihood + w @ z)
        if done < ROUNDS:
            photos = np.bincount(z.argmax(axis=1), minlength=len(t))[:, None]
            own = photos / (ANCHOR + photos)
            mean = unit(own * unit(z.T @ x) + (1 - own) * t)
            seen = own * np.einsum("nc,nce->ce", z, squares(mean))
            given = (1 - own) * z.sum(axis=0)[:, None] * (start + (t - mean) ** 2)
            variance = ((seen + given).sum(axis=0) / n).clip(VARIANCE_FLOOR / e)
    return z


def folder(
    photos: int, classes: int, size: int = 16, seed: int = 0, present: int | None = None
) -> tuple[Matrix, Matrix, Matrix, NDArray[np.int64]]:
    """Return features, text probabilities and class matrix of made-up photos, and their labels."""
    rng = np.random.default_rng(seed)
    texts = unit(rng.normal(size=(classes, size)))
    gap = rng.normal(size=size) / size**0.5  # photos lie on one side of the texts
    centres = unit(texts + 0.9 * unit(rng.normal(size=(classes, size))) + gap)
    labels = rng.integers(present or classes, size=photos)
    features = unit(centres[labels] + 0.9 * rng.normal(size=(photos, size)) / size**0.5)
    return features, softmax(10 * features @ texts.T), texts, labels


def joint(x: Matrix, p: Matrix, t: Matrix) -> NDArray[np.float32]:
    return joint_probabilities(*(each.astype(np.float32) for each in (x, p, t)))


@pytest.mark.parametrize(
    ("photos", "classes"), [(150, 12), (40, LONGEST), (NEIGHBOURS - 2, 5), (2, 3), (1, 3), (60, 1)]
)
def test_it_equals_the_dense_solver(photos: int, classes: int) -> None:
    x, p, t, _ = folder(photos, classes)
    found = joint(x, p, t)
    np.testing.assert_allclose(found, dense(x, p, t), atol=ROUNDING)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=ROUNDING)
    assert found.dtype == np.float32


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, p, t, _ = folder(150, 12)
    whole = joint(x, p, t)
    monkeypatch.setattr(neighbours, "BLOCK", 1000)
    np.testing.assert_allclose(joint(x, p, t), whole, atol=ROUNDING)


def test_the_order_of_photos_and_of_classes_does_not_matter() -> None:
    x, p, t, _ = folder(150, 12)
    found, rng = joint(x, p, t), np.random.default_rng(1)
    photos, classes = rng.permutation(150), rng.permutation(12)
    other = joint(x[photos], p[np.ix_(photos, classes)], t[classes])
    np.testing.assert_allclose(other, found[np.ix_(photos, classes)], atol=ROUNDING)


def test_the_same_photos_give_the_same_bytes() -> None:
    x, p, t, _ = folder(150, 12)
    assert joint(x, p, t).tobytes() == joint(x, p, t).tobytes()


def test_it_helps_where_photos_of_a_class_resemble_each_other() -> None:
    x, p, t, labels = folder(600, 12)
    alone, together = ((z.argmax(axis=1) == labels).mean() for z in (p, joint(x, p, t)))
    assert together > alone + 0.02


@pytest.mark.parametrize("present", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_few_present_classes_do_no_harm(present: int, seed: int) -> None:
    x, p, t, labels = folder(200, 40, 32, seed, present)
    alone, together = ((z.argmax(axis=1) == labels).mean() for z in (p, joint(x, p, t)))
    assert together >= alone


@pytest.mark.parametrize("photos", [1, 2, 50])
def test_photos_that_are_all_the_same_keep_their_class(photos: int) -> None:
    x, p, t, _ = folder(1, 12)
    found = joint(np.repeat(x, photos, axis=0), np.repeat(p, photos, axis=0), t)
    assert np.isfinite(found).all()
    assert (found.argmax(axis=1) == p.argmax()).all()
    np.testing.assert_allclose(found, found[:1].repeat(photos, axis=0), atol=ROUNDING)


def test_photos_that_equal_their_texts_have_a_variance() -> None:
    t = np.eye(8)
    found = joint(t, softmax(100 * t @ t.T).clip(1e-30), t)
    np.testing.assert_allclose(found, t, atol=ROUNDING)


def test_duplicates_are_read_alike() -> None:
    x, p, t, _ = folder(60, 12)
    found = joint(np.tile(x, (2, 1)), np.tile(p, (2, 1)), t)
    np.testing.assert_allclose(found[:60], found[60:], atol=ROUNDING)


def test_of_many_classes_a_shortlist_is_weighed_in_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos, classes, size = 500, 10_000, 16
    monkeypatch.setattr(neighbours, "BLOCK", 2**18)
    monkeypatch.setattr("microclip_deploy.joint.folder.ROUNDS", 1)
    rng = np.random.default_rng(0)
    x, t = (unit(rng.normal(size=(n, size))).astype(np.float32) for n in (photos, classes))
    read = Folder(t)
    tracemalloc.start()
    for begin in range(0, photos, 20):
        rows = x[begin : begin + 20]
        read.add(rows, 100 * rows @ t.T)
    found = read.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.classes.shape == found.values.shape == (photos, LONGEST)
    assert peak < photos * classes * 4 / 2  # a table of all photos and classes would need more
    assert found.dense(classes)[7].argmax() == found.best()[7]


def test_ranks_are_those_of_the_dense_table() -> None:
    x, p, t, labels = folder(100, LONGEST + 20)
    read = Folder(t.astype(np.float32))
    read.add(x.astype(np.float32), np.log(p).astype(np.float32))
    found = read.read()
    table = found.dense(len(t))
    right = np.take_along_axis(table, labels[:, None], 1)
    before = (table == right) & (np.arange(len(t)) < labels[:, None])
    listed = (found.classes == labels[:, None]).any(axis=1)
    expected = np.where(listed, ((table > right) | before).sum(axis=1), LONGEST)
    np.testing.assert_array_equal(found.ranks(labels), expected)


def test_bad_input_is_refused_with_a_remedy() -> None:
    x, p, t, _ = (each.astype(np.float32) for each in folder(20, 4))
    broken = x.copy()
    broken[3, 2] = np.nan
    with pytest.raises(VerificationError, match=r"found NaN or infinity; .*adapt again"):
        joint_probabilities(broken, p, t)
    with pytest.raises(VerificationError, match="expected finite scores"):
        joint_probabilities(x, np.full_like(p, np.nan), t)
    with pytest.raises(DataError, match=r"expected features \(rows, 16\), found \(20, 15\)"):
        joint_probabilities(x[:, :15], p, t)
    with pytest.raises(DataError, match=r"expected scores \(20, 4\), found \(19, 4\)"):
        joint_probabilities(x, p[:19], t)
    with pytest.raises(DataError, match=r"rows of norm 1, found .* to .*; divide"):
        joint_probabilities(3 * x, p, t)
    with pytest.raises(DataError, match="found none; add some"):
        Folder(t).read()
