"""bitsandbytes' 8-bit optimizers on the CPU, with the codes of its CUDA kernels.

Its CPU build rounds by a table of 65,536 entries, which is too coarse for the smallest codes: 0 becomes 8e-6. The CUDA
kernels round to the nearest code, and keep a negative number's sign. Here is its own generic quantization, an argmin
over the codes, with that rule of signs.
"""

from typing import Any


def quantize(x: Any, code: Any, absmax_out: Any, out: Any, blocksize: int) -> None:
    """In the place of `_quant_blockwise_fp32_direct`; float64 takes the generic path."""
    import torch

    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, blocksize)
    if code[0] < 0:
        codes[(x < 0) & (codes == 127)] = 126
    out.copy_(codes)
    absmax_out.copy_(absmax)


def install() -> None:
    """For all optimizers made from here on; what earlier ones keep in 32 bits is forgotten."""
    import bitsandbytes
    from bitsandbytes.backends.cpu import ops

    ops._quant_blockwise_fp32_direct = quantize
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
