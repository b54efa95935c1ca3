"""Triton kernels of document_ids.

From spec.yaml by attncc 0.1.0; variant 4cbf5e5b55b5b71f. To change it, edit the spec and run
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
def key_tile(
    acc, m, l, K, k_b, k_h, k_s, ids_ptr, ids_s0, ids_s1, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, ids_rows, c,
    MASKED: tl.constexpr, CARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):
    """Adds the keys from n on to the state."""
    k = load_tile(K, b, hk, n, 0, k_b, k_h, k_s, Sk, 128, BN, 128, TMA)  # [BN, 128]
    j = n + tl.arange(0, BN)  # [BN]
    if MASKED:
        inside = j < Sk
        j = tl.minimum(j, Sk - 1)  # past the end, the last one again, so that reads stay inside
    s = tl.dot(q, k.T)  # [BM, BN]
    x = s  # [BM, BN]
    if MASKED:
        keep = inside[None, :] & (
            (j[None, :] <= i[:, None]) & (ids_rows[:, None] == tl.load(ids_ptr + b * ids_s0 + j[None, :] * ids_s1))
        )  # [BM, BN]
        x = tl.where(keep, x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, 1) * c)  # [BM]
    p = tl.exp2(x * c - m_new[:, None])  # [BM, BN]
    alpha = tl.exp2(m - m_new)
    l = l * alpha[:, None] + tl.sum(tl.reshape(p, [BM, BN // 8, 8]), 1)
    v = load_tile(V, b, hk, n, 0, v_b, v_h, v_s, Sk, 128, BN, 128, TMA)  # [BN, 128]
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


@triton.jit(do_not_specialize=["Sq", "Sk"])
def document_ids_classify(
    ids_ptr, tile_list, tile_counts,
    ids_s0: tl.int64, ids_s1: tl.int64, tile_list_s0: tl.int64, tile_list_s1: tl.int64,
    tile_counts_s0: tl.int64, tile_counts_s1: tl.int64,
    Sq, Sk,
    BM: tl.constexpr, BN: tl.constexpr,
):
    """Lists the key tiles that each query tile of document_ids has to visit."""
    query_tiles = (Sq + (BM - 1)) // BM
    number = tl.program_id(0) % query_tiles
    b = tl.program_id(0) // query_tiles
    row0 = number * BM
    rows = row0 + tl.arange(0, BM)  # [BM]
    last_row = tl.minimum(row0 + BM, Sq) - 1
    offset = Sk - Sq
    i1 = last_row + offset
    i = tl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
    key_hi = tl.maximum(tl.minimum(i1 + 1, Sk), 0)
    ids_rows = tl.load(ids_ptr + b * ids_s0 + i * ids_s1, mask=(i >= 0) & (i < Sk), other=0)
    masked = 0
    whole = 0
    last_tile = tl.maximum((Sk + (BN - 1)) // BN, 1) - 1
    for tile in range(0, (key_hi + (BN - 1)) // BN):
        j = tile * BN + tl.arange(0, BN)  # [BN]
        seen = (
            (tl.minimum(j, Sk - 1)[None, :] <= i[:, None])
            & (ids_rows[:, None] == tl.load(ids_ptr + b * ids_s0 + tl.minimum(j, Sk - 1)[None, :] * ids_s1))
        ).to(tl.int32)
        some = tl.max(seen * (j < Sk).to(tl.int32)[None, :])
        every = tl.min(seen * (j < Sk).to(tl.int32)[None, :])
        tl.store(
            tile_list + tl.program_id(0) * tile_list_s0 + tl.where(every > 0, last_tile - whole, masked) * tile_list_s1,
            tile, mask=some > 0,
        )
        masked = masked + (some - every)
        whole = whole + every
    tl.store(tile_counts + tl.program_id(0) * tile_counts_s0, masked)
    tl.store(tile_counts + tl.program_id(0) * tile_counts_s0 + tile_counts_s1, whole)


@triton.jit(do_not_specialize=["B", "Sq", "Sk"])
def document_ids_forward(
    Q, K, V, O, LSE, ids_ptr, tile_list, tile_counts, lost,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64,
    v_h: tl.int64, v_s: tl.int64, o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64,
    lse_s1: tl.int64, lse_s2: tl.int64, ids_s0: tl.int64, ids_s1: tl.int64, tile_list_s0: tl.int64,
    tile_list_s1: tl.int64, tile_counts_s0: tl.int64, tile_counts_s1: tl.int64, lost_s0: tl.int64,
    B, Sq, Sk, scale,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, WRITE_LSE: tl.constexpr, PASS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Forward pass of document_ids: one program per query tile and head."""
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
        i = tl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
        q = load_tile(Q, b, h, row0, 0, q_b, q_h, q_s, Sq, 128, BM, 128, TMA)  # [BM, 128]
        c = scale * 1.4426950408889634  # to units of log 2
        ids_rows = tl.load(ids_ptr + b * ids_s0 + i * ids_s1, mask=(i >= 0) & (i < Sk), other=0)
        m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
        l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
        acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
        listed = b * ((Sq + (BM - 1)) // BM) + number
        last_tile = tl.maximum((Sk + (BN - 1)) // BN, 1) - 1
        # listed from the right: tiles in which every pair counts
        for entry in range(0, tl.load(tile_counts + listed * tile_counts_s0 + tile_counts_s1)):
            n = tl.load(tile_list + listed * tile_list_s0 + (last_tile - entry) * tile_list_s1) * BN
            acc, m, l = key_tile(
                acc, m, l, K, k_b, k_h, k_s, ids_ptr, ids_s0, ids_s1, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, ids_rows, c,
                False, 0, BM, BN, TMA,
            )
        # listed from the left: tiles cut by the mask or by the end of the keys
        for entry in range(0, tl.load(tile_counts + listed * tile_counts_s0)):
            n = tl.load(tile_list + listed * tile_list_s0 + entry * tile_list_s1) * BN
            acc, m, l = key_tile(
                acc, m, l, K, k_b, k_h, k_s, ids_ptr, ids_s0, ids_s1, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, ids_rows, c,
                True, PASS, BM, BN, TMA,
            )
        if PASS == 0:
            tl.store(lost + tl.program_id(0) * lost_s0, tl.max((acc != acc).to(tl.int32)))
        if PASS == 2:
            lost_here = tl.max((acc != acc).to(tl.int32))
            if lost_here > 0:
                m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
                l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
                acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
                listed = b * ((Sq + (BM - 1)) // BM) + number
                last_tile = tl.maximum((Sk + (BN - 1)) // BN, 1) - 1
                # listed from the right: tiles in which every pair counts
                for entry in range(0, tl.load(tile_counts + listed * tile_counts_s0 + tile_counts_s1)):
                    n = tl.load(tile_list + listed * tile_list_s0 + (last_tile - entry) * tile_list_s1) * BN
                    acc, m, l = key_tile(
                        acc, m, l, K, k_b, k_h, k_s, ids_ptr, ids_s0, ids_s1, V, v_b, v_h, v_s, b, hk, n, Sk, q, i,
                        ids_rows, c, False, 0, BM, BN, TMA,
                    )
                # listed from the left: tiles cut by the mask or by the end of the keys
                for entry in range(0, tl.load(tile_counts + listed * tile_counts_s0)):
                    n = tl.load(tile_list + listed * tile_list_s0 + entry * tile_list_s1) * BN
                    acc, m, l = key_tile(
                        acc, m, l, K, k_b, k_h, k_s, ids_ptr, ids_s0, ids_s1, V, v_b, v_h, v_s, b, hk, n, Sk, q, i,
                        ids_rows, c, True, 1, BM, BN, TMA,
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
def document_ids_again(
    Q, K, V, O, LSE, ids_ptr, tile_list, tile_counts, again,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64,
    v_h: tl.int64, v_s: tl.int64, o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64,
    lse_s1: tl.int64, lse_s2: tl.int64, ids_s0: tl.int64, ids_s1: tl.int64, tile_list_s0: tl.int64,
    tile_list_s1: tl.int64, tile_counts_s0: tl.int64, tile_counts_s1: tl.int64, again_s0: tl.int64,
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
        i = tl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
        q = load_tile(Q, b, h, row0, 0, q_b, q_h, q_s, Sq, 128, BM, 128, TMA)  # [BM, 128]
        c = scale * 1.4426950408889634  # to units of log 2
        ids_rows = tl.load(ids_ptr + b * ids_s0 + i * ids_s1, mask=(i >= 0) & (i < Sk), other=0)
        m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
        l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
        acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
        listed = b * ((Sq + (BM - 1)) // BM) + number
        last_tile = tl.maximum((Sk + (BN - 1)) // BN, 1) - 1
        # listed from the right: tiles in which every pair counts
        for entry in range(0, tl.load(tile_counts + listed * tile_counts_s0 + tile_counts_s1)):
            n = tl.load(tile_list + listed * tile_list_s0 + (last_tile - entry) * tile_list_s1) * BN
            acc, m, l = key_tile(
                acc, m, l, K, k_b, k_h, k_s, ids_ptr, ids_s0, ids_s1, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, ids_rows, c,
                False, 0, BM, BN, TMA,
            )
        # listed from the left: tiles cut by the mask or by the end of the keys
        for entry in range(0, tl.load(tile_counts + listed * tile_counts_s0)):
            n = tl.load(tile_list + listed * tile_list_s0 + entry * tile_list_s1) * BN
            acc, m, l = key_tile(
                acc, m, l, K, k_b, k_h, k_s, ids_ptr, ids_s0, ids_s1, V, v_b, v_h, v_s, b, hk, n, Sk, q, i, ids_rows, c,
                True, 1, BM, BN, TMA,
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
