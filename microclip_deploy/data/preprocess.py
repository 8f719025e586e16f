"""The one definition of pixels -> network input, for training, export and serving.

`Preprocess` is stored as JSON in every artifact. It needs NumPy and Pillow only, so a server
without the training stack computes exactly what training saw. Two steps, kept apart on purpose:

    test view   PIL RGB -> uint8 (S, S, 3)           resize the short side, centre crop
    normalise   uint8 (B, S, S, 3) -> float32 (B, 3, S, S)    (x / 255 - mean) / std

The first step equals torchvision's `Resize(S, BICUBIC)` and `CenterCrop(S)` on PIL images byte for
byte, which is what CLIP models were trained and evaluated with.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, overload

import array_api_compat
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from microclip_deploy.errors import DataError

if TYPE_CHECKING:
    import torch

_Mean = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Std = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class ViewGeometry(NamedTuple):
    """Where the test view lies: the size after resizing, and the crop's corner in it, pixels."""

    width: int
    height: int
    left: int
    top: int


class Preprocess(BaseModel):
    """How an image becomes network input; a frozen value, dumped as JSON into artifacts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=2, le=2048)
    """Side S of the square network input, pixels."""
    mean: tuple[_Mean, _Mean, _Mean]
    """Mean per RGB channel, in units where white is 1."""
    std: tuple[_Std, _Std, _Std]
    """Standard deviation per RGB channel, in units where white is 1."""
    interpolation: Literal["bicubic"] = "bicubic"
    """Resampling filter: Pillow's antialiased bicubic, the only one CLIP models use."""

    def geometry(self, width: int, height: int) -> ViewGeometry:
        """Return the resized size and the centre crop of an image of `width` x `height` pixels.

        Source: torchvision `Resize(int)`, including its truncation of the long side, and
        `CenterCrop`, including its rounding of half pixels to even.
        """
        if width <= height:
            wide, high = self.size, int(self.size * height / width)
        else:
            wide, high = int(self.size * width / height), self.size
        left, top = (round((side - self.size) / 2.0) for side in (wide, high))
        return ViewGeometry(wide, high, left, top)

    def resize_short_side(self, image: Image.Image) -> Image.Image:
        """Return the image scaled so that its short side is `size`, aspect ratio kept.

        Args:
            image: mode RGB. `read_image` bounds its aspect ratio, and so this result's memory.

        Raises:
            DataError: the image is not RGB.
        """
        if image.mode != "RGB":
            raise DataError(
                f"image: expected mode RGB, found {image.mode}; open it with read_image"
            )
        target = self.geometry(*image.size)
        return image.resize((target.width, target.height), Image.Resampling.BICUBIC)

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
        resized = self.resize_short_side(image)
        _, _, left, top = self.geometry(*image.size)
        return np.array(resized.crop((left, top, left + self.size, top + self.size)))

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
        xp = array_api_compat.array_namespace(images)
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
