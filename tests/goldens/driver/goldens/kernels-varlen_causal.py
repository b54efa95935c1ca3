"""Triton kernels of varlen_causal.

From spec.yaml by attncc 0.1.0; variant 013f932fcd90b2bc. To change it, edit the spec and run
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
def key_tile(
    acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, hk, key_begin, n, Sk, q, i, c, Tk,
    MASKED: tl.constexpr, CARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):
    """Adds the keys from n on to the state."""
    k = load_tile(K, 0, hk, key_begin + n, 0, k_b, k_h, k_s, Tk, 128, BN, 128, TMA)  # [BN, 128]
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
    v = load_tile(V, 0, hk, key_begin + n, 0, v_b, v_h, v_s, Tk, 128, BN, 128, TMA)  # [BN, 128]
    if CARE == 1:
        bad = v - v != 0.0
        acc = tl.where(
            tl.dot(tl.full([BM, BN], 1.0, BF16) * tl.where(keep, 1.0, 0.0).to(BF16), tl.where(bad, 1.0, 0.0).to(BF16))
            > 0.0,
            float("nan"), acc,
        )
        v = tl.where(bad, 0.0, v)
    acc = tl.dot(p.to(BF16), v, acc * alpha[:, None])
    m = m_new
    return acc, m, l


@triton.jit(do_not_specialize=["B", "Tq", "Tk"])
def varlen_causal_forward(
    Q, K, V, O, LSE, cu_seqlens_q, cu_seqlens_k, lost,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64,
    v_h: tl.int64, v_s: tl.int64, o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64,
    lse_s1: tl.int64, cu_seqlens_q_s0: tl.int64, cu_seqlens_k_s0: tl.int64, lost_s0: tl.int64,
    B, Tq, Tk, scale,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, WRITE_LSE: tl.constexpr, PASS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Forward pass of varlen_causal: one program per query tile and head."""
    work = 1
    if PASS == 1:
        work = tl.load(lost + tl.program_id(0) * lost_s0)
    if work > 0:
        # groups of GROUP heads share the L2 cache; inside one, the tiles with the most keys come first
        tiles = Tq // BM + B
        group = tl.program_id(0) // (tiles * GROUP)
        inside = tl.program_id(0) % (tiles * GROUP)
        width = tl.minimum(32 - group * GROUP, GROUP)
        number = tiles - 1 - inside // width
        h = group * GROUP + inside % width
        # the last sequence whose first tile, cu_seqlens_q[seq] // BM + seq, is not behind this one
        seq = 0
        end = B
        for _ in range(0, 32):
            middle = (seq + end) // 2
            owner = tl.load(cu_seqlens_q + middle * cu_seqlens_q_s0) // BM + middle <= number
            seq = tl.where(owner, middle, seq)
            end = tl.where(owner, end, middle)
        begin = tl.load(cu_seqlens_q + seq * cu_seqlens_q_s0)
        row0 = (number - begin // BM - seq) * BM
        Sq = tl.load(cu_seqlens_q + (seq + 1) * cu_seqlens_q_s0) - begin
        key_begin = tl.load(cu_seqlens_k + seq * cu_seqlens_k_s0)
        Sk = tl.load(cu_seqlens_k + (seq + 1) * cu_seqlens_k_s0) - key_begin
        rows = row0 + tl.arange(0, BM)  # [BM]
        last_row = tl.minimum(row0 + BM, Sq) - 1
        hk = h // 4
        offset = Sk - Sq
        i0 = row0 + offset
        i1 = last_row + offset
        i = tl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
        # packed launches have a few tiles too many
        if row0 < Sq:
            q = load_tile(Q, 0, h, begin + row0, 0, q_b, q_h, q_s, Tq, 128, BM, 128, TMA)  # [BM, 128]
            c = scale * 1.4426950408889634  # to units of log 2
            key_hi = tl.maximum(tl.minimum(i1 + 1, Sk), 0)
            full_hi = tl.maximum(tl.minimum(i0 + 1, Sk), 0)
            full_end = tl.minimum(full_hi, key_hi) // BN * BN
            m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
            l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
            acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
            # tiles in which every pair counts
            for n in range(0, full_end, BN):
                acc, m, l = key_tile(
                    acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, hk, key_begin, n, Sk, q, i, c, Tk, False, 0, BM, BN,
                    TMA,
                )
            # tiles cut by the mask or by the end of the keys
            for n in range(full_end, key_hi, BN):
                acc, m, l = key_tile(
                    acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, hk, key_begin, n, Sk, q, i, c, Tk, True, PASS, BM,
                    BN, TMA,
                )
            if PASS == 0:
                tl.store(lost + tl.program_id(0) * lost_s0, tl.max((acc != acc).to(tl.int32)))
            if PASS == 2:
                lost_here = tl.max((acc != acc).to(tl.int32))
                if lost_here > 0:
                    m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
                    l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
                    acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
                    # tiles in which every pair counts
                    for n in range(0, full_end, BN):
                        acc, m, l = key_tile(
                            acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, hk, key_begin, n, Sk, q, i, c, Tk, False, 0,
                            BM, BN, TMA,
                        )
                    # tiles cut by the mask or by the end of the keys
                    for n in range(full_end, key_hi, BN):
                        acc, m, l = key_tile(
                            acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, hk, key_begin, n, Sk, q, i, c, Tk, True, 1,
                            BM, BN, TMA,
                        )
            total = tl.sum(l, 1)  # [BM]
            empty = total <= 0.0
            divisor = tl.where(empty, 1.0, total)
            if WRITE_LSE > 0:
                tl.store(
                    LSE + h * lse_s0 + (begin + rows) * lse_s1,
                    tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453),
                    mask=rows < Sq,
                )
            tl.store(
                O + h * o_h + (begin + rows)[:, None] * o_s + tl.arange(0, 128)[None, :],
                (acc / divisor[:, None]).to(BF16), mask=(rows < Sq)[:, None] & (tl.arange(0, 128) < 128)[None, :],
            )


@triton.jit(do_not_specialize=["B", "Tq", "Tk"])
def varlen_causal_again(
    Q, K, V, O, LSE, cu_seqlens_q, cu_seqlens_k, again,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64,
    v_h: tl.int64, v_s: tl.int64, o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64,
    lse_s1: tl.int64, cu_seqlens_q_s0: tl.int64, cu_seqlens_k_s0: tl.int64, again_s0: tl.int64,
    B, Tq, Tk, scale,
    BM: tl.constexpr, BN: tl.constexpr, WRITE_LSE: tl.constexpr, TMA: tl.constexpr,
):
    """Does the query tiles again into which the engine may have let a hidden NaN leak."""
    for entry in range(tl.program_id(0), tl.load(again), 264):
        which = tl.load(again + (entry + 1) * again_s0)
        number = which % (Tq // BM + B)
        h = which // (Tq // BM + B)
        # the last sequence whose first tile, cu_seqlens_q[seq] // BM + seq, is not behind this one
        seq = 0
        end = B
        for _ in range(0, 32):
            middle = (seq + end) // 2
            owner = tl.load(cu_seqlens_q + middle * cu_seqlens_q_s0) // BM + middle <= number
            seq = tl.where(owner, middle, seq)
            end = tl.where(owner, end, middle)
        begin = tl.load(cu_seqlens_q + seq * cu_seqlens_q_s0)
        row0 = (number - begin // BM - seq) * BM
        Sq = tl.load(cu_seqlens_q + (seq + 1) * cu_seqlens_q_s0) - begin
        key_begin = tl.load(cu_seqlens_k + seq * cu_seqlens_k_s0)
        Sk = tl.load(cu_seqlens_k + (seq + 1) * cu_seqlens_k_s0) - key_begin
        rows = row0 + tl.arange(0, BM)  # [BM]
        last_row = tl.minimum(row0 + BM, Sq) - 1
        hk = h // 4
        offset = Sk - Sq
        i0 = row0 + offset
        i1 = last_row + offset
        i = tl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
        if row0 < Sq:
            q = load_tile(Q, 0, h, begin + row0, 0, q_b, q_h, q_s, Tq, 128, BM, 128, TMA)  # [BM, 128]
            c = scale * 1.4426950408889634  # to units of log 2
            key_hi = tl.maximum(tl.minimum(i1 + 1, Sk), 0)
            full_hi = tl.maximum(tl.minimum(i0 + 1, Sk), 0)
            full_end = tl.minimum(full_hi, key_hi) // BN * BN
            m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
            l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
            acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
            # tiles in which every pair counts
            for n in range(0, full_end, BN):
                acc, m, l = key_tile(
                    acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, hk, key_begin, n, Sk, q, i, c, Tk, False, 0, BM, BN,
                    TMA,
                )
            # tiles cut by the mask or by the end of the keys
            for n in range(full_end, key_hi, BN):
                acc, m, l = key_tile(
                    acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, hk, key_begin, n, Sk, q, i, c, Tk, True, 1, BM, BN,
                    TMA,
                )
            total = tl.sum(l, 1)  # [BM]
            empty = total <= 0.0
            divisor = tl.where(empty, 1.0, total)
            if WRITE_LSE > 0:
                tl.store(
                    LSE + h * lse_s0 + (begin + rows) * lse_s1,
                    tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453),
                    mask=rows < Sq,
                )
            tl.store(
                O + h * o_h + (begin + rows)[:, None] * o_s + tl.arange(0, 128)[None, :],
                (acc / divisor[:, None]).to(BF16), mask=(rows < Sq)[:, None] & (tl.arange(0, 128) < 128)[None, :],
            )
