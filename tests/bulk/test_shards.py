"""`predict --out shards/`: every photo is one row, whatever happens on the way."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow", reason="needs the extra parquet")

import pyarrow.parquet as pq  # noqa: E402

from microclip_deploy.bulk.job import settings_of  # noqa: E402
from microclip_deploy.bulk.shards import Part  # noqa: E402
from microclip_deploy.bulk.table import Wanted, classify_table  # noqa: E402
from microclip_deploy.cli.main import main  # noqa: E402
from microclip_deploy.errors import UsageError  # noqa: E402
from microclip_deploy.serving import Session  # noqa: E402

Predict = Callable[..., int]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def predict(tiny_export: Path, photos: Path, out: Path) -> Predict:
    """Return what predicts the photos into shards of 5, with further options."""

    def call(*options: str, images: Path = photos, model: Path = tiny_export) -> int:
        line = ["predict", str(model), str(images), "--out", f"{out}/", "--device", "cpu"]
        return main([*line, "--shard-rows", "5", "--threads", "1", *options])

    return call


def shards(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("shard-*"))


def test_shards_hold_each_photo_once_in_order(
    predict: Predict, out: Path, photos: Path, session: Session
) -> None:
    assert predict("--top-k", "2", "--columns", "embedding,mask") == 0
    found = pq.read_table(out)  # as any program reads a folder of Parquet
    paths = [str(path) for path in sorted(photos.rglob("*.png"))]
    assert found["index"].to_pylist() == list(range(24))
    assert found["path"].to_pylist() == paths
    wanted = classify_table(session, pa.table({"path": paths}), top_k=2, embedding=True, mask=True)
    assert found.drop_columns(["index"]).schema.equals(wanted.schema)
    assert found["classes"].to_pylist() == wanted["classes"].to_pylist()
    assert json.loads((out / "_SUCCESS").read_text()) == {
        "photos": 24, "errors": 0, "unknown": 0, "shards": 5,
    }  # fmt: skip
    assert shards(out) == [f"shard-{number:05d}.parquet" for number in range(5)]


def test_parts_are_disjoint_and_the_last_one_finishes(predict: Predict, out: Path) -> None:
    assert predict("--part", "2/3") == 0
    assert shards(out) == ["shard-00001.parquet", "shard-00004.parquet"]
    made = (out / "shard-00001.parquet").stat().st_mtime_ns
    assert predict("--part", "1/3") == 0
    assert not (out / "_SUCCESS").exists()
    assert predict() == 0  # other parts may do the rest
    assert (out / "shard-00001.parquet").stat().st_mtime_ns == made
    assert pq.read_table(out)["index"].to_pylist() == list(range(24))
    assert (out / "_SUCCESS").exists()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_other_parts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--part: expected I/N .* such as 2/8"):
        Part.parse(text)


def test_a_removed_shard_is_made_again_with_the_same_bytes(predict: Predict, out: Path) -> None:
    assert predict() == 0
    shard = out / "shard-00002.parquet"
    before = shard.read_bytes()
    shard.unlink()
    (out / ".shard-00002.parquet.1.part").write_bytes(b"left by a killed process")
    assert predict() == 0
    assert shard.read_bytes() == before
    assert not list(out.glob("*.part"))


@pytest.fixture(params=["tar", "parquet", "arrow", "pack"])
def archived(request: pytest.FixtureRequest, photos: Path, tmp_path: Path) -> Path:
    """Return the photos in another kind of source, in the order of the folder."""
    paths, source = sorted(photos.rglob("*.png")), tmp_path / f"photos.{request.param}"
    table = pa.table({"image": [path.read_bytes() for path in paths]})
    if request.param == "pack":
        assert main(["pack", str(photos), "-o", str(source)]) == 0
    elif request.param == "tar":
        with tarfile.open(source, "w") as tar:
            tar.add(photos, ".")
    elif request.param == "parquet":
        pq.write_table(table, source, row_group_size=7)
    else:
        with pa.OSFile(str(source), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return source


def test_archives_give_the_rows_of_their_photos(
    predict: Predict, out: Path, archived: Path, photos: Path, session: Session
) -> None:
    assert predict("--part", "2/3", images=archived) == 0
    assert predict(images=archived) == 0
    paths = [str(path) for path in sorted(photos.rglob("*.png"))]
    wanted, found = classify_table(session, pa.table({"path": paths})), pq.read_table(out)
    assert found.drop_columns(["index", "path"]).equals(wanted.drop_columns(["path"]))
    assert all(name.startswith(f"{archived}/") for name in found["path"].to_pylist())
    assert len(set(found["path"].to_pylist())) == 24
    before = (out / "shard-00002.parquet").read_bytes()
    (out / "shard-00002.parquet").unlink()
    assert predict(images=archived) == 0
    assert (out / "shard-00002.parquet").read_bytes() == before


def test_bad_photos_are_rows_with_their_reason(
    predict: Predict, out: Path, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(images=mixed) == 0
    rows = pq.read_table(out).to_pylist()
    assert [row["error"] is None for row in rows] == [True, True, False, True, True, True, False]
    assert rows[2]["error"] == "the file is empty"
    assert rows[2]["classes"] is None
    told = capsys.readouterr().err
    assert "2.png: the file is empty" in told
    assert "7 images, 2 with an error, 2 shards" in told


def test_names_that_are_no_text_are_read_and_escaped(
    predict: Predict, out: Path, mixed: Path, photos: Path
) -> None:
    name = Path(os.fsdecode(os.fsencode(mixed) + b"/9\xff.png"))
    shutil.copy(photos / "red circle" / "00.png", name)
    assert predict(images=mixed) == 0
    last = pq.read_table(out).to_pylist()[-1]
    assert (last["error"], last["path"]) == (None, f"{mixed}/9\\xff.png")


def test_photos_that_come_and_go_do_not_shift_rows(
    predict: Predict, out: Path, mixed: Path, photos: Path
) -> None:
    assert predict("--part", "1/2", images=mixed) == 0
    (mixed / "5.png").unlink()
    shutil.copy(photos / "red circle" / "00.png", mixed / "0a.png")
    assert predict(images=mixed) == 0
    rows = pq.read_table(out).to_pylist()
    assert [Path(row["path"]).name for row in rows] == [f"{number}.png" for number in range(7)]
    assert "no such file" in rows[5]["error"]


def test_no_readable_photo_at_all_is_an_error(
    predict: Predict, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("gone/1.png\ngone/2.png\n")
    assert predict(images=tmp_path / "list.txt") == 3
    assert "found none in 2 files" in capsys.readouterr().err
    assert not (out / "_SUCCESS").exists()


def test_another_job_is_refused(
    predict: Predict, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("--part", "2/5") == 0
    others = {
        ("--top-k", "1"): "top-k (5 there, 1 now)",
        ("--columns", "mask"): "columns ([] there, ['mask'] now)",
        ("--shard-rows", "6"): "shard-rows (5 there, 6 now)",
        ("--max-pixels", "1000"): "max-pixels (None there, 1000 now)",
    }
    for other, told in others.items():
        capsys.readouterr()
        assert predict(*other) == 2
        found = capsys.readouterr().err
        assert told in found
        assert "give the command that began it, or another --out" in found
    assert shards(out) == ["shard-00001.parquet"]


def test_other_photos_and_another_model_are_refused(
    predict: Predict, photos: Path, tmp_path: Path, finished_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    listed = tmp_path / "list.txt"
    listed.write_text(f"{photos}/red circle/00.png\n" * 2)
    assert predict(images=listed) == 0
    listed.write_text(f"{photos}/red circle/01.png\n" * 2)
    assert predict(images=listed) == 2
    assert predict(images=photos, model=finished_run) == 2
    assert "found other settings: model, images; give" in capsys.readouterr().err


def test_the_bytes_of_a_prior_count(tiny_export: Path, photos: Path, tmp_path: Path) -> None:
    found = set()
    for weight in (1, 2):
        (tmp_path / "prior.csv").write_text(f"red circle,{weight}\n")
        prior = str(tmp_path / "prior.csv")
        found.add(settings_of(tiny_export, [photos], Wanted(), 5, prior=prior)["prior"])
    assert len(found) == 2


@pytest.mark.parametrize("damage", ["truncated", "another job's"])
def test_a_shard_that_is_not_the_jobs_is_named(
    predict: Predict, out: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("--part", "2/5") == 0
    shard = out / "shard-00001.parquet"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-7])
    else:
        pq.write_table(pq.read_table(shard).replace_schema_metadata(None), shard)
    assert predict() == 3
    assert "shard-00001.parquet: expected 5 rows of this job" in capsys.readouterr().err


def test_a_lost_list_of_photos_is_named(
    predict: Predict, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict("--part", "2/5") == 0
    (out / "_photos.parquet").unlink()
    assert predict() == 3
    assert "_photos.parquet: expected the photos that the job began" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(
    predict: Predict, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir()
    (out / "holiday.png").write_bytes(b"")
    assert predict() == 2
    assert "found one with holiday.png" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["holiday.png"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--format", "csv"), "--format: expected a file as --out"),
        (("--overlay", "x"), "--overlay: expected a file as --out"),
        (("--joint",), "--joint: expected a file as --out"),
        (("--part", "5/4"), "--part: expected I/N"),
        (("--columns", "fg"), "--columns: expected embedding or mask"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    predict: Predict, options: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(*options) == 2
    assert told in capsys.readouterr().err


def test_options_of_shards_need_a_folder(
    tiny_export: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(tiny_export), str(photos), "--part", "1/2"]) == 2
    assert "--part: expected a folder as --out, such as shards/" in capsys.readouterr().err


def test_a_full_disk_is_one_error_and_loses_no_shard(
    predict: Predict, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file size limit makes the write of a shard fail, as a full disk does."""
    assert predict("--part", "1/5") == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert predict() == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert "shard-00001.parquet: could not be written: File too large" in told
    assert shards(out) == ["shard-00000.parquet"]
    assert not list(out.glob(".*.part"))
    assert predict() == 0
    assert pq.read_table(out)["index"].to_pylist() == list(range(24))


def test_two_processes_do_not_make_one_part(
    predict: Predict, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from microclip_deploy.artifact import exclusive

    with exclusive(out, "", ".part-1-of-1.lock"):
        assert predict() == 2
    assert "another process makes this part" in capsys.readouterr().err


def start(model: Path, listed: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a job in a process of its own, in shards of 8."""
    line = ["predict", str(model), str(listed), "--out", f"{out}/", "--device", "cpu"]
    command = [sys.executable, "-m", "microclip_deploy.cli", *line, "--shard-rows", "8"]
    return subprocess.Popen([*command, "--batch-size", "4", *options], stderr=subprocess.DEVNULL)


def many(photos: Path, folder: Path, times: int) -> Path:
    """Write a list that names all photos `times` times."""
    names = [str(path) for path in sorted(photos.rglob("*.png"))]
    (folder / "list.txt").write_text("\n".join(names * times))
    return folder / "list.txt"


def kill_when(
    process: subprocess.Popen[bytes], moment: Callable[[], bool], pause_s: float = 0
) -> None:
    """Kill a process a pause after a moment, unless it ends before."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not moment() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(pause_s)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_job_goes_on(tiny_export: Path, photos: Path, out: Path, tmp_path: Path) -> None:
    listed = many(photos, tmp_path, 8)
    kill_when(start(tiny_export, listed, out), lambda: len(shards(out)) >= 2)
    assert 2 <= len(shards(out)) < 24
    line = ["predict", str(tiny_export), str(listed), "--out", f"{out}/", "--device", "cpu"]
    assert main([*line, "--shard-rows", "8"]) == 0
    assert pq.read_table(out)["index"].to_pylist() == list(range(192))


@pytest.mark.large
def test_fifty_kills_lose_and_double_nothing(
    tiny_export: Path, photos: Path, tmp_path: Path
) -> None:
    listed, rng = many(photos, tmp_path, 100), random.Random(0)
    assert start(tiny_export, listed, tmp_path / "0").wait(300) == 0
    expected = pq.read_table(tmp_path / "0")
    kills = job = 0
    while kills < 50:
        job += 1
        out, ended = tmp_path / str(job), False
        while not ended:
            some = rng.randrange(12)
            wanted = len(shards(out)) + some
            process = start(tiny_export, listed, out)
            # While it starts or lists the photos; while it classifies or writes.
            pause_s = rng.random() * (0.1 if some else 3)
            kill_when(process, lambda: len(shards(out)) >= wanted, pause_s)  # noqa: B023
            ended = process.returncode == 0
            kills += not ended
        found = pq.read_table(out)
        assert found.equals(expected)
        assert not list(out.glob(".shard-*"))
        assert (out / "_SUCCESS").exists()


@pytest.mark.slow
def test_parts_that_begin_a_job_at_once_agree(
    tiny_export: Path, photos: Path, out: Path, tmp_path: Path
) -> None:
    listed = many(photos, tmp_path, 20)
    parts = [start(tiny_export, listed, out, "--part", f"{i}/3") for i in (1, 2, 3)]
    assert [part.wait(300) for part in parts] == [0, 0, 0]
    assert pq.read_table(out)["index"].to_pylist() == list(range(480))
    assert (out / "_SUCCESS").exists()
