"""Device functions that emitted kernels call: a module of real Triton code, whose used parts are copied into them.

Nothing imports this file to emit; it is read as text, so that what ships is what is linted and tested here.
"""

import triton
import triton.language as tl


@triton.jit
def begin_early(EARLY: tl.constexpr):
    """Lets the programs of the next launch begin, and waits for all that those of the launch before have written."""
    if EARLY:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_tile(
    X, b, h, row, column: tl.constexpr, stride_b, stride_h, stride_s, rows,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """X[b, h] from (row, column) on, as [ROWS, COLUMNS]; 0 beyond its rows and DIM columns."""
    if TMA:
        x = X.load([b, h, row, column]).reshape([ROWS, COLUMNS])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None]
        if column + COLUMNS > DIM:
            inside = inside & (c < DIM)[None, :]
        at = X + b * stride_b + h * stride_h + r.to(tl.int64)[:, None] * stride_s + c[None, :]
        x = tl.load(at, mask=inside, other=0.0)
    return x


@triton.jit
def load_block(
    X, b, h, row, column, stride_b, stride_h, stride_s,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """X[b, h] from (row, column) on, as [ROWS, COLUMNS], all of it inside."""
    if TMA:
        x = X.load([b, h, row, column]).reshape([ROWS, COLUMNS])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        x = tl.load(X + b * stride_b + h * stride_h + r.to(tl.int64)[:, None] * stride_s + c[None, :])
    return x


@triton.jit
def load_words(
    X, b, h, row, column: tl.constexpr, stride_b, stride_h, stride_s, rows,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Words of X[b, h] from (row, column) on, as [ROWS, COLUMNS]; 0 beyond its rows. Words are of two bytes."""
    if TMA:
        x = X.load([b, h, row, column]).reshape([ROWS, COLUMNS])
    else:
        r = row + tl.arange(0, ROWS)
        at = X + b * stride_b + h * stride_h + r.to(tl.int64)[:, None] * stride_s
        x = read_words(at, (column + tl.arange(0, COLUMNS))[None, :], (r < rows)[:, None], WORDS)
    return x


@triton.jit
def read_words(at, column, mask, WORDS: tl.constexpr):
    """The words of these columns; without WORDS memory is given as bytes, for words would begin at odd addresses."""
    if WORDS:
        x = tl.load(at + column, mask=mask, other=0)
    else:
        low = tl.load(at + 2 * column, mask=mask, other=0).to(tl.int16) & 0xFF
        high = tl.load(at + 2 * column + 1, mask=mask, other=0).to(tl.int16)
        x = (low | (high << 8)).to(tl.int16)
    return x


@triton.jit
def dot_few(a, b, acc):
    """a @ b (+ acc); turned where rows are fewer than tensor cores multiply, for columns may be as few."""
    if a.shape[0] < 16 and acc is None:
        x = tl.dot(b.T, a.T).T
    elif a.shape[0] < 16:
        x = tl.dot(b.T, a.T, acc.T).T
    elif acc is None:
        x = tl.dot(a, b)
    else:
        x = tl.dot(a, b, acc)
    return x


@triton.jit
def from_bytes(words, BIT: tl.constexpr, SIGNED: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The byte from this bit of words on as a number: as it is if it is signed, else less 128.

    A byte is made the lowest bits of the mantissa of a power of 2, which is then taken off; bf16 has 7 such bits, so
    that the power depends on the 8th.
    """
    if PTX and tl.float16 == DTYPE:
        RAISED: tl.constexpr = "0x64806480, 0x6A" if SIGNED else "0x64006400, 0xEA"
        x = tl.inline_asm_elementwise(
            f"{{ .reg .b32 a, b; shr.b32 a, $1, {BIT}; lop3.b32 a, a, 0x00FF00FF, {RAISED}; "
            "mov.b32 b, 0x64806480; sub.f16x2 $0, a, b; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    elif PTX:
        POWER: tl.constexpr = "0xEA" if SIGNED else "0xAE"
        x = tl.inline_asm_elementwise(
            f"{{ .reg .b32 a, b, c; shr.b32 c, $1, {BIT}; lop3.b32 a, c, 0x007F007F, 0x43004300, 0xEA; "
            f"lop3.b32 b, c, 0x00800080, 0xC300C300, {POWER}; mov.b32 c, 0x3F803F80; fma.rn.bf16x2 $0, a, c, b; }}",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        x = ((((words.to(tl.int32) >> BIT) & 0xFF) ^ (128 if SIGNED else 0)) - 128).to(DTYPE)
    return x


@triton.jit
def from_nibbles(words, BIT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The 4 bits from this bit of words on as a number less 8, made as those of bytes are.

    A mantissa of fp16 has room for the upper ones of a byte where they are, which makes their number 16 times as much.
    """
    BYTE: tl.constexpr = BIT // 8 * 8
    if PTX and tl.float16 == DTYPE:
        PLACE: tl.constexpr = "0x00F000F0" if BIT % 8 else "0x000F000F"
        FACTOR: tl.constexpr = "0x2C002C00" if BIT % 8 else "0x3C003C00"
        OFFSET: tl.constexpr = "0xD480D480" if BIT % 8 else "0xE408E408"
        x = tl.inline_asm_elementwise(
            f"{{ .reg .b32 a, b, c; shr.b32 a, $1, {BYTE}; lop3.b32 a, a, {PLACE}, 0x64006400, 0xEA; "
            f"mov.b32 b, {FACTOR}; mov.b32 c, {OFFSET}; fma.rn.f16x2 $0, a, b, c; }}",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    elif PTX:
        x = tl.inline_asm_elementwise(
            f"{{ .reg .b32 a, b, c; shr.b32 a, $1, {BIT}; lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA; "
            "mov.b32 b, 0x3F803F80; mov.b32 c, 0xC308C308; fma.rn.bf16x2 $0, a, b, c; }",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        x = (((words.to(tl.int32) >> BIT) & 0xF) - 8).to(DTYPE)
    return x


@triton.jit
def from_e4m3(words, BIT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The byte from this bit of words on as the fp8 number that it is.

    Its bits are those of a number of the wider format but for a power of 2, below the least normal one too.
    """
    SIGNED_BYTES: tl.constexpr = "0xB391" if BIT else "0xA280"
    if PTX and tl.float16 == DTYPE:
        x = tl.inline_asm_elementwise(
            f"{{ .reg .b32 a, b; prmt.b32 a, $1, $1, {SIGNED_BYTES}; shl.b32 a, a, 7; and.b32 a, a, 0xBF80BF80; "
            "mov.b32 b, 0x5C005C00; mul.f16x2 $0, a, b; }",
            "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    elif PTX:
        x = tl.inline_asm_elementwise(
            f"{{ .reg .b32 a, b, c; prmt.b32 a, $1, $1, {SIGNED_BYTES}; shl.b32 a, a, 4; and.b32 a, a, 0x87F087F0; "
            "mov.b32 b, 0x7B807B80; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, a, b, c; }",
            "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        x = from_fp8(((words.to(tl.int32) >> BIT) & 0xFF).to(tl.uint8), 3, 7).to(DTYPE)
    return x


@triton.jit
def store_tile(
    X, x, b, h, row, column: tl.constexpr, stride_b, stride_h, stride_s, rows,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Writes x [ROWS, COLUMNS] to X[b, h] from (row, column) on; drops what lies beyond its rows and DIM columns."""
    if TMA:
        X.store([b, h, row, column], x.reshape([1, 1, ROWS, COLUMNS]))
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = X + b * stride_b + h * stride_h + r.to(tl.int64)[:, None] * stride_s + c[None, :]
        tl.store(at, x, mask=(r < rows)[:, None] & (c < DIM)[None, :])


@triton.jit
def first_half(x):
    """The first half of the columns; they stay in the registers of their threads, where those hold both halves."""
    a, _ = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
    return a


@triton.jit
def second_half(x):
    """The second half of the columns."""
    _, b = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
    return b


@triton.jit
def side_by_side(a, b):
    """The columns of a, then those of b."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def even_columns(x):
    """Every other column, from the first on."""
    a, _ = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return a


@triton.jit
def odd_columns(x):
    _, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return b


@triton.jit
def in_turn(a, b):
    """A column of a, then one of b, and so on."""
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def floor_div(a, b):
    """a // b rounded down, as in Python; the machine's division rounds towards 0. 0 where b is 0."""
    divisor = tl.where(b == 0, 1, b)
    q = a // divisor
    q -= ((a - q * divisor != 0) & ((a < 0) != (b < 0))).to(q.dtype)
    return tl.where(b == 0, 0, q)


@triton.jit
def floor_mod(a, b):
    """a % b with the sign of b, as in Python; 0 where b is 0."""
    r = a % tl.where(b == 0, 1, b)
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)


@triton.jit
def float_mod(a, b):
    """a % b of floats with the sign of b, as in Python."""
    r = a % b
    return tl.where((r != 0.0) & ((r < 0.0) != (b < 0.0)), r + b, r)


@triton.jit
def count_up_to(X, stride, n, x):
    """How many of the n sorted entries of X are <= x, by bisection."""
    low = x * 0
    high = low + n
    left = n
    while left > 0:
        middle = (low + high) // 2
        open_ = low < high
        value = tl.load(X + middle.to(tl.int64) * stride, mask=open_, other=0)
        up = open_ & (value <= x)
        high = tl.where(open_ & (value > x), middle, high)
        low = tl.where(up, middle + 1, low)
        left = left // 2
    return low


@triton.jit
def tanh(x):
    """tanh through exp2."""
    return 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)


@triton.jit
def fast_tanh(x, PTX: tl.constexpr):
    """tanh by the instruction of NVIDIA's GPUs, off by 2**-11."""
    return tanh_approx(x) if PTX else tanh(x)


@triton.jit
def tanh_approx(x):
    """tanh by the GPU's own instruction, off by 2**-11."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def logistic(x):
    """sigmoid, of which Gluon has none."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def log1p(x):
    """log(1 + x), right for small x too."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def power(x, y):
    """x ** y for floats; NaN for a negative x and a fractional y."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = tl.floor(y * 0.5) * 2.0 != y
    signed = tl.where(whole, tl.where(odd, -size, size), float("nan"))
    return tl.where(y == 0.0, 1.0, tl.where(x < 0.0, signed, size))


@triton.jit
def divided(x, y, PTX: tl.constexpr):
    """x / y as fp32 rounds it, for finite x many of which share their y; below 2**-80 it may be off in the last bit.

    The reciprocal of y is rounded once, and each quotient twice corrected by what is left of x: a compiler's division
    does that, too, but finds a reciprocal for each and branches where numbers might be too small.
    """
    if PTX:
        lift = tl.where(y < 2.0**-64, 2.0**64, 1.0)
        a, d = x * lift, y * lift
        inverse = tl.div_rn(1.0, d)
        q = a * inverse
        q = tl.fma(tl.fma(-q, d, a), inverse, q)
        q = tl.fma(tl.fma(-q, d, a), inverse, q)
        q = tl.where(x == 0.0, x * y, q)  # of its own sign; NaN where y is
    else:
        q = tl.div_rn(x, y)
    return q


@triton.jit
def to_fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, FP8: tl.constexpr):
    """The bits of the fp8 number next to x, the even one of two; x is within the format's range."""
    if FP8:
        TO: tl.constexpr = "e4m3x2" if MANTISSA == 3 else "e5m2x2"
        code = tl.inline_asm_elementwise(
            f"{{ .reg .b16 low, high; cvt.rn.satfinite.{TO}.f32 low, $2, $1; "
            f"cvt.rn.satfinite.{TO}.f32 high, $4, $3; mov.b32 $0, {{low, high}}; }}",
            "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        bits = x.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        half = (1 << (22 - MANTISSA)) - 1 + ((size >> (23 - MANTISSA)) & 1)
        normal = ((size + half) >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA)
        # numbers below the least normal one are as far apart as those of fp32 behind this power of 2
        shifted = (tl.abs(x) + 2.0 ** (24 - BIAS - MANTISSA)).to(tl.uint32, bitcast=True)
        small = shifted - ((151 - BIAS - MANTISSA) << 23)
        code = tl.where(size < ((128 - BIAS) << 23), small, normal)
        code = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code


@triton.jit
def from_fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The number of these bits, in fp16; what would be no number or infinite is not stored."""
    bits = x.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << (10 - MANTISSA))
    return half.to(tl.float16, bitcast=True) * 2.0 ** (15 - BIAS)
