"""What a pack saves: the views of an adaptation from photo files and from a pack of them.

Photos of 12 megapixels and of 500 pixels are made up. In each round every contestant reads the same
photo, in turns, on one core; times are of the processor, medians over photos. Pixels of packed
photos are compared with those of the files. The last line of stdout is one JSON document.
"""

import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from microclip_deploy.adapt.views import ViewConfig, make_views, view_generator
from microclip_deploy.artifact import write_json
from microclip_deploy.bench.card import environment
from microclip_deploy.console import notes, out
from microclip_deploy.data.decode import decode_photo, read_photo
from microclip_deploy.data.packing import PackConfig, pack
from microclip_deploy.data.photo import USUAL
from microclip_deploy.data.preprocess import Preprocess
from microclip_deploy.data.sources import list_images
from microclip_deploy.export.proof.probes import made_up_photos

SIZES = {"12 megapixels": (4000, 3000), "500 pixels": (667, 500)}
EPOCHS = 15
"""Of an adaptation, as published."""
_NOISE = 4.0  # standard deviation of a sensor's, which decides how large a JPEG is


def write_photos(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write made-up photos as JPEG files."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number, photo in enumerate(made_up_photos(400, count).read()):
        grown = np.asarray(photo.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
        noisy = grown + rng.normal(0, _NOISE, grown.shape).astype(np.float32)
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number:03}.jpg", quality=90)


def measure(folder: Path, preprocess: Preprocess, crops: int, packed: Path) -> dict[str, Any]:
    """Pack a folder, and time reading and views of both."""
    views = ViewConfig(crops=crops)
    begin = time.process_time()
    made = pack(list_images(folder), packed, PackConfig(), workers=1)
    pack_s = (time.process_time() - begin) / made.photos
    pairs = list(zip(list_images(folder).paths, list_images(packed).paths, strict=True))
    times: dict[str, list[float]] = {}
    differences = []
    for number, pair in enumerate(pairs):
        for name, path in zip(("file", "pack"), pair, strict=True):
            image = _timed(times, f"{name} read", partial(read_photo, path, USUAL)).image
            rng = view_generator(0, 0, number)
            made_views = partial(make_views, image, rng, preprocess, views)
            _timed(times, f"{name} views", made_views)
        seen = [preprocess.test_view(read_photo(path, USUAL).image) for path in pair]
        differences.append(np.abs(seen[0].astype(int) - seen[1]))
        for decoder, decode in decoders().items():
            _timed(times, decoder, partial(decode, pair[0].read_bytes()))
    seconds = {name: median(values) for name, values in times.items()}
    file_s, packed_s = (seconds[f"{n} read"] + seconds[f"{n} views"] for n in ("file", "pack"))
    return {
        "photos": made.photos,
        "file_kib": round(median(path.stat().st_size for path, _ in pairs) / 1024),
        "pack_kib": round(made.size_bytes / made.photos / 1024),
        "pack_ms": round(1000 * pack_s, 1),
        "ms": {name: round(1000 * value, 2) for name, value in seconds.items()},
        "photos_per_core_second": {"file": round(1 / file_s, 2), "pack": round(1 / packed_s, 2)},
        "ratio_with_packing": round(EPOCHS * file_s / (pack_s + EPOCHS * packed_s), 2),
        "break_even_epochs": round(pack_s / (file_s - packed_s), 1) if file_s > packed_s else None,
        "test_view_difference": {
            "mean": round(float(np.mean(differences)), 3),
            "max": int(np.max(differences)),
        },
    }


def decoders() -> dict[str, Callable[[bytes], object]]:
    """Return what decodes a JPEG in full, besides the product, as far as it is installed."""

    def encoded(content: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    found: dict[str, Callable[[bytes], object]] = {
        "Pillow, in full": lambda c: decode_photo(io.BytesIO(c), Path("photo"), USUAL),
        "Pillow, reduced": lambda c: decode_photo(io.BytesIO(c), Path("photo"), USUAL, 1024),
    }
    try:
        from torchvision.io import decode_jpeg as torchvision_decode

        found["torchvision"] = lambda c: torchvision_decode(encoded(c))
    except ImportError:
        pass
    try:
        from torchcodec.decoders import decode_jpeg as torchcodec_decode

        found["torchcodec"] = lambda c: torchcodec_decode(encoded(c))
    except (ImportError, OSError, RuntimeError):
        pass
    return found


def _timed(times: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
    begin = time.process_time()
    result = work()
    times.setdefault(name, []).append(time.process_time() - begin)
    return result


def main(
    count: Annotated[int, typer.Option(help="Photos of each size.", min=1)] = 12,
    side: Annotated[int, typer.Option(help="Of the network input, pixels.")] = 224,
    crops: Annotated[int, typer.Option(help="Besides weak and strong.")] = 8,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Also write the JSON here.")
    ] = None,
) -> None:
    """Measure photos of both sizes, and print a table and JSON."""
    torch.set_num_threads(1)
    preprocess = Preprocess(size=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    result: dict[str, Any] = {"views": 2 + crops, "side": side, "sizes": {}}
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's decoders are deprecated
        for name, size in SIZES.items():
            folder, packed = Path(place, name), Path(place, f"{name} packed")
            write_photos(folder, size, count)
            found = result["sizes"][name] = measure(folder, preprocess, crops, packed)
            rates = found["photos_per_core_second"]
            notes.print(
                f"{name}: {rates['file']} photos a second and core from files, {rates['pack']} "
                f"from the pack; {found['ratio_with_packing']}x over {EPOCHS} epochs with packing, "
                f"which pays after {found['break_even_epochs']} epochs"
            )
            notes.print("  ms: " + ", ".join(f"{k} {v}" for k, v in found["ms"].items()))
    result["environment"] = environment()
    if out_file is not None:
        write_json(out_file, result)
    out.file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
