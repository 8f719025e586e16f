r"""Every kernel once, small: what compute-sanitizer watches.

Run by gpu_check.sh:

    compute-sanitizer --tool memcheck --error-exitcode 99 \
        python -m microclip_deploy.bench.kernel.sanitize
"""

from itertools import product

import cupy

from microclip_deploy.bench.kernel.inputs import SPECS, device_tokens, make_buffers, random_fusion
from microclip_deploy.bench.kernel.tokens import DTYPES, stored, vit_tokens
from microclip_deploy.cuda.ncut import NCutKernels

TOKENS = (49, 196)
BATCH, WIDTH = 2, 768


def main() -> None:
    """Run each variant once, and say which."""
    fusion = random_fusion(WIDTH)
    for count, dtype, spec in product(TOKENS, DTYPES, SPECS):
        kernels = NCutKernels.of(count=count, width=WIDTH, token=dtype, spec=spec)
        tokens = device_tokens(stored(vit_tokens(BATCH, count, WIDTH, seed=count), dtype))
        part = make_buffers(kernels, fusion, tokens, seed=0)
        kernels.run(part.patches, part.work, part.cut)
        fusion.run(part.cls, part.patches, part.cut, part.fused)
        cupy.cuda.get_current_stream().synchronize()
        masked = cupy.asnumpy(part.cut.mask).astype(bool).sum(axis=1)
        print(f"N={count} {dtype} {spec.affinity}: {masked.tolist()} tokens in front", flush=True)


if __name__ == "__main__":
    main()
