"""The one definition of pixels -> network input, for training, export and serving.

`Preprocess` is stored as JSON in every artifact. It needs NumPy and Pillow only, so a server
without the training stack computes exactly what training saw. Three steps, kept apart on purpose:

    read        file -> PIL RGB                               see data/decode.py
    test view   PIL RGB -> uint8 (S, S, 3)                    resize, centre crop
    normalise   uint8 (B, S, S, 3) -> float32 (B, 3, S, S)    (x / 255 - mean) / std

The second step equals open_clip's own transform on PIL images byte for byte, in each of its resize
modes: models were trained with one of them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

import array_api_compat
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from microclip_deploy.data.decode import read_image
from microclip_deploy.data.photo import USUAL, PhotoConfig
from microclip_deploy.errors import DataError

if TYPE_CHECKING:
    import torch

_Mean = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Std = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of a photo; may reach beyond it."""


class Preprocess(BaseModel):
    """How an image becomes network input; a frozen value, dumped as JSON into artifacts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=2, le=2048)
    """Side S of the square network input, pixels."""
    mean: tuple[_Mean, _Mean, _Mean]
    """Mean per RGB channel, in units where white is 1."""
    std: tuple[_Std, _Std, _Std]
    """Standard deviation per RGB channel, in units where white is 1."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling filter, antialiased as Pillow does it."""
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    """Which side becomes S: the short one, and the rest is cut off; the long one, and the rest is
    filled; or both, whatever the aspect ratio."""
    fill_color: int = Field(default=0, ge=0, le=255)
    """What fills the rest, on all channels."""
    photos: PhotoConfig = USUAL
    """How files become images."""

    @model_serializer(mode="wrap")
    def _stored(self, stored: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what older readers do not know wherever it says what they do."""
        fields: dict[str, Any] = stored(self)
        usual = {"resize_mode": "shortest", "fill_color": 0, "photos": USUAL.model_dump()}
        return {name: value for name, value in fields.items() if usual.get(name) != value}

    def read(self, path: Path | str) -> Image.Image:
        """Return a photo file as an RGB image; raises BadImage as `read_image` does."""
        return read_image(path, **self.photos.model_dump())

    def reading(self, **photos: Any) -> "Preprocess":
        """Return a copy with other settings of `photos`; None keeps what there is.

        Raises:
            UsageError: a value out of range.
        """
        return self.model_copy(update={"photos": self.photos.changed(**photos)})

    def resized(self, image: Image.Image) -> Image.Image:
        """Return the image scaled as `resize_mode` says.

        Args:
            image: mode RGB. `read_image` bounds its aspect ratio, and so this result's memory.

        Raises:
            DataError: the image is not RGB.

        Source: torchvision `Resize(int)`, which truncates the long side, and `Resize((S, S))`;
        timm `ResizeKeepRatio`, which rounds the short side.
        """
        if getattr(image, "mode", None) != "RGB":
            found = getattr(image, "mode", type(image).__name__)
            raise DataError(f"image: expected mode RGB, found {found}; open it with read_image")
        return image.resize(self.scaled(image.size), Image.Resampling[self.interpolation.upper()])

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height to which an image of a width and height is scaled."""
        side, (short, long) = self.size, sorted(size)
        if self.resize_mode == "squash":
            short_to = long_to = side
        elif self.resize_mode == "longest":
            short_to, long_to = max(1, round(short / (long / side))), side
        else:
            short_to, long_to = side, int(side * long / short)
        return (long_to, short_to) if size[0] > size[1] else (short_to, long_to)

    def seen(self, size: tuple[int, int]) -> Box:
        """Return the part of an image of a width and height that its test view shows."""
        scaled = self.scaled(size)
        begin = [self.offset(length) for length in scaled]
        left, top = (begin[i] * size[i] / scaled[i] for i in (0, 1))
        right, bottom = ((begin[i] + self.size) * size[i] / scaled[i] for i in (0, 1))
        return left, top, right, bottom

    def window(self, resized: Image.Image, left: int, top: int) -> NDArray[np.uint8]:
        """Return S x S pixels from (left, top) on, uint8 (S, S, 3); what lies outside is filled."""
        canvas = Image.new("RGB", (self.size, self.size), (self.fill_color,) * 3)
        canvas.paste(resized, (-left, -top))
        return np.array(canvas)

    def test_view(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return the centre of the resized image, the deterministic view used for inference.

        Args:
            image: mode RGB.

        Returns:
            uint8 (S, S, 3), writable, C-contiguous.

        Raises:
            DataError: the image is not RGB.

        The reference code evaluates on a random crop; a centre crop makes results repeatable.
        """
        resized = self.resized(image)
        return self.window(resized, *(self.offset(length) for length in resized.size))

    def offset(self, length: int) -> int:
        """Return where the centre window of a side begins, pixels; negative where it is filled.

        Source: torchvision `CenterCrop`, which rounds half pixels to even; open_clip
        `CenterCropOrPad`, which fills the smaller half first.
        """
        rest = length - self.size
        return round(rest / 2.0) if rest > 0 else -(-rest // 2)

    @overload
    def normalize(self, images: NDArray[np.uint8]) -> NDArray[np.float32]: ...
    @overload
    def normalize(self, images: "torch.Tensor") -> "torch.Tensor": ...
    def normalize(
        self, images: "NDArray[np.uint8] | torch.Tensor"
    ) -> "NDArray[np.float32] | torch.Tensor":
        """Return network input: `(images / 255 - mean) / std` in float32, channels first.

        Args:
            images: uint8 (B, S, S, 3) or (B, 3, S, S), 0..255; NumPy, or torch on any device.

        Returns:
            float32 (B, 3, S, S), contiguous, of the same array library and on the same device.

        Raises:
            DataError: another dtype or shape.
        """
        try:
            xp = array_api_compat.array_namespace(images)
        except TypeError as error:
            raise DataError(
                f"images: expected an array, found {type(images).__name__}; build them with "
                "Preprocess.test_view"
            ) from error
        channels_last = self._is_channels_last(tuple(images.shape), str(images.dtype))
        device = array_api_compat.device(images)

        # Arrays, not Python numbers: CUDA multiplies by the reciprocal of a Python scalar, and the
        # last bit of training on a GPU and serving on a CPU would differ. Filled on the device: a
        # copy from the host would wait for all work before it.
        def constant(value: float) -> Any:
            return xp.full((), value, dtype=xp.float32, device=device)

        white = constant(255.0)
        channels = [
            xp.astype(images[..., c] if channels_last else images[:, c], xp.float32)
            for c in range(3)
        ]
        # Stacking, unlike a permutation, leaves the result contiguous in both libraries.
        result: NDArray[np.float32] | torch.Tensor = xp.stack(
            [
                (x / white - constant(mean)) / constant(std)
                for x, mean, std in zip(channels, self.mean, self.std, strict=True)
            ],
            axis=1,
        )
        return result

    def _is_channels_last(self, shape: tuple[int, ...], dtype: str) -> bool:
        """Tell (B, S, S, 3) from (B, 3, S, S); refuse everything else."""
        side = self.size
        if dtype.removeprefix("torch.") == "uint8" and len(shape) == 4:
            if shape[1:] == (side, side, 3):
                return True
            if shape[1:] == (3, side, side):
                return False
        raise DataError(
            f"images: expected uint8 (B, {side}, {side}, 3) or (B, 3, {side}, {side}), "
            f"found {dtype} {shape}; build them with Preprocess.test_view"
        )
