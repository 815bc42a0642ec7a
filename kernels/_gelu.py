"""The exact GELU, x Phi(x), in the two ways that epilogues compute it.

"erf": x/2 (1 + erf(x / sqrt 2)), for results in float32 and where programs are warp specialised. 32 instructions an
element on sm_90. Below -4 or so few digits are left, for 1 + erf cancels; PyTorch's own loses them too.

"tail": x Phi(x) = max(x, 0) - |x| Phi(-|x|), for results in 16 bits. log2 Phi(-t) is smooth, nearly a parabola: a
polynomial in t and one exp2, 13 instructions. It is fitted to the smallest relative error of Phi(-t) over 0 <= t <=
14.25, behind which Phi is 0 in float32; up to 6.2, where float16 ends, three times as closely. It is -1 at 0, so that
Phi(0) = 1/2 exactly. Relative error of the result, evaluated in float32, against float64:

    x > 0           1.3e-5
    -6.2 <= x < 0   2.7e-5   a tenth of half a unit in the last place of float16, a seventieth of one of bfloat16
    x < -6.2        1.1e-4   an eighteenth of half a unit in the last place of bfloat16, subnormal numbers included

NVIDIA's exp2 has no subnormal results: there, what is below x = -12.96 is 0, an error of at most 1.6e-37. A NaN stays
one, +inf gives +inf; -inf gives its limit, 0, where erf gives NaN.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
_END = tl.constexpr(14.25)


@triton.jit
def gelu(x, BY: tl.constexpr):
    """x Phi(x) of float32 x, by "erf" or by the "tail" of Phi."""
    if BY == "erf":
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    else:
        t = tl.minimum(tl.abs(x), _END)
        p = -1.72858426e-09 * t + 1.30114493e-07
        p = p * t - 4.28437477e-06
        p = p * t + 8.16611216e-05
        p = p * t - 1.00878927e-03
        p = p * t + 8.62692372e-03
        p = p * t - 5.38967142e-02
        p = p * t - 4.58799259e-01
        p = p * t - 1.15104049e00
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - t * tl.exp2(p * t - 1.0)
