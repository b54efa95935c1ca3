"""Triton kernels of paged_decode.

From spec.yaml by attncc 0.1.0; variant b67fb4dfd06fb574. To change it, edit the spec and run
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
    acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, n, hk, keys,
    q, i, c,
    MASKED: tl.constexpr, CARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):
    """Adds the keys from n on to the state."""
    page = tl.load(block_table + b * block_table_s0 + n // 64 * block_table_s1)
    slot = n % 64
    k = load_tile(K, page, hk, slot, 0, k_b, k_h, k_s, 64, 128, BN, 128, TMA)  # [BN, 128]
    j = n + tl.arange(0, BN)  # [BN]
    if MASKED:
        inside = j < keys
    s = tl.dot(q, k.T)  # [BM, BN]
    x = s  # [BM, BN]
    if MASKED:
        keep = inside[None, :] & (j[None, :] <= i[:, None])  # [BM, BN]
        x = tl.where(keep, x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, 1) * c)  # [BM]
    p = tl.exp2(x * c - m_new[:, None])  # [BM, BN]
    alpha = tl.exp2(m - m_new)
    l = l * alpha[:, None] + tl.sum(tl.reshape(p, [BM, BN // 8, 8]), 1)
    if CARE == 3:
        seen = tl.max(keep.to(tl.int32), 0) > 0  # [BN]
    v = load_tile(V, page, hk, slot, 0, v_b, v_h, v_s, 64, 128, BN, 128, TMA)  # [BN, 128]
    if MASKED:
        v = tl.where(inside[:, None], v, 0.0)  # a page may hold NaN behind the last key
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
    acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, n, hk, keys,
    q, i, c,
    MASKED: tl.constexpr, CARE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):
    """Adds the keys from n on to the state."""
    page = tl.load(block_table + b * block_table_s0 + n // 64 * block_table_s1)
    slot = n % 64
    k = load_tile(K, page, hk, slot, 0, k_b, k_h, k_s, 64, 128, BN, 128, TMA)  # [BN, 128]
    j = n + tl.arange(0, BN)  # [BN]
    if MASKED:
        inside = j < keys
    s = tl.dot(q, k.T)  # [BM, BN]
    x = s  # [BM, BN]
    if MASKED:
        keep = inside[None, :] & (j[None, :] <= i[:, None])  # [BM, BN]
        x = tl.where(keep, x, float("-inf"))
    m_new = tl.maximum(m, tl.max(x, 1) * c)  # [BM]
    p = tl.exp2(x * c - m_new[:, None])  # [BM, BN]
    alpha = tl.exp2(m - m_new)
    l = l * alpha[:, None] + tl.sum(tl.reshape(p, [BM, 4, BN // 4]), 1)
    if CARE == 3:
        seen = tl.max(keep.to(tl.int32), 0) > 0  # [BN]
    v = load_tile(V, page, hk, slot, 0, v_b, v_h, v_s, 64, 128, BN, 128, TMA)  # [BN, 128]
    if MASKED:
        v = tl.where(inside[:, None], v, 0.0)  # a page may hold NaN behind the last key
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
def paged_decode_forward(
    Q, K, V, O, LSE, block_table, seqused_k, lost,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64,
    v_h: tl.int64, v_s: tl.int64, o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64,
    lse_s1: tl.int64, lse_s2: tl.int64, block_table_s0: tl.int64, block_table_s1: tl.int64,
    seqused_k_s0: tl.int64, lost_s0: tl.int64,
    B, Sq, Sk, scale,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, WRITE_LSE: tl.constexpr, PASS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Forward pass of paged_decode: one program per query tile and head."""
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
        keys = tl.maximum(tl.minimum(tl.load(seqused_k + b * seqused_k_s0), Sk), 0)  # never more than the table has
        rows = row0 + tl.arange(0, BM)  # [BM]
        last_row = tl.minimum(row0 + BM, Sq) - 1
        hk = h // 4
        offset = keys - Sq
        i0 = row0 + offset
        i1 = last_row + offset
        i = tl.minimum(rows, last_row) + offset  # [BM] positions; past the end, the last one again
        q = load_tile(Q, b, h, row0, 0, q_b, q_h, q_s, Sq, 128, BM, 128, TMA)  # [BM, 128]
        c = scale * 1.4426950408889634  # to units of log 2
        key_hi = tl.maximum(tl.minimum(i1 + 1, keys), 0)
        full_hi = tl.maximum(tl.minimum(i0 + 1, keys), 0)
        full_end = tl.minimum(full_hi, key_hi) // BN * BN
        m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
        l = tl.full([BM, 8], 0.0, tl.float32)  # running sum, in parts that one thread holds
        acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
        # tiles in which every pair counts
        for n in range(0, full_end, BN):
            acc, m, l = key_tile(
                acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, n, hk,
                keys, q, i, c, False, 0, BM, BN, TMA,
            )
        # tiles cut by the mask or by the end of the keys
        for n in range(full_end, key_hi, BN):
            acc, m, l = key_tile(
                acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, n, hk,
                keys, q, i, c, True, PASS, BM, BN, TMA,
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
                        acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b,
                        n, hk, keys, q, i, c, False, 0, BM, BN, TMA,
                    )
                # tiles cut by the mask or by the end of the keys
                for n in range(full_end, key_hi, BN):
                    acc, m, l = key_tile(
                        acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b,
                        n, hk, keys, q, i, c, True, 1, BM, BN, TMA,
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
def paged_decode_plan(
    seqused_k, tiles_of,
    seqused_k_s0: tl.int64, tiles_of_s0: tl.int64,
    B, Sq, Sk,
    BM: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr,
):
    """Counts the key tiles that each query tile of a group of heads visits."""
    begin_early(EARLY)
    each = B * 8
    number = tl.program_id(0) // each
    of = tl.program_id(0) % each
    b = of // 8
    group_rows = Sq * 4
    row0 = number * BM
    last_row = tl.minimum(row0 + BM, group_rows) - 1
    keys = tl.maximum(tl.minimum(tl.load(seqused_k + b * seqused_k_s0), Sk), 0)  # never more than the table has
    first_query = row0 // 4
    last_query = last_row // 4
    offset = keys - Sq
    i0 = first_query + offset
    i1 = last_query + offset
    key_hi = tl.maximum(tl.minimum(i1 + 1, keys), 0)
    full_hi = tl.maximum(tl.minimum(i0 + 1, keys), 0)
    full_end = tl.minimum(full_hi, key_hi) // BN * BN
    whole_0 = (tl.maximum(full_end, 0) + (BN - 1)) // BN
    cut_0 = (tl.maximum(key_hi - full_end, 0) + (BN - 1)) // BN
    tl.store(tiles_of + tl.program_id(0) * tiles_of_s0, whole_0 + cut_0)


@triton.jit(do_not_specialize=["B", "Sq", "Sk"])
def paged_decode_stream(
    Q, K, V, O, LSE, block_table, seqused_k, tiles_of, part_m, part_l, part_o, part_lost,
    q_b: tl.int64, q_h: tl.int64, q_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64,
    v_h: tl.int64, v_s: tl.int64, o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64,
    lse_s1: tl.int64, lse_s2: tl.int64, block_table_s0: tl.int64, block_table_s1: tl.int64,
    seqused_k_s0: tl.int64, tiles_of_s0: tl.int64, part_m_s0: tl.int64, part_m_s1: tl.int64,
    part_l_s0: tl.int64, part_l_s1: tl.int64, part_o_b: tl.int64, part_o_h: tl.int64, part_o_s: tl.int64,
    part_lost_s0: tl.int64,
    B, Sq, Sk, scale,
    BM: tl.constexpr, BN: tl.constexpr, WRITE_LSE: tl.constexpr, PASS: tl.constexpr, SPLIT: tl.constexpr,
    FILL: tl.constexpr, EARLY: tl.constexpr, TMA: tl.constexpr,
):
    """Few queries of paged_decode: one program per range of the line of all key tiles."""
    begin_early(EARLY)
    work = 1
    if PASS == 1:
        work = tl.load(part_lost + tl.program_id(0) * part_lost_s0)
    if work > 0:
        items = B * 8 * ((Sq * 4 + (BM - 1)) // BM)
        line = 0
        for chunk in range(0, items, 1024):
            at = chunk + tl.arange(0, 1024)  # [1024]
            is_item = at < items
            some = tl.load(tiles_of + at * tiles_of_s0, mask=is_item, other=0)
            line = line + tl.sum(some, 0)
        # ranges of equal size, none of fewer than SPLIT tiles while there are more; whole ones to an item if near
        even = FILL // tl.maximum(items, 1) * items
        most = tl.where(even * 20 >= FILL * 19, even, FILL)
        ranges = tl.maximum(tl.minimum(most, line // SPLIT), 1)
        size = line // ranges
        longer = line % ranges
        of_group = (Sq * 4 + (BM - 1)) // BM  # that neighbours have, where they are whole ranges apart
        own_range = tl.where(
            (ranges % of_group == 0) & (tl.program_id(0) < ranges),
            tl.program_id(0) % of_group * (ranges // of_group) + tl.program_id(0) // of_group, tl.program_id(0),
        )
        range_begin = tl.minimum(own_range * size + own_range * longer // ranges, line)
        range_end = tl.minimum((own_range + 1) * size + (own_range + 1) * longer // ranges, line)
        first_item = 0
        item_begin = 0
        end_item = 0
        before = 0
        # items that end before the range, how many tiles they have, and items that begin before its end
        for chunk in range(0, items, 1024):
            at = chunk + tl.arange(0, 1024)  # [1024]
            is_item = at < items
            some = tl.load(tiles_of + at * tiles_of_s0, mask=is_item, other=0)
            ends = before + tl.cumsum(some, 0)
            over = (is_item & (ends <= range_begin)).to(tl.int32)
            first_item = first_item + tl.sum(over, 0)
            item_begin = item_begin + tl.sum(over * some, 0)
            end_item = end_item + tl.sum((is_item & (ends - some < range_end)).to(tl.int32), 0)
            before = before + tl.sum(some, 0)
        end_item = tl.where(range_begin < range_end, end_item, first_item)
        left_nan = 0
        for item in range(first_item, end_item):
            count = tl.load(tiles_of + item * tiles_of_s0)
            first = tl.maximum(range_begin - item_begin, 0)
            last = tl.minimum(range_end - item_begin, count)
            each = B * 8
            number = item // each
            of = item % each
            b = of // 8
            hk = of % 8
            group_rows = Sq * 4
            row0 = number * BM
            rows = row0 + tl.arange(0, BM)  # [BM]
            last_row = tl.minimum(row0 + BM, group_rows) - 1
            r = tl.minimum(rows, last_row)  # [BM] past the end, the last one again
            row = r // 4  # [BM] queries
            keys = tl.maximum(tl.minimum(tl.load(seqused_k + b * seqused_k_s0), Sk), 0)  # never more than the table has
            h = hk * 4 + r % 4  # [BM] heads
            first_query = row0 // 4
            last_query = last_row // 4
            offset = keys - Sq
            i0 = first_query + offset
            i1 = last_query + offset
            i = row + offset  # [BM] positions
            q = tl.load(Q + b * q_b + h[:, None] * q_h + row[:, None] * q_s + tl.arange(0, 128)[None, :])  # [BM, 128]
            c = scale * 1.4426950408889634  # to units of log 2
            key_hi = tl.maximum(tl.minimum(i1 + 1, keys), 0)
            full_hi = tl.maximum(tl.minimum(i0 + 1, keys), 0)
            full_end = tl.minimum(full_hi, key_hi) // BN * BN
            whole_0 = (tl.maximum(full_end, 0) + (BN - 1)) // BN
            m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
            l = tl.full([BM, BN // 4], 0.0, tl.float32)  # running sum, in parts that one thread holds
            acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
            # tiles in which every pair counts
            for t in range(first, tl.minimum(last, whole_0)):
                n = t * BN
                acc, m, l = group_key_tile(
                    acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, n,
                    hk, keys, q, i, c, False, 0, BM, BN, TMA,
                )
            # tiles cut by the mask or by the end of the keys
            for t in range(tl.maximum(first, whole_0) - whole_0, last - whole_0):
                n = full_end + t * BN
                acc, m, l = group_key_tile(
                    acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s, b, n,
                    hk, keys, q, i, c, True, PASS, BM, BN, TMA,
                )
            if PASS == 0:
                left_nan = tl.maximum(left_nan, tl.max((acc != acc).to(tl.int32)))
            if PASS == 2:
                lost_here = tl.max((acc != acc).to(tl.int32))
                if lost_here > 0:
                    m = tl.full([BM], -1.7014118346046923e+38, tl.float32)  # running maximum, in units of log 2
                    l = tl.full([BM, BN // 4], 0.0, tl.float32)  # running sum, in parts that one thread holds
                    acc = tl.full([BM, 128], 0.0, tl.float32)  # [BM, 128]
                    # tiles in which every pair counts
                    for t in range(first, tl.minimum(last, whole_0)):
                        n = t * BN
                        acc, m, l = group_key_tile(
                            acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s,
                            b, n, hk, keys, q, i, c, False, 0, BM, BN, TMA,
                        )
                    # tiles cut by the mask or by the end of the keys
                    for t in range(tl.maximum(first, whole_0) - whole_0, last - whole_0):
                        n = full_end + t * BN
                        acc, m, l = group_key_tile(
                            acc, m, l, block_table, block_table_s0, block_table_s1, K, k_b, k_h, k_s, V, v_b, v_h, v_s,
                            b, n, hk, keys, q, i, c, True, 1, BM, BN, TMA,
                        )
            if last - first == count:
                total = tl.sum(l, 1)  # [BM]
                empty = total <= 0.0
                divisor = tl.where(empty, 1.0, total)
                if WRITE_LSE > 0:
                    tl.store(
                        LSE + b * lse_s0 + h * lse_s1 + row * lse_s2,
                        tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453),
                        mask=rows < group_rows,
                    )
                tl.store(
                    O + b * o_b + h[:, None] * o_h + row[:, None] * o_s + tl.arange(0, 128)[None, :],
                    (acc / divisor[:, None]).to(BF16), mask=(rows < group_rows)[:, None],
                )
            if last - first < count:
                slot = own_range * 2 + tl.where(first > 0, 0, 1)
                tl.store(part_m + slot * part_m_s0 + tl.arange(0, BM) * part_m_s1, m, mask=rows < group_rows)
                tl.store(part_l + slot * part_l_s0 + tl.arange(0, BM) * part_l_s1, tl.sum(l, 1), mask=rows < group_rows)
                tl.store(
                    part_o + slot * part_o_h + tl.arange(0, BM)[:, None] * part_o_s + tl.arange(0, 128)[None, :], acc,
                    mask=(rows < group_rows)[:, None],
                )
            item_begin = item_begin + count
        if PASS == 0:
            tl.store(part_lost + tl.program_id(0) * part_lost_s0, left_nan)


@triton.jit(do_not_specialize=["B", "Sq"])
def paged_decode_merge(
    O, LSE, tiles_of, part_m, part_l, part_o,
    o_b: tl.int64, o_h: tl.int64, o_s: tl.int64, lse_s0: tl.int64, lse_s1: tl.int64, lse_s2: tl.int64,
    tiles_of_s0: tl.int64, part_m_s0: tl.int64, part_m_s1: tl.int64, part_l_s0: tl.int64, part_l_s1: tl.int64,
    part_o_b: tl.int64, part_o_h: tl.int64, part_o_s: tl.int64,
    B, Sq,
    BM: tl.constexpr, BN: tl.constexpr, WRITE_LSE: tl.constexpr, SPLIT: tl.constexpr, FILL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Merges what several ranges found of a row, and ends it."""
    begin_early(EARLY)
    sequence = tl.program_id(0) // Sq
    row = tl.program_id(0) % Sq
    b = sequence // 32
    h = sequence % 32
    r = row * 4 + h % 4
    item = r // BM * (B * 8) + b * 8 + h // 4
    row_of_tile = r % BM
    items = B * 8 * ((Sq * 4 + (BM - 1)) // BM)
    line = 0
    for chunk in range(0, items, 1024):
        at = chunk + tl.arange(0, 1024)  # [1024]
        is_item = at < items
        some = tl.load(tiles_of + at * tiles_of_s0, mask=is_item, other=0)
        line = line + tl.sum(some, 0)
    # ranges of equal size, none of fewer than SPLIT tiles while there are more; whole ones to an item if near
    even = FILL // tl.maximum(items, 1) * items
    most = tl.where(even * 20 >= FILL * 19, even, FILL)
    ranges = tl.maximum(tl.minimum(most, line // SPLIT), 1)
    item_begin = 0
    for chunk in range(0, item, 1024):
        at = chunk + tl.arange(0, 1024)  # [1024]
        is_item = at < item
        some = tl.load(tiles_of + at * tiles_of_s0, mask=is_item, other=0)
        item_begin = item_begin + tl.sum(some, 0)
    count = tl.load(tiles_of + item * tiles_of_s0)
    first_range = tl.cast(((tl.cast(item_begin, tl.int64) + 1) * ranges - 1) // tl.maximum(line, 1), tl.int32)
    held = tl.where(
        count > 0,
        tl.cast(((tl.cast(item_begin + count - 1, tl.int64) + 1) * ranges - 1) // tl.maximum(line, 1), tl.int32)
        - first_range
        + 1,
        0,
    )
    if held != 1:
        m = -1.7014118346046923e+38
        total = 0.0
        acc = tl.full([128], 0.0, tl.float32)  # [128]
        for first in range(0, held, 64):
            share = first + tl.arange(0, 64)  # [64]
            inside = share < held
            slot = (first_range + share) * 2 + tl.where(share > 0, 0, 1)
            peaks = tl.where(
                inside, tl.load(part_m + slot * part_m_s0 + row_of_tile * part_m_s1, mask=inside, other=0),
                -1.7014118346046923e+38,
            )
            totals = tl.load(part_l + slot * part_l_s0 + row_of_tile * part_l_s1, mask=inside, other=0)
            outputs = tl.load(
                part_o + slot[:, None] * part_o_h + row_of_tile * part_o_s + tl.arange(0, 128)[None, :],
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


@triton.jit(do_not_specialize=["B", "Sn", "Sk"])
def paged_decode_append(
    K_NEW, V_NEW, K, V, positions, block_table,
    k_new_b: tl.int64, k_new_h: tl.int64, k_new_s: tl.int64, v_new_b: tl.int64, v_new_h: tl.int64,
    v_new_s: tl.int64, k_b: tl.int64, k_h: tl.int64, k_s: tl.int64, v_b: tl.int64, v_h: tl.int64, v_s: tl.int64,
    positions_s0: tl.int64, positions_s1: tl.int64, block_table_s0: tl.int64, block_table_s1: tl.int64,
    B, Sn, Sk,
):
    """Writes new keys and values into the cache, some tokens of a head a program."""
    spans = (Sn + 15) // 16
    rest = tl.program_id(0) // B
    b = tl.program_id(0) % B
    begin = rest % spans * 16
    number = rest // spans
    at = begin + tl.arange(0, 16)  # [16] tokens
    there = at < Sn
    position = tl.where(
        there, tl.load(positions + b * positions_s0 + at * positions_s1, mask=there, other=0), -1,
    )  # [16]
    kept = (position >= 0) & (position < Sk)  # tokens without a place are left out
    position = tl.maximum(position, 0)
    page = tl.load(block_table + b * block_table_s0 + position // 64 * block_table_s1, mask=kept, other=0)  # [16]
    slot = position % 64  # [16]
    if number < 8:
        h = number
        tl.store(
            K + page[:, None] * k_b + h * k_h + slot[:, None] * k_s + tl.arange(0, 128)[None, :],
            tl.load(
                K_NEW + b * k_new_b + h * k_new_h + at[:, None] * k_new_s + tl.arange(0, 128)[None, :],
                mask=kept[:, None] & (tl.arange(0, 128) < 128)[None, :], other=0,
            ),
            mask=kept[:, None] & (tl.arange(0, 128) < 128)[None, :],
        )
    if number >= 8:
        h = number - 8
        tl.store(
            V + page[:, None] * v_b + h * v_h + slot[:, None] * v_s + tl.arange(0, 128)[None, :],
            tl.load(
                V_NEW + b * v_new_b + h * v_new_h + at[:, None] * v_new_s + tl.arange(0, 128)[None, :],
                mask=kept[:, None] & (tl.arange(0, 128) < 128)[None, :], other=0,
            ),
            mask=kept[:, None] & (tl.arange(0, 128) < 128)[None, :],
        )
