"""Device functions shared by the kernels: reading codes, scales and zeros of a page as numbers.

Codes become fp16 by bit tricks, never by integer-to-float instructions: a byte u placed under the exponent
0x64 is the fp16 number 1024 + u, exactly; the 1024 is taken back after the dot. `ASM` selects two-instruction
PTX forms of the same bits, which the interpreter cannot run.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.cache_view import LayerCache
from quire.kernels.formats import FormatError, KVFormat

LOG2E = 1.4426950408889634
MAGIC = tl.constexpr(1024.0)  # what the bit tricks add to every integer code
INT8_ZERO = tl.constexpr(1152.0)  # the offset-binary 128 on top of it


def groups_of(fmt: KVFormat, head_dim: int) -> int:
    """Count dynamic scales per token, for constexprs. Raises FormatError if dots cannot be split that way."""
    groups = fmt.groups(head_dim)
    if groups > 1 and head_dim // groups < 16:
        raise FormatError(f"GPU kernels need groups of 16 channels or more, got {head_dim // groups}")
    return groups


def check_head_dim(cache: LayerCache) -> int:
    """Return the head_dim. Raises FormatError if the kernels cannot tile it."""
    head_dim = cache.layout.head_dim
    if head_dim < 32 or head_dim & (head_dim - 1):
        raise FormatError(
            f"GPU kernels take a head_dim of 32, 64, 128 or 256, got {head_dim}; serve this model on the CPU"
        )
    return head_dim


def instructions(device: torch.device) -> tuple[bool, bool]:
    """Tell whether kernels may use PTX, and fp8 conversion as of sm_89 (which the interpreter has)."""
    asm = device.type == "cuda"
    return asm, not asm or torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def int8_to_fp16(x, ASM: tl.constexpr):
    """Convert bytes u to fp16 1024 + u: two PRMT for four."""
    if ASM:
        y = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0x64646464, 0x4140; prmt.b32 $1, $2, 0x64646464, 0x4342;",
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        y = (x.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    return y


@triton.jit
def int4_to_fp16(x, ASM: tl.constexpr):
    """Convert bytes l | h << 4 to fp16 1024 + l and 1024 + 16 h: two PRMT and four LOP3 for eight numbers."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $1, b, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $2, a, 0x00f000f0, 0x64006400, 0xea;
            lop3.b32 $3, b, 0x00f000f0, 0x64006400, 0xea; }""",
            "=r,=r,=r,=r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        wide = x.to(tl.uint16)
        low = ((wide & 0x0F) | 0x6400).to(tl.float16, bitcast=True)
        high = ((wide & 0xF0) | 0x6400).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def fp8_to_fp16(x, ASM: tl.constexpr, NATIVE: tl.constexpr):
    """Convert e4m3 bytes to fp16; before sm_89 by moving bits: exponent bias 7 to 15."""
    if NATIVE:
        y = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif ASM:
        y = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, s, t;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.b32 s, a, 1;
            shr.b32 t, b, 1;
            and.b32 s, s, 0x3f803f80;
            and.b32 t, t, 0x3f803f80;
            lop3.b32 $0, a, 0x80008000, s, 0xea;
            lop3.b32 $1, b, 0x80008000, t, 0xea; }""",
            "=r,=r,r",
            [x],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
        y = y * 256.0
    else:
        wide = x.to(tl.uint16)
        y = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return y


@triton.jit
def without_nan(x, NATIVE: tl.constexpr):
    """Replace NaN from e4m3 by the top value: an unwritten token of V holds any byte, and 0 * NaN is NaN.

    A minimum returns the operand that is a number, two at a time; a mask along [d][token] would be bytewise.
    """
    if NATIVE:
        x = tl.minimum(x, tl.full(x.shape, 448.0, tl.float16))
    return x


@triton.constexpr_function
def parts(codes, groups):
    """Count the loads per page and side; their bytes hold one group each, for int4 two (one per nibble)."""
    return max(1, groups // 2 if codes == "int4" else groups)


@triton.constexpr_function
def nibbles(codes):
    """Count the numbers in a byte of codes."""
    return 2 if codes == "int4" else 1


@triton.constexpr_function
def pieces(codes, groups):
    """Count runs of channels with a dot each: the numbers of a part, or its low, then its high nibbles."""
    return parts(codes, groups) * nibbles(codes)


@triton.constexpr_function
def first_channel(piece, codes, groups, head_dim):
    width = head_dim // pieces(codes, groups)
    return piece // 2 * width + piece % 2 * (head_dim // 2) if codes == "int4" else piece * width


@triton.constexpr_function
def group_of(piece, codes, groups):
    """Tell which scale a piece has: high nibbles have the second half of them."""
    if groups <= 1 or codes != "int4":
        return piece if groups > 1 else 0
    return piece // 2 + piece % 2 * (groups // 2)


@triton.constexpr_function
def factor_of(piece, codes):
    """A piece's codes arrive multiplied by this: high nibbles are not shifted down."""
    return 16.0 if codes == "int4" and piece % 2 else 1.0


@triton.jit
def load_codes(
    section_ptr,
    written_P,
    CODES: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    IS_V: tl.constexpr,
):
    """Load one side's codes of a page in parts: K and 16-bit V [P, W], V of 8 bits and less [W, P].

    Integer codes of unwritten tokens are numbers whatever the bytes; only 16-bit V is masked (0 * NaN).
    """
    PARTS: tl.constexpr = parts(CODES, GROUPS)
    BYTES: tl.constexpr = D // nibbles(CODES)
    W: tl.constexpr = BYTES // PARTS
    token_P, byte_W = tl.arange(0, P), tl.arange(0, W)
    codes = ()
    for g in tl.static_range(PARTS):
        if CODES == "bf16":
            ptr = section_ptr.to(tl.pointer_type(tl.bfloat16)) + token_P[:, None] * D + byte_W[None, :]
            part = tl.load(ptr, mask=written_P[:, None], other=0.0) if IS_V else tl.load(ptr)
        elif IS_V:
            part = tl.load(section_ptr + (g * W + byte_W)[:, None] * P + token_P[None, :])
        else:
            part = tl.load(section_ptr + token_P[:, None] * BYTES + (g * W + byte_W)[None, :])
        codes = codes + (part,)
    return codes


@triton.jit
def load_scales(section_ptr, token_P, CODES: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr):
    """Load the scales of one page as raw words, one [P] per group: [group][token] in the page."""
    words = ()
    for g in tl.static_range(GROUPS):
        if CODES == "int4":
            word = tl.load(section_ptr.to(tl.pointer_type(tl.uint32)) + g * P + token_P)
        else:
            word = tl.load(section_ptr.to(tl.pointer_type(tl.uint16)) + g * P + token_P)
        words = words + (word,)
    return words


@triton.jit
def scale_of(word, CODES: tl.constexpr):
    """Extract the fp32 scale of a raw word."""
    bits = (word & 0xFFFF).to(tl.uint16) if CODES == "int4" else word
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def zero_of(word):
    """Extract the fp32 zero point of an int4 word, an integer 0..15."""
    return (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def softcap_base2(logit_PR, softcap):
    """Compute softcap * tanh(logit / softcap), both sides in base 2: tanh(x) = 1 - 2 / (exp(2 x) + 1)."""
    return (softcap * 1.4426950408889634) * (1.0 - 2.0 / (tl.exp2(logit_PR * (2.0 / softcap)) + 1.0))
