"""What users do wrong, through the command line: one clear error and the documented exit code."""

import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from microclip_deploy.cli.main import main

FAST = ["--device", "cpu", "--set", "adapt.epochs=1", "--set", "views.crops=1"]


@pytest.fixture
def arguments(tmp_path: Path, photos: Path, classes_file: Path, tiny_model_dir: Path) -> list[str]:
    """Return a command line that works; tests break one thing in it."""
    return [
        "adapt",
        str(photos),
        "--classes",
        str(classes_file),
        "--model",
        f"local-dir:{tiny_model_dir}",
        "-o",
        str(tmp_path / "run"),
        *FAST,
    ]


def with_classes(arguments: list[str], path: Path, text: str) -> list[str]:
    path.write_text(text)
    changed = list(arguments)
    changed[changed.index("--classes") + 1] = str(path)
    return changed


def with_model(arguments: list[str], *model: str) -> list[str]:
    at = arguments.index("--model")
    return [*arguments[:at], "--model", *model, *arguments[at + 2 :]]


def assert_one_error(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    found = capsys.readouterr().err
    assert "Traceback" not in found
    assert found.count("error:") == 1
    for part in parts:
        assert part in found


def test_empty_folder(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments[1] = str(tmp_path / "empty")
    assert main(arguments) == 3
    assert_one_error(capsys, "empty")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("only one\n", "class"),
        ("robin\nRobin\nwren\n", "obin"),
        ("\n\n", "class"),
    ],
)
def test_class_lists_that_cannot_work(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], text: str, part: str
) -> None:
    assert main(with_classes(arguments, tmp_path / "classes.txt", text)) == 3
    assert_one_error(capsys, part)


def test_class_without_description(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "descriptions.json"
    path.write_text('{"red circle": ["It is red."], "green square": ["It is green."]}')
    assert main([*arguments, "--descriptions", str(path)]) == 3
    assert_one_error(capsys, "blue stripe")


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.fixture
def messy_folder(tmp_path: Path, photos: Path) -> Path:
    """Return a folder with good photos of every odd kind, and eight bad files."""
    folder = tmp_path / "messy"
    shutil.copytree(photos, folder)
    image = Image.open(next(photos.rglob("*.png")))
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("L").save(folder / "grey.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("I;16").save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rotated.jpg", exif=exif)
    image.save(folder / "animated.webp", save_all=True, append_images=[image, image])
    image.save(folder / "ünïcödé – 鳥\n.png")
    jpeg = folder / "truncated.jpg"
    image.save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-400])
    (folder / "text.jpg").write_text("not an image")
    (folder / "zero.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "one-pixel.png")
    (folder / "bomb.png").write_bytes(png_header(30_000, 30_000))
    (folder / "loop").symlink_to(folder)
    return folder


BAD = ("truncated.jpg", "text.jpg", "zero.png", "one-pixel.png", "bomb.png")


def test_bad_images_are_skipped_named_once_and_counted(
    tmp_path: Path, messy_folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[1] = str(messy_folder)
    assert main([*arguments, "--max-bad-images", "5"]) == 0
    found = capsys.readouterr().err
    for name in BAD:
        assert found.count(name) == 1
    assert f"31 images, {len(BAD)} skipped" in found
    listed = (tmp_path / "run" / "bad-images.txt").read_text().splitlines()
    assert len(listed) == len(BAD)


def test_too_many_bad_images_end_the_run(
    messy_folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments[1] = str(messy_folder)
    assert main([*arguments, "--max-bad-images", "4"]) == 3
    assert_one_error(capsys, "--max-bad-images")


def test_unreadable_file_is_skipped(
    messy_folder: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = Path.open

    def refuse_grey(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "grey.png":
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    # Replaced rather than chmod, which does not bind the administrator.
    monkeypatch.setattr(Path, "open", refuse_grey)
    arguments[1] = str(messy_folder)
    assert main([*arguments, "--max-bad-images", "6"]) == 0
    assert "grey.png: permission denied" in capsys.readouterr().err


def test_unknown_model_and_missing_tag(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(with_model(arguments, "ViT-Z-99")) == 3
    assert_one_error(capsys, "ViT-Z-99")
    assert main(with_model(arguments, "ViT-B-32", "--pretrained", "nobody")) == 3
    assert_one_error(capsys, "laion2b_s34b_b79k")


@pytest.mark.parametrize("architecture", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_towers_that_cannot_work_are_refused(architecture: str) -> None:
    import open_clip

    from microclip_deploy.errors import CheckpointError
    from microclip_deploy.model.backbone import VisionBackbone

    with torch.device("meta"):
        clip = open_clip.create_model(
            architecture, pretrained=None, pretrained_text=False, device="meta"
        )
    with pytest.raises(CheckpointError, match="vision transformers with a class token"):
        VisionBackbone(clip.visual)


def test_pickled_weights_are_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"anything")
    assert main(with_model(arguments, "ViT-B-32", "--pretrained", str(weights))) == 3
    assert_one_error(capsys, ".safetensors")


@pytest.mark.parametrize("damage", ["missing", "cut", "nan", "other shape"])
def test_damaged_models_never_become_random_ones(
    tmp_path: Path,
    arguments: list[str],
    tiny_model_dir: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
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
    assert main(with_model(arguments, f"local-dir:{model}")) == 3
    assert_one_error(capsys)


def test_weights_of_another_architecture_are_refused(
    arguments: list[str], tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(tiny_model_dir / "open_clip_model.safetensors")
    assert main(with_model(arguments, "ViT-S-32-alt", "--pretrained", weights)) == 3
    assert_one_error(capsys, "could not be loaded")


def test_nan_loss_stops_and_keeps_the_last_good_state(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = ["--lr", "0.99", "--set", "adapt.weight_decay=0.99", "--epochs", "1"]
    wild = ["--set", "adapt.fairness_weight=100", "--batch-size", "2", "--save-every", "1"]
    import microclip_deploy.adapt.train_step as module

    original = module.cross_entropy  # type: ignore[attr-defined]  # the name the loop calls
    calls = iter(range(1000))

    def breaks_at_the_fourth(*args: object, **options: object) -> torch.Tensor:
        value = original(*args, **options)  # type: ignore[arg-type]
        return value * float("nan") if next(calls) == 3 else value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "cross_entropy", breaks_at_the_fourth)
        assert main([*arguments, *diverging, *wild]) == 5
    assert_one_error(capsys, "adapt.lr")
    states = sorted((tmp_path / "run" / "state").glob("*.safetensors"))
    assert states[-1].stem == "step-000000003"
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_full_disk_is_one_error_and_loses_nothing(tmp_path: Path, arguments: list[str]) -> None:
    """A file size limit makes every write of the state fail, as a full disk does."""
    code = (
        "import resource, sys\n"
        "from microclip_deploy.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    assert resource.RLIMIT_FSIZE >= 0
    call = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(call, capture_output=True, text=True, check=False)
    assert found.returncode == 4, found.stderr
    assert "could not be written" in found.stderr
    assert "Traceback" not in found.stderr
    run = tmp_path / "run"
    assert not (run / "manifest.json").exists()
    assert not list(run.rglob("*.part"))
    again = subprocess.run(
        [sys.executable, "-m", "microclip_deploy.cli", *arguments, "--resume"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("adapt.gama=0.3", "did you mean adapt.gamma"),
        ("adapt.gamma=1.5", "adapt.gamma"),
        ("ncut.affinity=manhattan", "ncut.affinity"),
        ("gamma", "section.key=value"),
    ],
)
def test_settings_that_do_not_exist(
    arguments: list[str], capsys: pytest.CaptureFixture[str], override: str, part: str
) -> None:
    assert main([*arguments, "--set", override]) == 2
    assert_one_error(capsys, part)


def test_unknown_recipe_lists_the_shipped_ones(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--recipe", "birds"]) == 2
    assert_one_error(capsys, "default")


def test_missing_gpu(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments[arguments.index("--device") + 1] = "cuda"
    assert main(arguments) == 4
    assert_one_error(capsys, "--device cpu")


@pytest.mark.parametrize("damage", ["missing", "flipped", "schema", "escape"])
def test_damaged_checkpoints_are_refused(
    tmp_path: Path,
    photos: Path,
    arguments: list[str],
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments) == 0
    run = tmp_path / "run"
    manifest = run / "manifest.json"
    if damage == "missing":
        manifest.unlink()
    elif damage == "flipped":
        weights = run / "weights.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    elif damage == "schema":
        manifest.write_text(manifest.read_text().replace("checkpoint/1", "checkpoint/9"))
    else:
        manifest.write_text(manifest.read_text().replace("weights.safetensors", "../secret"))
    capsys.readouterr()
    assert main(["evaluate", str(run), str(photos), "--device", "cpu"]) == 3
    assert_one_error(capsys)
