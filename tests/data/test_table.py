"""Rows of Parquet and Arrow files are photos, as Hugging Face writes them and as others do."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from microclip_deploy.data import table
from microclip_deploy.data.decode import BadImage, read_photo
from microclip_deploy.data.photo import USUAL
from microclip_deploy.data.sources import check_images, list_images
from microclip_deploy.errors import DataError

pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")
pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")

SHADES = range(25)


def photo(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def hugging_face() -> Any:
    images = [{"bytes": photo(shade), "path": f"{shade}.png"} for shade in SHADES]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    rows = {"image": pa.array(images, struct), "label": pa.array([s % 2 for s in SHADES])}
    return pa.table(rows).replace_schema_metadata(about)


def save(table: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
        return path
    kind = pa.ipc.new_file if "file" in path.stem else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


@pytest.mark.parametrize("name", ["train.parquet", "data-00000-of-00001.arrow", "file.arrow"])
def test_a_data_set_of_hugging_face_is_read_with_its_labels(tmp_path: Path, name: str) -> None:
    save(hugging_face(), tmp_path / "train" / name)
    (tmp_path / "train" / "state.json").write_text("{}")
    found = list_images(tmp_path / "train")
    assert [path.name for path in found.paths[:2]] == ["00000000", "00000001"]
    assert found.labels[:3] == ("cat", "dog", "cat")
    assert check_images(found.paths).good == found.paths
    shades = [int(np.asarray(read_photo(path, USUAL).image).max()) for path in found.paths]
    assert shades == list(SHADES)


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_plain_bytes_and_texts_as_labels_are_read(tmp_path: Path, kind: str) -> None:
    rows = {
        "thumb": pa.array([b"x"] * 3, pa.binary()),
        "image": pa.array([photo(1), None, b"text"], getattr(pa, kind)()),
        "label": ["a/b", None, "c"],
    }
    for name in ("x.parquet", "x.arrow"):
        found = list_images(save(pa.table(rows).slice(0), tmp_path / name))
        assert found.labels == ("a/b", None, "c")
        read_photo(found.paths[0], USUAL)
        for path in found.paths[1:]:
            with pytest.raises(BadImage, match=r"no image|is empty"):
                read_photo(path, USUAL)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_tables_without_photos_are_refused(tmp_path: Path, name: str) -> None:
    wrong = save(pa.table({"image": ["a.png"], "label": [1]}), tmp_path / name)
    with pytest.raises(DataError, match=r"column of image bytes.*found none among image \(string"):
        list_images(wrong)
    two = save(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two" / name)
    with pytest.raises(DataError, match="found 2 among a"):
        list_images(two)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "file.arrow"])
def test_cut_tables_are_refused(tmp_path: Path, name: str) -> None:
    path = save(hugging_face(), tmp_path / name)
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(DataError, match="expected a whole Parquet or Arrow file"):
        list_images(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="expected a whole Parquet or Arrow file"):
        list_images(path)


def test_a_compressed_arrow_file_is_refused(tmp_path: Path) -> None:
    rows = pa.table({"image": [photo(1) + bytes(9999)]})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, rows.schema, options=options) as writer,
    ):
        writer.write_table(rows)
    with pytest.raises(DataError, match="without compression"):
        list_images(tmp_path / "x.arrow")


def test_a_row_group_that_would_fill_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(hugging_face(), tmp_path / "x.parquet")
    monkeypatch.setattr(table, "MOST_GROUP_BYTES", 100)
    with pytest.raises(DataError, match="row_group_size=100"):
        list_images(path)
