"""A small attention forward by hand, over descriptors [B, H, S, D]: what the offline compiler is tried on."""

import triton
import triton.language as tl


@triton.jit
def step(acc, m, l, q, k, v, scale):
    s = tl.dot(q, tl.trans(k)) * scale
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def attention(q_desc, k_desc, v_desc, o_desc, lse, scale, Sq, Sk, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    m0 = tl.program_id(0) * BM
    rows = m0 + tl.arange(0, BM)
    q = tl.reshape(q_desc.load([0, 0, m0, 0]), [BM, D])
    m = tl.full([BM], -1e38, tl.float32)
    l = tl.full([BM], 0.0, tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n in range(0, Sk, BN):
        k = tl.reshape(k_desc.load([0, 0, n, 0]), [BN, D])
        v = tl.reshape(v_desc.load([0, 0, n, 0]), [BN, D])
        acc, m, l = step(acc, m, l, q, k, v, scale)
    o_desc.store([0, 0, m0, 0], tl.reshape((acc / l[:, None]).to(q.dtype), [1, 1, BM, D]))
    tl.store(lse + rows, m + tl.log2(l), mask=rows < Sq)


@triton.jit
def scale_rows(x, y, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0) * stride
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(y + row + at, tl.load(x + row + at, mask=at < n) * 2, mask=at < n)
