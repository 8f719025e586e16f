import io
import pickle
from pathlib import Path

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")

import pyarrow.parquet as pq  # noqa: E402

from microclip_deploy.bulk import Classifier, classify_table  # noqa: E402
from microclip_deploy.calibration import Calibration  # noqa: E402
from microclip_deploy.errors import DataError, UsageError  # noqa: E402
from microclip_deploy.serving import Session  # noqa: E402


def paths_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*.png"))]


def test_rows_equal_the_session(session: Session, photos: Path) -> None:
    names = paths_of(photos)
    table = pa.table({"key": list(range(24)), "path": names})
    found = classify_table(session, table, top_k=2, batch_size=7, embedding=True, mask=True)
    assert found["key"].to_pylist() == list(range(24))
    views = np.stack([session.preprocess.test_view(session.preprocess.read(n)) for n in names])
    logits, cls, mask = (getattr(session.predict(views), n) for n in ("logits", "cls", "mask"))
    told = found.to_pylist()
    for row, expected, classified in zip(told, logits, session.classify(names), strict=True):
        assert row["classes"] == [guess.name for guess in classified.top[:2]]
        assert row["probabilities"] == pytest.approx([g.probability for g in classified.top[:2]])
        assert row["logits"] == pytest.approx(sorted(expected.tolist())[:-3:-1], abs=1e-4)
        assert row["error"] is None
    embedding = found["embedding"].combine_chunks().flatten().to_numpy().reshape(24, -1)
    assert embedding == pytest.approx(cls, abs=1e-5)
    assert np.array(found["mask"].to_pylist()).tolist() == mask.tolist()


def test_bytes_come_before_paths_and_nothing_is_an_error(session: Session, photos: Path) -> None:
    first, second = paths_of(photos)[::8][:2]
    encoded = [Path(first).read_bytes(), None, None, b"", b"no picture"]
    table = pa.table({"path": [second, second, None, second, second], "image": encoded})
    found = classify_table(session, table)
    assert found.column_names[:2] == ["path", "error"]
    errors = found["error"].to_pylist()
    assert errors[:4] == [None, None, "neither path nor image", "the file is empty"]
    assert "no image of a known format" in errors[4]
    expected = [result.class_name for result in session.classify([first, second])]
    assert [names[0] for names in found["classes"].to_pylist()[:2]] == expected
    assert found["classes"].null_count == 3


@pytest.mark.parametrize("embedding", [False, True])
def test_the_schema_never_depends_on_the_rows(
    session: Session, mixed: Path, embedding: bool
) -> None:
    table = pa.table({"path": pa.array(paths_of(mixed), pa.large_string())})
    kinds = {}
    for name, rows in {"all": table, "none": table[:0], "bad": table[2:3], "null": None}.items():
        given = pa.table({"path": pa.nulls(2)}) if rows is None else rows
        found = classify_table(session, given, embedding=embedding, mask=True)
        assert found.num_rows == given.num_rows
        kinds[name] = found.drop_columns(["path"]).schema
        stream = io.BytesIO()
        pq.write_table(found, stream)
        assert pq.read_table(stream).schema == found.schema
    assert len({str(kind) for kind in kinds.values()}) == 1


def test_duplicate_paths_are_rows_each(session: Session, photos: Path) -> None:
    found = classify_table(session, pa.table({"path": paths_of(photos)[:1] * 3}))
    assert len({str(row) for row in found.to_pylist()}) == 1
    assert found.num_rows == 3


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"file": ["a.png"]}, "one column 'path' .* found file; rename"),
        ({}, "found no columns"),
        ({"path": [1]}, "column 'path' as text: names of files, found int64; cast"),
        ({"image": ["a.png"]}, "column 'image' as binary: encoded files, found string"),
        ({"path": ["a.png"], "error": [1], "logits": [1]}, "found error, logits; rename"),
    ],
)
def test_other_columns_are_refused(session: Session, columns: dict[str, list], told: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(DataError, match=told):
        classify_table(session, pa.table(columns))


def test_what_is_no_table_is_refused(session: Session) -> None:
    with pytest.raises(DataError, match=r"expected a pyarrow\.Table, found list; convert"):
        classify_table(session, [{"path": "a.png"}])
    with pytest.raises(UsageError, match="top_k"):
        classify_table(session, pa.table({"path": ["a.png"]}), top_k=0)
    with pytest.raises(UsageError, match="batch size"):
        classify_table(session, pa.table({"path": ["a.png"]}), batch_size=0)


def test_unknown_is_told_where_the_model_has_the_rule(session: Session, photos: Path) -> None:
    table, kept = pa.table({"path": paths_of(photos)}), session.calibration
    shares = (0.4, 0.3, 0.3)
    rule = {"temperature": 2, "mean_prediction": shares, "source": "folder", "images": 24}
    try:
        session.calibration = None
        assert classify_table(session, table)["unknown"].null_count == 24
        session.calibration = Calibration.model_validate({**rule, "unknown_below": 0})
        best = [row[0] for row in classify_table(session, table)["probabilities"].to_pylist()]
        limit = sum(sorted(best)[11:13]) / 2
        session.calibration = Calibration.model_validate({**rule, "unknown_below": limit})
        told = classify_table(session, table)["unknown"].to_pylist()
    finally:
        session.calibration = kept
    assert told == [probability < limit for probability in best]


def test_a_classifier_is_pickled_without_its_session(tiny_export: Path, photos: Path) -> None:
    table = pa.table({"path": paths_of(photos)[:2]})
    classify = Classifier(tiny_export, top_k=1, threads=1)
    found = classify(table)
    again = pickle.loads(pickle.dumps(classify))
    assert len(pickle.dumps(classify)) < 1000
    assert again(table).equals(found)
