"""Triton kernels of sink_window.

From spec.yaml by attncc 0.1.0; variant 1f93c8160cc29c5c. To change it, edit the spec and run
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
def key_tile(
    acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c,
    MASKED: tl.constexpr, CARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):
    """Adds the keys from n on to the state."""
    k = load_tile(K, b, hk, n, 0, k_b, k_h, k_s, Sk, 128, BN, 128, TMA)  # [BN, 128]
    j = n + tl.arange(0, BN)  # [BN]
    if MASKED:
        inside = j < Sk
    s = tl.dot(q, k.T)  # [BM, BN]
    x = s  # [BM, BN]
    if MASKED:
        keep = inside[None, :] & (
            (j[None, :] <= i[:, None])
            & ((j[None, :] <= 3) | (j[None, :] >= mask[:, None]) & (j[None, :] <= i[:, None]))
        )  # [BM, BN]
        x = tl.where(keep, x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, 1) * c)  # [BM]
    p = tl.exp2(x * c - m_new[:, None])  # [BM, BN]
    alpha = tl.exp2(m - m_new)
    l = l * alpha[:, None] + tl.sum(tl.reshape(p, [BM, BN // 8, 8]), 1)
    if CARE == 3:
        seen = tl.max(keep.to(tl.int32), 0) > 0  # [BN]
    v = load_tile(V, b, hk, n, 0, v_b, v_h, v_s, Sk, 128, BN, 128, TMA)  # [BN, 128]
    if CARE == 3:
        v = tl.where(seen[:, None], v, 0.0)
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


@triton.jit
def group_key_tile(
    acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c,
    MASKED: tl.constexpr, CARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):
    """Adds the keys from n on to the state."""
    k = load_tile(K, b, hk, n, 0, k_b, k_h, k_s, Sk, 128, BN, 128, TMA)  # [BN, 128]
    j = n + tl.arange(0, BN)  # [BN]
    if MASKED:
        inside = j < Sk
    s = tl.dot(q, k.T)  # [BM, BN]
    x = s  # [BM, BN]
    if MASKED:
        keep = inside[None, :] & (
            (j[None, :] <= i[:, None])
            & ((j[None, :] <= 3) | (j[None, :] >= mask[:, None]) & (j[None, :] <= i[:, None]))
        )  # [BM, BN]
        x = tl.where(keep, x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, 1) * c)  # [BM]
    p = tl.exp2(x * c - m_new[:, None])  # [BM, BN]
    alpha = tl.exp2(m - m_new)
    l = l * alpha[:, None] + tl.sum(tl.reshape(p, [BM, 4, BN // 4]), 1)
    if CARE == 3:
        seen = tl.max(keep.to(tl.int32), 0) > 0  # [BN]
    v = load_tile(V, b, hk, n, 0, v_b, v_h, v_s, Sk, 128, BN, 128, TMA)  # [BN, 128]
    if CARE == 3:
        v = tl.where(seen[:, None], v, 0.0)
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


@triton.jit(do_not_specialize=["B", "Sq", "Sk"])
def sink_window_forward(
    Q, K, V, O, LSE, lost,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64,
    v_h: tl.int64, v_s: tl.int64, o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64,
    lse_s1: tl.int64, lse_s2: tl.int64, lost_s0: tl.int64,
    B, Sq, Sk, scale,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, WRITE_LSE: tl.constexpr, PASS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Forward pass of sink_window: one program per query tile and head."""
    work = 1
    if PASS == 1:
        work = tl.load(lost + tl.program_id(0) * lost_s0)
    if work > 0:
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
        q = load_tile(Q, b, h, row0, 0, q_b, q_h, q_s, Sq, 128, BM, 128, TMA)  # [BM, 128]
        c = scale * 1.4426950408889634  # to units of log 2
        mask = i - 1023
        key_hi_0 = tl.maximum(tl.minimum(tl.minimum(i1 + 1, 4), Sk), 0)
        full_hi_0 = tl.maximum(tl.minimum(tl.minimum(i0 + 1, 4), Sk), 0)
        key_lo_1 = tl.maximum(tl.minimum(i0 - 1023, Sk), 0)
        key_hi_1 = tl.maximum(tl.minimum(i1 + 1, Sk), 0)
        full_lo_1 = tl.maximum(tl.minimum(i1 - 1023, Sk), 0)
        full_hi_1 = tl.maximum(tl.minimum(i0 + 1, Sk), 0)
        # several ranges: in order, and each only from where the one before it ended
        full_end_0 = tl.minimum(full_hi_0, key_hi_0) // BN * BN
        cursor = tl.maximum(0, (key_hi_0 + (BN - 1)) // BN * BN)
        lo_1 = key_lo_1 // BN * BN
        lo_1 = tl.maximum(lo_1, cursor)
        full_start_1 = tl.minimum(
            tl.maximum((full_lo_1 + (BN - 1)) // BN * BN, lo_1), tl.maximum((key_hi_1 + (BN - 1)) // BN * BN, lo_1),
        )
        full_end_1 = tl.maximum(tl.minimum(full_hi_1, key_hi_1) // BN * BN, full_start_1)
        m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
        l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
        acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
        # tiles in which every pair counts
        whole_0 = (tl.maximum(full_end_0, 0) + (BN - 1)) // BN
        whole_1 = whole_0 + (tl.maximum(full_end_1 - full_start_1, 0) + (BN - 1)) // BN
        for t in range(0, whole_1):
            n = tl.where(t < whole_0, t * BN, full_start_1 + (t - whole_0) * BN)
            acc, m, l = key_tile(
                acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, False, 0, BM, BN, TMA,
            )
        # tiles cut by the mask or by the end of the keys
        cut_0 = (tl.maximum(key_hi_0 - full_end_0, 0) + (BN - 1)) // BN
        cut_1 = cut_0 + (tl.maximum(full_start_1 - lo_1, 0) + (BN - 1)) // BN
        cut_2 = cut_1 + (tl.maximum(key_hi_1 - full_end_1, 0) + (BN - 1)) // BN
        for t in range(0, cut_2):
            n = tl.where(
                t < cut_0, full_end_0 + t * BN,
                tl.where(t < cut_1, lo_1 + (t - cut_0) * BN, full_end_1 + (t - cut_1) * BN),
            )
            acc, m, l = key_tile(
                acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, True, PASS, BM, BN, TMA,
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
                whole_0 = (tl.maximum(full_end_0, 0) + (BN - 1)) // BN
                whole_1 = whole_0 + (tl.maximum(full_end_1 - full_start_1, 0) + (BN - 1)) // BN
                for t in range(0, whole_1):
                    n = tl.where(t < whole_0, t * BN, full_start_1 + (t - whole_0) * BN)
                    acc, m, l = key_tile(
                        acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, False, 0, BM, BN,
                        TMA,
                    )
                # tiles cut by the mask or by the end of the keys
                cut_0 = (tl.maximum(key_hi_0 - full_end_0, 0) + (BN - 1)) // BN
                cut_1 = cut_0 + (tl.maximum(full_start_1 - lo_1, 0) + (BN - 1)) // BN
                cut_2 = cut_1 + (tl.maximum(key_hi_1 - full_end_1, 0) + (BN - 1)) // BN
                for t in range(0, cut_2):
                    n = tl.where(
                        t < cut_0, full_end_0 + t * BN,
                        tl.where(t < cut_1, lo_1 + (t - cut_0) * BN, full_end_1 + (t - cut_1) * BN),
                    )
                    acc, m, l = key_tile(
                        acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, True, 1, BM, BN,
                        TMA,
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
        store_tile(O, (acc / divisor[:, None]).to(BF16), b, h, row0, 0, o_b, o_h, o_s, Sq, 128, BM, 128, TMA)


@triton.jit(do_not_specialize=["Sq", "Sk"])
def sink_window_again(
    Q, K, V, O, LSE, again,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64,
    v_h: tl.int64, v_s: tl.int64, o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64,
    lse_s1: tl.int64, lse_s2: tl.int64, again_s0: tl.int64,
    Sq, Sk, scale,
    BM: tl.constexpr, BN: tl.constexpr, WRITE_LSE: tl.constexpr, TMA: tl.constexpr,
):
    """Does the query tiles again into which the engine may have let a hidden NaN leak."""
    for entry in range(tl.program_id(0), tl.load(again), 264):
        which = tl.load(again + (entry + 1) * again_s0)
        number = which % ((Sq + (BM - 1)) // BM)
        head = which // ((Sq + (BM - 1)) // BM)
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
        q = load_tile(Q, b, h, row0, 0, q_b, q_h, q_s, Sq, 128, BM, 128, TMA)  # [BM, 128]
        c = scale * 1.4426950408889634  # to units of log 2
        mask = i - 1023
        key_hi_0 = tl.maximum(tl.minimum(tl.minimum(i1 + 1, 4), Sk), 0)
        full_hi_0 = tl.maximum(tl.minimum(tl.minimum(i0 + 1, 4), Sk), 0)
        key_lo_1 = tl.maximum(tl.minimum(i0 - 1023, Sk), 0)
        key_hi_1 = tl.maximum(tl.minimum(i1 + 1, Sk), 0)
        full_lo_1 = tl.maximum(tl.minimum(i1 - 1023, Sk), 0)
        full_hi_1 = tl.maximum(tl.minimum(i0 + 1, Sk), 0)
        # several ranges: in order, and each only from where the one before it ended
        full_end_0 = tl.minimum(full_hi_0, key_hi_0) // BN * BN
        cursor = tl.maximum(0, (key_hi_0 + (BN - 1)) // BN * BN)
        lo_1 = key_lo_1 // BN * BN
        lo_1 = tl.maximum(lo_1, cursor)
        full_start_1 = tl.minimum(
            tl.maximum((full_lo_1 + (BN - 1)) // BN * BN, lo_1), tl.maximum((key_hi_1 + (BN - 1)) // BN * BN, lo_1),
        )
        full_end_1 = tl.maximum(tl.minimum(full_hi_1, key_hi_1) // BN * BN, full_start_1)
        m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
        l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
        acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
        # tiles in which every pair counts
        whole_0 = (tl.maximum(full_end_0, 0) + (BN - 1)) // BN
        whole_1 = whole_0 + (tl.maximum(full_end_1 - full_start_1, 0) + (BN - 1)) // BN
        for t in range(0, whole_1):
            n = tl.where(t < whole_0, t * BN, full_start_1 + (t - whole_0) * BN)
            acc, m, l = key_tile(
                acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, False, 0, BM, BN, TMA,
            )
        # tiles cut by the mask or by the end of the keys
        cut_0 = (tl.maximum(key_hi_0 - full_end_0, 0) + (BN - 1)) // BN
        cut_1 = cut_0 + (tl.maximum(full_start_1 - lo_1, 0) + (BN - 1)) // BN
        cut_2 = cut_1 + (tl.maximum(key_hi_1 - full_end_1, 0) + (BN - 1)) // BN
        for t in range(0, cut_2):
            n = tl.where(
                t < cut_0, full_end_0 + t * BN,
                tl.where(t < cut_1, lo_1 + (t - cut_0) * BN, full_end_1 + (t - cut_1) * BN),
            )
            acc, m, l = key_tile(
                acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, True, 1, BM, BN, TMA,
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
        store_tile(O, (acc / divisor[:, None]).to(BF16), b, h, row0, 0, o_b, o_h, o_s, Sq, 128, BM, 128, TMA)


@triton.jit(do_not_specialize=["B", "Sq", "Sk"])
def sink_window_split(
    Q, K, V, part_m, part_l, part_o, part_lost,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64,
    v_h: tl.int64, v_s: tl.int64, part_m_s0: tl.int64, part_m_s1: tl.int64, part_l_s0: tl.int64,
    part_l_s1: tl.int64, part_o_b: tl.int64, part_o_h: tl.int64, part_o_s: tl.int64, part_lost_s0: tl.int64,
    B, Sq, Sk, scale,
    BM: tl.constexpr, BN: tl.constexpr, PASS: tl.constexpr, SPLIT: tl.constexpr, FILL: tl.constexpr,
    EARLY: tl.constexpr, TMA: tl.constexpr,
):
    """Few queries of sink_window: one program per query tile of a group of heads and share of its keys."""
    begin_early(EARLY)
    work = 1
    if PASS == 1:
        work = tl.load(part_lost + tl.program_id(0) * part_lost_s0)
    if work > 0:
        tiles = (Sq * 4 + (BM - 1)) // BM
        shares = tl.minimum(
            ((Sk + (BN - 1)) // BN + (SPLIT - 1)) // SPLIT,
            tl.maximum(FILL // (B * 8 * ((Sq * 4 + (BM - 1)) // BM)), 1),
        )
        number = tl.program_id(0) % tiles
        rest = tl.program_id(0) // tiles
        share = rest % shares
        of = rest // shares
        b = of // 8
        hk = of % 8
        group_rows = Sq * 4
        row0 = number * BM
        rows = row0 + tl.arange(0, BM)  # [BM]
        last_row = tl.minimum(row0 + BM, group_rows) - 1
        r = tl.minimum(rows, last_row)  # [BM] past the end, the last one again
        row = r // 4  # [BM] queries
        h = hk * 4 + r % 4  # [BM] heads
        first_query = row0 // 4
        last_query = last_row // 4
        offset = Sk - Sq
        i0 = first_query + offset
        i1 = last_query + offset
        i = row + offset  # [BM] positions
        q = tl.load(Q + b * q_b + h[:, None] * q_h + row[:, None] * q_s + tl.arange(0, 128)[None, :])  # [BM, 128]
        c = scale * 1.4426950408889634  # to units of log 2
        mask = i - 1023
        key_hi_0 = tl.maximum(tl.minimum(tl.minimum(i1 + 1, 4), Sk), 0)
        full_hi_0 = tl.maximum(tl.minimum(tl.minimum(i0 + 1, 4), Sk), 0)
        key_lo_1 = tl.maximum(tl.minimum(i0 - 1023, Sk), 0)
        key_hi_1 = tl.maximum(tl.minimum(i1 + 1, Sk), 0)
        full_lo_1 = tl.maximum(tl.minimum(i1 - 1023, Sk), 0)
        full_hi_1 = tl.maximum(tl.minimum(i0 + 1, Sk), 0)
        # several ranges: in order, and each only from where the one before it ended
        full_end_0 = tl.minimum(full_hi_0, key_hi_0) // BN * BN
        cursor = tl.maximum(0, (key_hi_0 + (BN - 1)) // BN * BN)
        lo_1 = key_lo_1 // BN * BN
        lo_1 = tl.maximum(lo_1, cursor)
        full_start_1 = tl.minimum(
            tl.maximum((full_lo_1 + (BN - 1)) // BN * BN, lo_1), tl.maximum((key_hi_1 + (BN - 1)) // BN * BN, lo_1),
        )
        full_end_1 = tl.maximum(tl.minimum(full_hi_1, key_hi_1) // BN * BN, full_start_1)
        whole_0 = (tl.maximum(full_end_0, 0) + (BN - 1)) // BN
        whole_1 = whole_0 + (tl.maximum(full_end_1 - full_start_1, 0) + (BN - 1)) // BN
        cut_0 = (tl.maximum(key_hi_0 - full_end_0, 0) + (BN - 1)) // BN
        cut_1 = cut_0 + (tl.maximum(full_start_1 - lo_1, 0) + (BN - 1)) // BN
        cut_2 = cut_1 + (tl.maximum(key_hi_1 - full_end_1, 0) + (BN - 1)) // BN
        stride = tl.maximum(tl.minimum(shares, (whole_1 + cut_2 + (SPLIT - 1)) // SPLIT), 1)
        first = share
        last = tl.where(share < stride, whole_1 + cut_2, 0)
        first_cut = tl.where(first < whole_1, (stride - (whole_1 - first) % stride) % stride, first - whole_1)
        m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
        l = tl.full([BM, BN // 4], 0.0, tl.float32)  # running sum, in parts that one thread holds
        acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
        # tiles in which every pair counts
        for t in range(first, tl.minimum(last, whole_1), stride):
            n = tl.where(t < whole_0, t * BN, full_start_1 + (t - whole_0) * BN)
            acc, m, l = group_key_tile(
                acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, False, 0, BM, BN, TMA,
            )
        # tiles cut by the mask or by the end of the keys
        for t in range(first_cut, last - whole_1, stride):
            n = tl.where(
                t < cut_0, full_end_0 + t * BN,
                tl.where(t < cut_1, lo_1 + (t - cut_0) * BN, full_end_1 + (t - cut_1) * BN),
            )
            acc, m, l = group_key_tile(
                acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, True, PASS, BM, BN, TMA,
            )
        if PASS == 0:
            tl.store(part_lost + tl.program_id(0) * part_lost_s0, tl.max((acc != acc).to(tl.int32)))
        if PASS == 2:
            lost_here = tl.max((acc != acc).to(tl.int32))
            if lost_here > 0:
                m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
                l = tl.full([BM, BN // 4], 0.0, tl.float32)  # running sum, in parts that one thread holds
                acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
                # tiles in which every pair counts
                for t in range(first, tl.minimum(last, whole_1), stride):
                    n = tl.where(t < whole_0, t * BN, full_start_1 + (t - whole_0) * BN)
                    acc, m, l = group_key_tile(
                        acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, False, 0, BM, BN,
                        TMA,
                    )
                # tiles cut by the mask or by the end of the keys
                for t in range(first_cut, last - whole_1, stride):
                    n = tl.where(
                        t < cut_0, full_end_0 + t * BN,
                        tl.where(t < cut_1, lo_1 + (t - cut_0) * BN, full_end_1 + (t - cut_1) * BN),
                    )
                    acc, m, l = group_key_tile(
                        acc, m, l, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, mask, c, True, 1, BM, BN,
                        TMA,
                    )
        state = (b * 32 + h) * Sq + row  # [BM]
        tl.store(part_m + state * part_m_s0 + share * part_m_s1, m, mask=rows < group_rows)
        tl.store(part_l + state * part_l_s0 + share * part_l_s1, tl.sum(l, 1), mask=rows < group_rows)
        tl.store(
            part_o + state[:, None] * part_o_h + share * part_o_s + tl.arange(0, 128)[None, :], acc,
            mask=(rows < group_rows)[:, None],
        )


@triton.jit(do_not_specialize=["B", "Sq", "Sk"])
def sink_window_merge(
    O, LSE, part_m, part_l, part_o,
    o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64, lse_s1: tl.int64, lse_s2: tl.int64,
    part_m_s0: tl.int64, part_m_s1: tl.int64, part_l_s0: tl.int64, part_l_s1: tl.int64, part_o_b: tl.int64,
    part_o_h: tl.int64, part_o_s: tl.int64,
    B, Sq, Sk,
    BM: tl.constexpr, BN: tl.constexpr, WRITE_LSE: tl.constexpr, SPLIT: tl.constexpr, FILL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Merges what the shares of each row found, and ends the row."""
    begin_early(EARLY)
    sequence = tl.program_id(0) // Sq
    row = tl.program_id(0) % Sq
    b = sequence // 32
    h = sequence % 32
    shares = tl.minimum(
        ((Sk + (BN - 1)) // BN + (SPLIT - 1)) // SPLIT, tl.maximum(FILL // (B * 8 * ((Sq * 4 + (BM - 1)) // BM)), 1),
    )
    m = -1.7014118346046923e+38
    total = 0.0
    acc = tl.full([128], 0.0, tl.float32)  # [128]
    for first in range(0, shares, 64):
        share = first + tl.arange(0, 64)  # [64]
        inside = share < shares
        peaks = tl.where(
            inside, tl.load(part_m + tl.program_id(0) * part_m_s0 + share * part_m_s1, mask=inside, other=0),
            -1.7014118346046923e+38,
        )
        totals = tl.load(part_l + tl.program_id(0) * part_l_s0 + share * part_l_s1, mask=inside, other=0)
        outputs = tl.load(
            part_o + tl.program_id(0) * part_o_h + share[:, None] * part_o_s + tl.arange(0, 128)[None, :],
            mask=inside[:, None], other=0,
        )  # [64, 128]
        m_new = tl.maximum(m, tl.max(peaks, 0))
        alpha = tl.exp2(m - m_new)
        m = m_new
        weights = tl.exp2(peaks - m_new)
        total = total * alpha + tl.sum(totals * weights, 0)
        acc = acc * alpha + tl.sum(outputs * weights[:, None], 0)
    empty = total <= 0.0
    divisor = tl.where(empty, 1.0, total)
    if WRITE_LSE > 0:
        tl.store(
            LSE + b * lse_s0 + h * lse_s1 + row * lse_s2,
            tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453),
        )
    tl.store(O + b * o_b + h * o_h + row * o_s + tl.arange(0, 128), (acc / divisor).to(BF16))
