"""Triton kernels of fp8_heads.

From spec.yaml by attncc 0.1.0; variant 3fb522413a5b24e4. To change it, edit the spec and run
`attncc compile spec.yaml -o OUT`.

Skeleton: dense_forward, for one softmax-like part over a mask: a program per query tile walks the keys it can see.

B batch, Hq and Hk query and key heads, Sq queries, Sk keys; Q K V O operands [b, h, row, column], given as
tensor descriptors where TMA is set, else as pointers; x_b x_h x_s their strides. BM rows and BN keys make a
tile; i and j are positions in the sequence. The softmax runs in powers of 2: m is the running maximum, l the
running sum.
"""

import triton
import triton.language as tl

# the interpreter multiplies bf16 bit patterns: it is given fp32, and computes in that
BF16 = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def load_tile(
    X, b, h, row, column: tl.constexpr, stride_b, stride_h, stride_s, rows,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):
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
def store_tile(
    X, x, b, h, row, column: tl.constexpr, stride_b, stride_h, stride_s, rows,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):
    """Writes x [ROWS, COLUMNS] to X[b, h] from (row, column) on; drops what lies beyond its rows and DIM columns."""
    if TMA:
        X.store([b, h, row, column], x.reshape([1, 1, ROWS, COLUMNS]))
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        at = X + b * stride_b + h * stride_h + r.to(tl.int64)[:, None] * stride_s + c[None, :]
        tl.store(at, x, mask=(r < rows)[:, None] & (c < DIM)[None, :])


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
        )
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


@triton.jit
def key_tile(
    acc, m, l, k_stored, k_stored_b, k_stored_h, k_stored_s, v_stored, v_stored_b, v_stored_h, v_stored_s, b,
    hk, n, Sk, q, i, c,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr,
):
    """Adds the keys from n on to the state."""
    k = from_fp8(
        load_tile(k_stored, b, hk, n, 0, k_stored_b, k_stored_h, k_stored_s, Sk, 128, BN, 128, TMA), 3, 7,
    ).to(BF16)  # [BN, 128]
    j = n + tl.arange(0, BN)  # [BN]
    if MASKED:
        inside = j < Sk
    s = tl.dot(q, k.T)  # [BM, BN]
    x = s  # [BM, BN]
    if MASKED:
        keep = inside[None, :] & (j[None, :] <= i[:, None])  # [BM, BN]
        x = tl.where(keep, x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, 1) * c)  # [BM]
    p = tl.exp2(x * c - m_new[:, None])  # [BM, BN]
    alpha = tl.exp2(m - m_new)
    l = l * alpha[:, None] + tl.sum(tl.reshape(p, [BM, BN // 8, 8]), 1)
    v = from_fp8(
        load_tile(v_stored, b, hk, n, 0, v_stored_b, v_stored_h, v_stored_s, Sk, 128, BN, 128, TMA), 3, 7,
    ).to(BF16)  # [BN, 128]
    acc = tl.dot(from_fp8(to_fp8(tl.minimum(p * 448.0, 448.0), 3, 7, FP8), 3, 7).to(BF16), v, acc * alpha[:, None])
    m = m_new
    return acc, m, l


@triton.jit(do_not_specialize=["Sk"])
def fp8_heads_peaks_v(
    V, v_peaks,
    v_b: tl.int64, v_h: tl.int64, v_s: tl.int64, v_peaks_s0: tl.int64, v_peaks_s1: tl.int64,
    v_peaks_s2: tl.int64, v_peaks_s3: tl.int64,
    Sk,
):
    """The greatest magnitudes of v, by spans of tokens."""
    spans = (Sk + 255) // 256
    begin = tl.program_id(0) % spans * 256
    heads = tl.program_id(0) // spans
    b = heads // 8
    h = heads % 8
    most = tl.full([32, 128], 0.0, tl.float32)
    for first in range(begin, tl.minimum(begin + 256, Sk), 32):
        tokens = first + tl.arange(0, 32)  # [32]
        columns = tl.arange(0, 128)  # [128]
        x = tl.load(
            V + b * v_b + h * v_h + tokens[:, None] * v_s + columns[None, :],
            mask=(tokens < Sk)[:, None] & (columns < 128)[None, :], other=0,
        ).to(tl.float32)  # [32, 128]
        size = tl.abs(x)
        size = tl.where(size < float("inf"), size, float("inf"))
        most = tl.maximum(most, size)
    peak = tl.max(most)
    tl.store(v_peaks + b * v_peaks_s0 + h * v_peaks_s1 + begin // 256 * v_peaks_s2, peak)


@triton.jit(do_not_specialize=["Sk"])
def fp8_heads_store_v(
    V, v_peaks, v_stored, v_scales_ptr,
    v_b: tl.int64, v_h: tl.int64, v_s: tl.int64, v_peaks_s0: tl.int64, v_peaks_s1: tl.int64,
    v_peaks_s2: tl.int64, v_peaks_s3: tl.int64, v_stored_b: tl.int64, v_stored_h: tl.int64,
    v_stored_s: tl.int64, v_scales_s0: tl.int64, v_scales_s1: tl.int64, v_scales_s2: tl.int64,
    Sk,
    FP8: tl.constexpr, PTX: tl.constexpr,
):
    """Writes v as f8e4m3, and the scales: of its groups' greatest magnitudes."""
    spans = (Sk + 255) // 256
    begin = tl.program_id(0) % spans * 256
    heads = tl.program_id(0) // spans
    b = heads // 8
    h = heads % 8
    end = tl.minimum(begin + 256, Sk)
    peak = 0.0
    for first in range(0, spans, 256):
        n = first + tl.arange(0, 256)  # [256]
        peak = tl.maximum(
            peak,
            tl.max(tl.load(v_peaks + b * v_peaks_s0 + h * v_peaks_s1 + n * v_peaks_s2, mask=n < spans, other=0), 0),
        )
    scale = tl.div_rn(peak, 448.0)
    scale = tl.where(peak < float("inf"), tl.where(scale == 0.0, 1.0, scale), float("nan"))
    columns = tl.arange(0, 128)
    if begin == 0:
        tl.store(v_scales_ptr + b * v_scales_s0 + h * v_scales_s1, scale)
    for first in range(begin, end, 32):
        tokens = first + tl.arange(0, 32)  # [32]
        columns = tl.arange(0, 128)  # [128]
        x = tl.load(
            V + b * v_b + h * v_h + tokens[:, None] * v_s + columns[None, :],
            mask=(tokens < end)[:, None] & (columns < 128)[None, :], other=0,
        ).to(tl.float32)  # [32, 128]
        y = tl.where(scale == scale, divided(x, scale, PTX), 1.0)
        tl.store(
            v_stored + b * v_stored_b + h * v_stored_h + tokens[:, None] * v_stored_s + columns[None, :],
            to_fp8(tl.maximum(tl.minimum(y, 448.0), -448.0), 3, 7, FP8),
            mask=(tokens < end)[:, None] & (columns < 128)[None, :],
        )


@triton.jit(do_not_specialize=["Sk"])
def fp8_heads_peaks_k(
    K, k_peaks,
    k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, k_peaks_s0: tl.int64, k_peaks_s1: tl.int64,
    k_peaks_s2: tl.int64, k_peaks_s3: tl.int64,
    Sk,
):
    """The greatest magnitudes of k, by spans of tokens."""
    spans = (Sk + 255) // 256
    begin = tl.program_id(0) % spans * 256
    heads = tl.program_id(0) // spans
    b = heads // 8
    h = heads % 8
    most = tl.full([32, 128], 0.0, tl.float32)
    for first in range(begin, tl.minimum(begin + 256, Sk), 32):
        tokens = first + tl.arange(0, 32)  # [32]
        columns = tl.arange(0, 128)  # [128]
        x = tl.load(
            K + b * k_b + h * k_h + tokens[:, None] * k_s + columns[None, :],
            mask=(tokens < Sk)[:, None] & (columns < 128)[None, :], other=0,
        ).to(tl.float32)  # [32, 128]
        size = tl.abs(x)
        size = tl.where(size < float("inf"), size, float("inf"))
        most = tl.maximum(most, size)
    peak = tl.max(most)
    tl.store(k_peaks + b * k_peaks_s0 + h * k_peaks_s1 + begin // 256 * k_peaks_s2, peak)


@triton.jit(do_not_specialize=["Sk"])
def fp8_heads_store_k(
    K, k_peaks, k_stored, k_scales_ptr,
    k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, k_peaks_s0: tl.int64, k_peaks_s1: tl.int64,
    k_peaks_s2: tl.int64, k_peaks_s3: tl.int64, k_stored_b: tl.int64, k_stored_h: tl.int64,
    k_stored_s: tl.int64, k_scales_s0: tl.int64, k_scales_s1: tl.int64, k_scales_s2: tl.int64,
    Sk,
    FP8: tl.constexpr, PTX: tl.constexpr,
):
    """Writes k as f8e4m3, and the scales: of its groups' greatest magnitudes."""
    spans = (Sk + 255) // 256
    begin = tl.program_id(0) % spans * 256
    heads = tl.program_id(0) // spans
    b = heads // 8
    h = heads % 8
    end = tl.minimum(begin + 256, Sk)
    peak = 0.0
    for first in range(0, spans, 256):
        n = first + tl.arange(0, 256)  # [256]
        peak = tl.maximum(
            peak,
            tl.max(tl.load(k_peaks + b * k_peaks_s0 + h * k_peaks_s1 + n * k_peaks_s2, mask=n < spans, other=0), 0),
        )
    scale = tl.div_rn(peak, 448.0)
    scale = tl.where(peak < float("inf"), tl.where(scale == 0.0, 1.0, scale), float("nan"))
    columns = tl.arange(0, 128)
    if begin == 0:
        tl.store(k_scales_ptr + b * k_scales_s0 + h * k_scales_s1, scale)
    for first in range(begin, end, 32):
        tokens = first + tl.arange(0, 32)  # [32]
        columns = tl.arange(0, 128)  # [128]
        x = tl.load(
            K + b * k_b + h * k_h + tokens[:, None] * k_s + columns[None, :],
            mask=(tokens < end)[:, None] & (columns < 128)[None, :], other=0,
        ).to(tl.float32)  # [32, 128]
        y = tl.where(scale == scale, divided(x, scale, PTX), 1.0)
        tl.store(
            k_stored + b * k_stored_b + h * k_stored_h + tokens[:, None] * k_stored_s + columns[None, :],
            to_fp8(tl.maximum(tl.minimum(y, 448.0), -448.0), 3, 7, FP8),
            mask=(tokens < end)[:, None] & (columns < 128)[None, :],
        )


@triton.jit(do_not_specialize=["Sq"])
def fp8_heads_peaks_q(
    Q, q_peaks,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, q_peaks_s0: tl.int64, q_peaks_s1: tl.int64,
    q_peaks_s2: tl.int64, q_peaks_s3: tl.int64,
    Sq,
):
    """The greatest magnitudes of q, by spans of tokens."""
    spans = (Sq + 255) // 256
    begin = tl.program_id(0) % spans * 256
    heads = tl.program_id(0) // spans
    b = heads // 32
    h = heads % 32
    most = tl.full([32, 128], 0.0, tl.float32)
    for first in range(begin, tl.minimum(begin + 256, Sq), 32):
        tokens = first + tl.arange(0, 32)  # [32]
        columns = tl.arange(0, 128)  # [128]
        x = tl.load(
            Q + b * q_b + h * q_h + tokens[:, None] * q_s + columns[None, :],
            mask=(tokens < Sq)[:, None] & (columns < 128)[None, :], other=0,
        ).to(tl.float32)  # [32, 128]
        size = tl.abs(x)
        size = tl.where(size < float("inf"), size, float("inf"))
        most = tl.maximum(most, size)
    peak = tl.max(most)
    tl.store(q_peaks + b * q_peaks_s0 + h * q_peaks_s1 + begin // 256 * q_peaks_s2, peak)


@triton.jit(do_not_specialize=["Sq"])
def fp8_heads_store_q(
    Q, q_peaks, q_stored, q_scales_ptr,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, q_peaks_s0: tl.int64, q_peaks_s1: tl.int64,
    q_peaks_s2: tl.int64, q_peaks_s3: tl.int64, q_stored_b: tl.int64, q_stored_h: tl.int64,
    q_stored_s: tl.int64, q_scales_s0: tl.int64, q_scales_s1: tl.int64, q_scales_s2: tl.int64,
    Sq,
    FP8: tl.constexpr, PTX: tl.constexpr,
):
    """Writes q as f8e4m3, and the scales: of its groups' greatest magnitudes."""
    spans = (Sq + 255) // 256
    begin = tl.program_id(0) % spans * 256
    heads = tl.program_id(0) // spans
    b = heads // 32
    h = heads % 32
    end = tl.minimum(begin + 256, Sq)
    peak = 0.0
    for first in range(0, spans, 256):
        n = first + tl.arange(0, 256)  # [256]
        peak = tl.maximum(
            peak,
            tl.max(tl.load(q_peaks + b * q_peaks_s0 + h * q_peaks_s1 + n * q_peaks_s2, mask=n < spans, other=0), 0),
        )
    scale = tl.div_rn(peak, 448.0)
    scale = tl.where(peak < float("inf"), tl.where(scale == 0.0, 1.0, scale), float("nan"))
    columns = tl.arange(0, 128)
    if begin == 0:
        tl.store(q_scales_ptr + b * q_scales_s0 + h * q_scales_s1, scale)
    for first in range(begin, end, 32):
        tokens = first + tl.arange(0, 32)  # [32]
        columns = tl.arange(0, 128)  # [128]
        x = tl.load(
            Q + b * q_b + h * q_h + tokens[:, None] * q_s + columns[None, :],
            mask=(tokens < end)[:, None] & (columns < 128)[None, :], other=0,
        ).to(tl.float32)  # [32, 128]
        y = tl.where(scale == scale, divided(x, scale, PTX), 1.0)
        tl.store(
            q_stored + b * q_stored_b + h * q_stored_h + tokens[:, None] * q_stored_s + columns[None, :],
            to_fp8(tl.maximum(tl.minimum(y, 448.0), -448.0), 3, 7, FP8),
            mask=(tokens < end)[:, None] & (columns < 128)[None, :],
        )


@triton.jit(do_not_specialize=["B", "Sq", "Sk"])
def fp8_heads_forward(
    q_stored, k_stored, v_stored, O, LSE, q_scales_ptr, k_scales_ptr, v_scales_ptr,
    q_stored_b: tl.int64, q_stored_h: tl.int64, q_stored_s: tl.int64, k_stored_b: tl.int64,
    k_stored_h: tl.int64, k_stored_s: tl.int64, v_stored_b: tl.int64, v_stored_h: tl.int64,
    v_stored_s: tl.int64, o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64, lse_s1: tl.int64,
    lse_s2: tl.int64, q_scales_s0: tl.int64, q_scales_s1: tl.int64, q_scales_s2: tl.int64,
    k_scales_s0: tl.int64, k_scales_s1: tl.int64, k_scales_s2: tl.int64, v_scales_s0: tl.int64,
    v_scales_s1: tl.int64, v_scales_s2: tl.int64,
    B, Sq, Sk, scale,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, WRITE_LSE: tl.constexpr, FP8: tl.constexpr,
    TMA: tl.constexpr,
):
    """Forward pass of fp8_heads: one program per query tile and head."""
    # groups of GROUP heads share the L2 cache; inside one, the tiles with the most keys come first
    tiles = (Sq + (BM - 1)) // BM
    group = tl.program_id(0) // (tiles * GROUP)
    inside = tl.program_id(0) % (tiles * GROUP)
    width = tl.minimum(B * 32 - group * GROUP, GROUP)
    number = tiles - 1 - inside // width
    head = group * GROUP + inside % width
    b = head // 32
    h = head % 32
    row0 = number * BM
    rows = row0 + tl.arange(0, BM)  # [BM]
    last_row = tl.minimum(row0 + BM, Sq) - 1
    hk = h // 4
    offset = Sk - Sq
    i0 = row0 + offset
    i1 = last_row + offset
    i = tl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
    scale_qk = tl.load(q_scales_ptr + b * q_scales_s0 + h * q_scales_s1) * tl.load(
        k_scales_ptr + b * k_scales_s0 + hk * k_scales_s1,
    )
    unit = tl.where(scale_qk == scale_qk, scale_qk, 1.0)
    q = tl.where(
        scale_qk == scale_qk,
        from_fp8(
            load_tile(q_stored, b, h, row0, 0, q_stored_b, q_stored_h, q_stored_s, Sq, 128, BM, 128, TMA), 3, 7,
        ).to(BF16),
        float("nan"),
    )  # [BM, 128]
    c = scale * unit * 1.4426950408889634  # to units of log 2
    key_hi = tl.maximum(tl.minimum(i1 + 1, Sk), 0)
    full_hi = tl.maximum(tl.minimum(i0 + 1, Sk), 0)
    full_end = tl.minimum(full_hi, key_hi) // BN * BN
    m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
    l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
    acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
    # tiles in which every pair counts
    for n in range(0, full_end, BN):
        acc, m, l = key_tile(
            acc, m, l, k_stored, k_stored_b, k_stored_h, k_stored_s, v_stored, v_stored_b, v_stored_h, v_stored_s, b,
            hk, n, Sk, q, i, c, False, BM, BN, FP8, TMA,
        )
    # tiles cut by the mask or by the end of the keys
    for n in range(full_end, key_hi, BN):
        acc, m, l = key_tile(
            acc, m, l, k_stored, k_stored_b, k_stored_h, k_stored_s, v_stored, v_stored_b, v_stored_h, v_stored_s, b,
            hk, n, Sk, q, i, c, True, BM, BN, FP8, TMA,
        )
    total = tl.sum(l, 1)  # [BM]
    empty = total <= 0.0
    divisor = tl.where(empty, 1.0, total)
    if WRITE_LSE > 0:
        tl.store(
            LSE + b * lse_s0 + h * lse_s1 + rows * lse_s2,
            tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453),
            mask=rows < Sq,
        )
    o = acc / divisor[:, None] * 0.002232142857142857
    store_tile(
        O, tl.where(o == 0.0, 0.0, o * tl.load(v_scales_ptr + b * v_scales_s0 + hk * v_scales_s1)).to(BF16), b, h, row0,
        0, o_b, o_h, o_s, Sq, 128, BM, 128, TMA,
    )


@triton.jit(do_not_specialize=["Sk"])
def fp8_heads_turn_v(
    V, v_peaks, v_turned, v_scales_ptr,
    v_b: tl.int64, v_h: tl.int64, v_s: tl.int64, v_peaks_s0: tl.int64, v_peaks_s1: tl.int64,
    v_peaks_s2: tl.int64, v_peaks_s3: tl.int64, v_turned_b: tl.int64, v_turned_h: tl.int64,
    v_turned_s: tl.int64, v_scales_s0: tl.int64, v_scales_s1: tl.int64, v_scales_s2: tl.int64,
    Sk,
    FP8: tl.constexpr, PTX: tl.constexpr,
):
    """Writes v as f8e4m3 for tensor cores, which want keys as neighbours, and the scales."""
    spans = (Sk + 255) // 256
    begin = tl.program_id(0) % spans * 256
    heads = tl.program_id(0) // spans
    b = heads // 8
    h = heads % 8
    end = tl.minimum(begin + 256, (Sk + 127) // 128 * 128)
    peak = 0.0
    for first in range(0, spans, 256):
        n = first + tl.arange(0, 256)  # [256]
        peak = tl.maximum(
            peak,
            tl.max(tl.load(v_peaks + b * v_peaks_s0 + h * v_peaks_s1 + n * v_peaks_s2, mask=n < spans, other=0), 0),
        )
    scale = tl.div_rn(peak, 448.0)
    scale = tl.where(peak < float("inf"), tl.where(scale == 0.0, 1.0, scale), float("nan"))
    columns = tl.arange(0, 128)
    if begin == 0:
        tl.store(v_scales_ptr + b * v_scales_s0 + h * v_scales_s1, scale)
    for first in range(begin, end, 32):
        at = first + tl.arange(0, 32)  # [32] positions
        tokens = at // 16 * 16 + at % 4 // 2 * 8 + at % 16 // 4 * 2 + at % 2  # [32]
        columns = tl.arange(0, 128)  # [128]
        x = tl.load(
            V + b * v_b + h * v_h + tokens[:, None] * v_s + columns[None, :],
            mask=(tokens < Sk)[:, None] & (columns < 128)[None, :], other=0,
        ).to(tl.float32)  # [32, 128]
        y = tl.where(scale == scale, divided(x, scale, PTX), 1.0)
        tl.store(
            v_turned + b * v_turned_b + h * v_turned_h + columns[None, :] * v_turned_s + at[:, None],
            to_fp8(tl.maximum(tl.minimum(y, 448.0), -448.0), 3, 7, FP8),
            mask=(at < end)[:, None] & (columns < 128)[None, :],
        )
