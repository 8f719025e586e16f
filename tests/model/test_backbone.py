"""Float32 means float32 while a model runs, and the process gets its own settings back."""

import subprocess
import sys

import pytest

SETTINGS = {
    "new": "for each in places: each.fp32_precision = 'tf32'",
    "old": "matmul.allow_tf32 = cudnn.allow_tf32 = True",
    "global": "torch.set_float32_matmul_precision('high')",
}


@pytest.mark.parametrize("chosen", SETTINGS)
def test_tf32_is_off_inside_and_as_it_was_outside(chosen: str) -> None:
    code = f"""
import torch
from microclip_deploy.model.backbone import exact_float32
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
places = (matmul, cudnn.conv, cudnn.rnn)
{SETTINGS[chosen]}
before = [each.fp32_precision for each in places]
with exact_float32():
    assert {{each.fp32_precision for each in places}} == {{"ieee"}}
assert [each.fp32_precision for each in places] == before
{"" if chosen == "new" else "assert matmul.allow_tf32"}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_a_model_leaves_the_process_alone(tiny_model_dir: str) -> None:
    code = (
        "import sys, torch\n"
        "from microclip_deploy.model.backbone import BackboneSpec, load_clip\n"
        "torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True\n"
        "clip = load_clip(BackboneSpec(model=sys.argv[1]))\n"
        "clip.text(['a photo'])\n"
        "assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32\n"
    )
    call = [sys.executable, "-c", code, f"local-dir:{tiny_model_dir}"]
    subprocess.run(call, check=True)
