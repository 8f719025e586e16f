r"""Every kernel once, small: what compute-sanitizer watches.

Run by gpu_check.sh:

    compute-sanitizer --tool memcheck --error-exitcode 99 \
        python -m microclip_deploy.bench.kernel.sanitize
"""

from itertools import product

import cupy

from microclip_deploy.bench.kernel.inputs import SPECS, Batch, device_tokens, random_fusion
from microclip_deploy.bench.kernel.tokens import DTYPES, stored, vit_tokens
from microclip_deploy.cuda.ncut import NCutKernels

TOKENS = (49, 196)
IMAGES, WIDTH = 2, 768


def main() -> None:
    """Run each variant once, and say which."""
    fusion = random_fusion(WIDTH)
    for count, dtype, spec in product(TOKENS, DTYPES, SPECS):
        kernels = NCutKernels.of(count=count, width=WIDTH, token=dtype, spec=spec)
        tokens = device_tokens(stored(vit_tokens(IMAGES, count, WIDTH, seed=count), dtype))
        batch = Batch.of(kernels, fusion, tokens, seed=0)
        batch.run()
        cupy.cuda.get_current_stream().synchronize()
        masked = cupy.asnumpy(batch.cut.mask).astype(bool).sum(axis=1)
        print(f"N={count} {dtype} {spec.affinity}: {masked.tolist()} tokens in front", flush=True)


if __name__ == "__main__":
    main()
