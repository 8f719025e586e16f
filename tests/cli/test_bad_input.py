"""What users do wrong, through the command line: one clear error and the documented exit code."""

import json
import resource
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from microclip_deploy.adapt import train_step
from microclip_deploy.cli.main import main
from microclip_deploy.errors import CheckpointError
from microclip_deploy.model.backbone import VisionBackbone


@pytest.fixture
def arguments(adapt_arguments: list[str]) -> list[str]:
    """Return a command line that works; tests break one thing in it."""
    return [*adapt_arguments, "--epochs", "1"]


def assert_one_error(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    found = capsys.readouterr().err
    assert "Traceback" not in found
    assert found.count("error:") == 1
    for part in parts:
        assert part in found


@pytest.mark.parametrize(
    ("mistake", "code", "part"),
    [
        (["--set", "adapt.gama=0.3"], 2, "did you mean adapt.gamma"),
        (["--set", "adapt.gamma=1.5"], 2, "adapt.gamma"),
        (["--set", "gamma"], 2, "section.key=value"),
        (["--recipe", "birds"], 2, "default"),
        (["--device", "foo"], 2, "foo"),
        (["--device", "meta"], 2, "meta"),
        (["--device", "cuda:x"], 2, "cuda:x"),
        (["--model", "ViT-Z-99"], 3, "ViT-Z-99"),
        (["--model", "ViT-B-32", "--pretrained", "nobody"], 3, "laion2b_s34b_b79k"),
        (["-o", "/proc/nope/run"], 4, "could not be written"),
    ],
)
def test_options_that_cannot_work(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    mistake: list[str],
    code: int,
    part: str,
) -> None:
    assert main([*arguments, *mistake]) == code
    assert_one_error(capsys, part)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["photos"], "found no --classes FILE"),
        (["--classes", "c.txt"], "found no IMAGES"),
        ([], "found no IMAGES and no --classes FILE"),
        (["photos", "--resume"], "found no started run in run, no --classes FILE"),
    ],
)
def test_what_is_missing_is_named_alone(
    capsys: pytest.CaptureFixture[str], given: list[str], part: str
) -> None:
    assert main(["adapt", "-o", "run", *given]) == 2
    assert_one_error(capsys, f"{part}\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--device", "cuda"]) == 4
    assert_one_error(capsys, "--device cpu")


@pytest.mark.parametrize(
    ("option", "name", "text", "part"),
    [
        ("--classes", "classes.txt", "only one\n", "class"),
        ("--classes", "classes.txt", "robin\nRobin\nwren\n", "obin"),
        (
            "--descriptions",
            "some.json",
            '{"red circle": ["red"], "green square": ["green"]}',
            "blue",
        ),
        ("--pretrained", "model.pt", "a pickle", ".safetensors"),
    ],
)
def test_files_that_cannot_work(
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
    text: str,
    part: str,
) -> None:
    (tmp_path / name).write_text(text)
    model = ["--model", "ViT-B-32"] if option == "--pretrained" else []
    assert main([*arguments, *model, option, str(tmp_path / name)]) == 3
    assert_one_error(capsys, part)


def test_classes_of_one_row_are_refused_before_anything_is_written(
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = "drawn " * 20
    said = {"red circle": words + "red", "green square": words + "green", "blue stripe": "blue"}
    (tmp_path / "cut.json").write_text(json.dumps(said))
    assert main([*arguments, "--descriptions", str(tmp_path / "cut.json")]) == 3
    assert "2 of 6 sentences are longer than the 16 tokens" in caplog.text
    assert_one_error(capsys, "'red circle' and 'green square'")
    assert not (tmp_path / "run" / "inputs.json").exists()
    said["red circle"] = "red " + words
    (tmp_path / "cut.json").write_text(json.dumps(said))
    assert main([*arguments, "--descriptions", str(tmp_path / "cut.json")]) == 0
    warnings = json.loads((tmp_path / "run" / "manifest.json").read_text())["warnings"]
    assert [text for text in warnings if "2 of 6 sentences are longer" in text]


def test_empty_folder(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments[1] = str(tmp_path / "empty")
    assert main(arguments) == 3
    assert_one_error(capsys, "empty")


# ------------------------------------------------------------------------------ images


BAD = ("truncated.jpg", "text.jpg", "zero.png", "one-pixel.png", "bomb.png")


@pytest.fixture
def messy_folder(tmp_path: Path, photos: Path) -> Path:
    """Return a folder with good photos of every odd kind, and those of BAD."""
    folder = shutil.copytree(photos, tmp_path / "messy")
    image = Image.open(next(photos.rglob("*.png")))
    for mode, name in (("CMYK", "c.jpg"), ("L", "l.png"), ("P", "p.png"), ("I;16", "i.png")):
        image.convert(mode).save(folder / name)
    image.save(folder / "animated.webp", save_all=True, append_images=[image, image])
    image.save(folder / "ünïcödé – 鳥\n.png")
    image.save(folder / "truncated.jpg")
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[:-400])
    (folder / "text.jpg").write_text("not an image")
    (folder / "zero.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "one-pixel.png")
    (folder / "bomb.png").write_bytes(b"P6 30000 30000 255\n")
    (folder / "loop").symlink_to(folder)
    return folder


def test_bad_images_are_skipped_named_once_and_counted(
    tmp_path: Path, messy_folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[1] = str(messy_folder)
    assert main([*arguments, "--max-bad-images", "4"]) == 3
    assert_one_error(capsys, "--max-bad-images")
    assert main([*arguments, "--max-bad-images", "5"]) == 0
    found = capsys.readouterr().err
    assert [found.count(name) for name in BAD] == [1] * len(BAD)
    assert f"30 images, {len(BAD)} skipped" in found
    listed = (tmp_path / "run" / "bad-images.txt").read_text().splitlines()
    assert len(listed) == len(BAD)


# ------------------------------------------------------------------------------ models


@pytest.mark.parametrize("architecture", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_towers_that_cannot_work_are_refused(architecture: str) -> None:
    with torch.device("meta"):
        clip = open_clip.create_model(
            architecture, pretrained=None, pretrained_text=False, device="meta"
        )
    with pytest.raises(CheckpointError, match="vision transformers with a class token"):
        VisionBackbone(clip.visual)


@pytest.mark.parametrize("damage", ["missing", "cut", "nan", "other shape"])
def test_damaged_models_never_become_random_ones(
    tmp_path: Path,
    arguments: list[str],
    tiny_model_dir: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = model / "open_clip_model.safetensors"
    tensors = load_file(weights)
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "nan":
        tensors["visual.proj"][0, 0] = float("nan")
        save_file(tensors, weights)
    else:
        tensors["visual.proj"] = tensors["visual.proj"][:, :8].contiguous()
        save_file(tensors, weights)
    assert main([*arguments, "--model", f"local-dir:{model}"]) == 3
    assert_one_error(capsys)


def test_weights_of_another_architecture_are_refused(
    tmp_path: Path,
    arguments: list[str],
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = shutil.copy(tiny_model_dir / "open_clip_model.safetensors", tmp_path)
    assert main([*arguments, "--model", "ViT-S-32-alt", "--pretrained", str(weights)]) == 3
    assert_one_error(capsys, "could not be loaded")


@pytest.mark.parametrize("damage", ["missing", "flipped", "schema", "escape"])
def test_damaged_checkpoints_are_refused(
    tmp_path: Path,
    photos: Path,
    finished_run: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    manifest, weights = run / "manifest.json", run / "weights.safetensors"
    told = manifest.read_text()
    if damage == "missing":
        manifest.unlink()
    elif damage == "flipped":
        *most, last = weights.read_bytes()
        weights.write_bytes(bytes([*most, last ^ 1]))
    elif damage == "schema":
        manifest.write_text(told.replace("checkpoint/1", "checkpoint/9"))
    else:
        manifest.write_text(told.replace("weights.safetensors", "../secret"))
    assert main(["evaluate", str(run), str(photos), "--device", "cpu"]) == 3
    assert_one_error(capsys)


# ------------------------------------------------------------------------------ while it runs


def test_nan_loss_stops_and_keeps_the_last_good_state(
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = train_step.cross_entropy  # type: ignore[attr-defined]  # the name the step calls
    factors = iter([1, 1, float("nan")])
    monkeypatch.setattr(
        train_step, "cross_entropy", lambda *found: original(*found) * next(factors)
    )
    assert main([*arguments, "--save-every", "1"]) == 5
    assert_one_error(capsys, "adapt.lr")
    assert max((tmp_path / "run" / "state").glob("*.json")).stem == "step-000000002"
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_full_disk_is_one_error_and_loses_nothing(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A file size limit makes every write of the state fail, as a full disk does."""
    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert main(arguments) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_error(capsys, "could not be written")
    assert not (run / "manifest.json").exists()
    assert not list(run.rglob("*.part"))
    assert main([*arguments, "--resume"]) == 0
