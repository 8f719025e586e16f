"""A pack holds the same photos, small, and is the same whoever makes it and however often."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from microclip_deploy import artifact
from microclip_deploy.data import packing
from microclip_deploy.data.contents import contents
from microclip_deploy.data.decode import read_photo
from microclip_deploy.data.packing import PackConfig, Packed
from microclip_deploy.data.photo import USUAL, PhotoConfig
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import TooManyBad, list_images
from microclip_deploy.errors import CheckpointError, DataError, UsageError

CONFIG = PackConfig(side=64)


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture with edges at all scales, as photos have them."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells in (3, 9, 27, 81):
        coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST)) / 4
    return Image.fromarray(pixels.astype(np.uint8))


def save(path: Path, image: Image.Image, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **more)  # type: ignore[arg-type]
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a folder of 14 photos of two classes, two of them bad."""
    root = tmp_path / "photos"
    for number in range(6):
        save(root / "large" / f"{number}.jpg", scene(600, 400, number), quality=92)
        save(root / "small" / f"{number}.png", scene(70, 64, number))
    (root / "large" / "text.jpg").write_text("no photo")
    (root / "small" / "empty.png").write_bytes(b"")
    return root


def make(source: Path, out: Path, config: PackConfig = CONFIG, **more: object) -> Packed:
    return packing.pack(list_images(source), out, config, max_bad=2, **more)  # type: ignore[arg-type]


def held(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_photos_keep_their_names_labels_order_and_if_small_their_bytes(
    tmp_path: Path, source: Path
) -> None:
    packed = make(source, tmp_path / "pack")
    assert (packed.photos, packed.reduced, packed.there_already) == (12, 6, 0)
    assert [file.path.name for file in packed.bad] == ["text.jpg", "empty.png"]
    found, before = list_images(tmp_path / "pack"), list_images(source)
    good = [path for path in before.paths if path.name not in ("text.jpg", "empty.png")]
    assert [path.parts[-2:] for path in found.paths] == [path.parts[-2:] for path in good]
    assert found.labels == ("large",) * 6 + ("small",) * 6
    assert contents(found.paths[6:]) == contents(good[6:])
    assert [min(read_photo(path, USUAL).image.size) for path in found.paths] == [64] * 12
    assert found.left_out.summary() == ""


TEST_VIEW_MEAN = 1.0
"""Of 255, between the test view of a photo and of the packed one: what JPEG at quality 95 (0.2 to
0.4 on photos) and resizing twice cost, doubled for these hard edges."""


def test_views_are_near_those_of_the_photo(tmp_path: Path) -> None:
    save(tmp_path / "photos" / "1.jpg", scene(1200, 900), quality=92)
    packing.pack(list_images(tmp_path / "photos"), tmp_path / "pack", PackConfig(side=192))
    preprocess = Preprocess(size=84, mean=(0.5,) * 3, std=(0.5,) * 3)

    def view(root: Path) -> NDArray[np.float64]:
        image = read_photo(list_images(root).paths[0], USUAL).image
        return preprocess.test_view(image).astype(float)

    difference = np.abs(view(tmp_path / "photos") - view(tmp_path / "pack"))
    assert difference.mean() < TEST_VIEW_MEAN


def test_photos_are_upright_and_those_that_depend_on_settings_are_kept(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    root = tmp_path / "photos"
    save(root / "1-turned.jpg", scene(400, 300), exif=exif)
    clear = scene(300, 300).convert("RGBA")
    save(root / "2-opaque.png", clear)
    clear.putalpha(Image.linear_gradient("L").resize((300, 300)))
    kept = [save(root / "3-clear.png", clear)]
    deep = Image.fromarray(np.arange(90000, dtype=np.uint16).reshape(300, 300))
    kept.append(save(root / "4-deep.png", deep))
    packed = packing.pack(list_images(root), tmp_path / "pack", CONFIG)
    found = list_images(tmp_path / "pack").paths
    sizes = [read_photo(path, USUAL).image.size for path in found]
    assert (sizes[:2], packed.reduced) == ([(64, 85), (64, 64)], 2)
    assert contents(found[2:]) == contents(kept)


def test_bytes_do_not_depend_on_workers_or_interruptions(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PHOTOS_A_SHARD", 3)
    make(source, tmp_path / "one", workers=1)
    make(source, tmp_path / "four", workers=4)
    assert held(tmp_path / "one") == held(tmp_path / "four")
    cut = shutil.copytree(tmp_path / "one", tmp_path / "cut")
    for name in ("manifest.json", "photos-00001.tar", "photos-00003.tar.index.safetensors"):
        (cut / name).unlink()
    (cut / ".photos-00001.tar.99.part").write_bytes(b"half")
    again = make(source, cut)
    assert again.there_already == 14 - 6
    (cut / ".photos-00001.tar.99.part").unlink()
    assert held(cut) == held(tmp_path / "one")


def test_what_changed_is_made_anew(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PHOTOS_A_SHARD", 3)
    out = tmp_path / "pack"
    make(source, out)
    save(source / "small" / "5.png", scene(70, 65))
    assert make(source, out).there_already == 12  # all but the last shard, of two photos
    assert make(source, out, PackConfig(side=48)).there_already == 0
    shutil.rmtree(source / "small")
    assert make(source, out).photos == 6
    assert len(list_images(out).paths) == 6
    assert not (out / "photos-00004.tar").exists()


def test_an_unfinished_pack_is_no_source(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pack"
    with pytest.raises(TooManyBad, match="2 of 14"):
        packing.pack(list_images(source), out, CONFIG, max_bad=1)
    with pytest.raises(DataError, match="found an unfinished one; run `pack` again"):
        list_images(out)
    assert make(source, out).there_already == 14
    assert len(list_images(out).paths) == 12


def test_a_missing_shard_and_the_index_of_another_are_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pack"
    make(source, out)
    shard, index = out / "photos-00000.tar", out / "photos-00000.tar.index.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(DataError, match=f"of {len(content)} bytes, found {len(content) - 512}"):
        list_images(out)
    shard.unlink()
    with pytest.raises(DataError, match="found none; copy it again"):
        list_images(out)
    shard.write_bytes(content)
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="its bytes are not the manifest's"):
        list_images(out)
    damaged = index.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read_photo(shard / "small" / "0.png", USUAL)  # by an index of its own
    assert index.read_bytes() == damaged
    make(source, out)
    assert len(list_images(out).paths) == 12


def test_folders_of_something_else_are_left_alone(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UsageError, match="found large"):
        make(source, source)
    (tmp_path / "run").mkdir()
    artifact.write_manifest(tmp_path / "run", "microclip.checkpoint/1", {}, [])
    with pytest.raises(UsageError, match="found another artifact"):
        make(source, tmp_path / "run")


def test_lists_label_and_two_photos_of_one_name_are_refused(tmp_path: Path, source: Path) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text(
        "path,label\nphotos/small/0.png,a/b\nphotos/small/1.png,photos\n"
        "photos/small/2.png,..\nphotos/.hidden/3.png,.net\n"
    )
    (source / ".hidden").mkdir()
    shutil.copy(source / "small" / "3.png", source / ".hidden" / "3.png")
    packing.pack(list_images(listed), tmp_path / "pack", CONFIG)
    found = list_images(tmp_path / "pack")
    assert found.labels == (".net", "_", "a_b", "photos")
    listed.write_text("photos/small/0.png\nphotos/small/0.png\n")
    with pytest.raises(DataError, match="name of its own"):
        packing.pack(list_images(listed), tmp_path / "other", CONFIG)


def test_a_pack_of_a_pack_and_of_photos_without_endings(tmp_path: Path, source: Path) -> None:
    make(source, tmp_path / "pack")
    packing.pack(list_images(tmp_path / "pack"), tmp_path / "again", PackConfig(side=32))
    found = list_images(tmp_path / "again")
    assert found.labels == ("large",) * 6 + ("small",) * 6
    shutil.copy(source / "small" / "0.png", tmp_path / "IMG")
    packing.pack(list_images(tmp_path / "IMG"), tmp_path / "one", CONFIG)
    assert list_images(tmp_path / "one").paths[0].name == "IMG.png"


PACK = """
import sys
from pathlib import Path
from microclip_deploy.data import packing
from microclip_deploy.data.sources import list_images
packing.PHOTOS_A_SHARD = 2
config = packing.PackConfig(side=64, photos=packing.PhotoConfig())
print(flush=True)
packing.pack(list_images(sys.argv[1]), Path(sys.argv[2]), config, max_bad=2, workers=2)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.large)])
def test_a_killed_pack_continues_and_loses_nothing(
    tmp_path: Path, source: Path, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(kills):
        save(source / "more" / f"{number:03}.jpg", scene(1200, 900, number))
    monkeypatch.setattr(packing, "PHOTOS_A_SHARD", 2)
    make(source, tmp_path / "whole", PackConfig(side=64, photos=PhotoConfig()))
    out, rng = tmp_path / "pack", np.random.default_rng(0)
    command = [sys.executable, "-c", PACK, str(source), str(out)]
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process, process.stdout:
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            os.kill(process.pid, signal.SIGKILL)
        if out.exists() and (out / "UNFINISHED").exists():
            with pytest.raises(DataError, match="unfinished"):
                list_images(out)
    subprocess.run(command, check=True, timeout=300)
    made = {name: content for name, content in held(out).items() if not name.endswith(".part")}
    assert made == held(tmp_path / "whole")
