"""What a consumer of the Hopper engine does with a key tile: products, scores, and with `_weights.py` its weights, or
with `_limits.py` those of scores that have some, or with `_softmax.py` those of few bits."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from . import hopper as variant
from ._gluon import ROWS
from ._limits import add_pairs, in_pairs, lane_sums, weights_within
from ._masks import between
from ._products import add_values, arrived, copied, few_bits, fixed, is_short, joined, product, rounded
from ._ribbon import read_ribbon
from ._softmax import LOWEST, lane_sum, per_lane, softmax
from ._turns import pass_turn, take_turn
from ._weights import of_no_keys, scaled_if, weigh

LETTER = gl.constexpr(8)
"""Numbers that travel by mail before the variant's own."""


@gluon.jit
def fetch(mail, at):
    """A number of the mail, the same in every thread."""
    return gl.max(mail.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def fetch_own(mail, at, FLOATS: gl.constexpr):
    """What the variant knows of a query tile."""
    s = ()
    for n in gl.static_range(mail.shape[0] // 2 - LETTER):
        number = fetch(mail, at + n)
        if n < FLOATS:
            number = number.to(gl.float32, bitcast=True)
        s = s + (number,)
    return s


@gluon.jit
def opening(x_s, slot, NUMBER: gl.constexpr, LAYOUT: gl.constexpr, CONFIG):
    """What scores of a slot begin with."""
    BN: gl.constexpr = fixed(CONFIG, "BN")
    if fixed(CONFIG, "OPENS"):
        first = read_ribbon(x_s[0], slot * fixed(CONFIG, "CONSUMERS") + NUMBER, BN, LAYOUT)
    elif fixed(CONFIG, "PARTS"):
        first = ()
    else:
        first = gl.zeros([ROWS, BN], gl.float32, LAYOUT)
    return first


@gluon.jit
def read_beside(x_s, slot, NUMBER: gl.constexpr, LAYOUT: gl.constexpr, CONFIG):
    """What scores of a slot take besides, where they do not begin with it; 0 where nothing is."""
    x = 0
    if len(x_s) > fixed(CONFIG, "OPENS"):
        x = read_ribbon(x_s[0], slot * fixed(CONFIG, "CONSUMERS") + NUMBER, fixed(CONFIG, "BN"), LAYOUT)
    return x


@gluon.jit
def leave_keys(bar, x_s, CONFIG):
    """Gives a slot of keys back, and what came along."""
    if len(x_s) > fixed(CONFIG, "OPENS"):
        fence_async_shared()  # loads are on their way, and TMA would not wait for them
    mbarrier.arrive(bar, count=1)


@gluon.jit
def weighed(x, shift, m, c, p, acc_sent, bar, s, DTYPE: gl.constexpr, GUESS: gl.constexpr, CONFIG):
    """The accumulators, when the product of weights p has come, and then what `weigh` makes of new scores. Where
    products are short that is made while they run; their weights come along, which must stay until they are read. Not
    where `weigh` has no branch, as it has none without a guess: ptxas puts the wait before all of it then. Nor where
    rows have shifts, which take the registers that it needs (ALiBi would be 0.97 x as fast)."""
    if GUESS and len(shift) == 0 and is_short(CONFIG):
        made, sums, peak, alpha, answer = weigh(x, shift, m, c, DTYPE, GUESS)
        COUNT: gl.constexpr = len(acc_sent)
        got = arrived(acc_sent + p)[:COUNT]
        p_new = copied(made, s[fixed(CONFIG, "KEYS")] >> 31)
        mbarrier.arrive(bar, count=1)
    else:
        got = arrived(acc_sent)
        mbarrier.arrive(bar, count=1)
        p_new, sums, peak, alpha, answer = weigh(x, shift, m, c, DTYPE, GUESS)
    return got, p_new, sums, peak, alpha, answer


@gluon.jit
def masked_scores(qk, n, beside, r, s, args, LAYOUT: gl.constexpr, CONFIG):
    """Scores of the tile of keys from n on, -inf for pairs that the mask hides, or the sequence's end; their shift."""
    WIDTH: gl.constexpr = qk[0].shape[1]
    x = ()
    for part in gl.static_range(len(qk)):
        j = n + part * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
        r_part = r[0] + r[1][part]
        ends = variant.ends(r_part, s, args)
        if fixed(CONFIG, "READS_KEYS"):  # reads stay inside, even of no keys at all; `keep` knows of no end then
            inside = j < s[fixed(CONFIG, "KEYS")]
            j = gl.maximum(gl.minimum(j, s[fixed(CONFIG, "KEYS")] - 1), 0)
            kept = inside[None, :] & variant.keep(j, r_part, s, args)
        elif len(ends) > 0 and len(qk) == 1:
            kept = between(gl.maximum(ends[0], 0) - n, gl.maximum(ends[1], -1) - n, qk[0])
        else:
            kept = variant.keep(j, r_part, s, args)
        x = x + (gl.where(kept, variant.score(qk[part], beside, j, r_part, s, args), float("-inf")),)
    return x, variant.shift(n, r[0] + r[1][0], s, args)


@gluon.jit
def hidden(qk):
    x = ()
    for part in gl.static_range(len(qk)):
        x = x + (qk[part] + float("-inf"),)
    return x


@gluon.jit
def cut_scores(qk, t, beside, mail, letter, known, r, args, NUMBER: gl.constexpr, LAYOUT: gl.constexpr, CONFIG):
    """Scores of cut tile t. What they need is heard of again, and takes no registers from the loop over whole tiles."""
    s = known + fetch_own(mail, letter + LETTER, fixed(CONFIG, "FLOATS"))
    if not fixed(CONFIG, "KEEP_ROWS"):
        rows = fetch(mail, letter + 2) + NUMBER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        r = (variant.rows(rows, s, args), r[1])
    if s[fixed(CONFIG, "KEYS")] > 0:  # a branch, which keeps ptxas from asking the mask before the product is there
        x, shift = masked_scores(qk, variant.cut(t, s, args, fixed(CONFIG, "BN")), beside, r, s, args, LAYOUT, CONFIG)
    else:
        x, shift = hidden(qk), variant.shift(0, r[0] + r[1][0], s, args)
    return x, shift


@gluon.jit
def whole_scores(qk, t, beside, r, s, args, LAYOUT: gl.constexpr, CONFIG):
    """Scores of whole tile t, which neither mask nor end is asked about."""
    n = variant.whole(t, s, args, fixed(CONFIG, "BN"))
    WIDTH: gl.constexpr = qk[0].shape[1]
    x = ()
    for part in gl.static_range(len(qk)):
        j = n + part * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
        x = x + (variant.score(qk[part], beside, j, r[0] + r[1][part], s, args),)
    return x, variant.shift(n, r[0] + r[1][0], s, args)


@gluon.jit
def fill(q_at, cuts, read, places, bars, c, r, s, args, NUMBER: gl.constexpr, S_LAYOUT: gl.constexpr, CONFIG):
    """Scores and weights of the tile that opens the pipeline; its values are still to come."""
    _, _, k_full, k_empty, _, _, _, _ = bars
    q_s, k_s, _, x_s = places
    CONSUMERS: gl.constexpr = fixed(CONFIG, "CONSUMERS")
    STAGES: gl.constexpr = fixed(CONFIG, "STAGES")
    TURNS: gl.constexpr = fixed(CONFIG, "TURNS")
    slot = read % STAGES
    mbarrier.wait(k_full.index(slot), (read // STAGES) & 1)
    first = opening(x_s, slot, NUMBER, S_LAYOUT, CONFIG)
    if TURNS:
        take_turn(NUMBER)
    qk = product(q_s, q_at, k_s, slot, first, CONFIG)
    beside = read_beside(x_s, slot, NUMBER, S_LAYOUT, CONFIG)
    if TURNS == 1:
        pass_turn((NUMBER + 1) % CONSUMERS)
    qk = arrived(qk)
    if TURNS == 2:
        pass_turn((NUMBER + 1) % CONSUMERS)
    leave_keys(k_empty.index(slot), x_s, CONFIG)
    if cuts > 0:  # a branch keeps ptxas from asking the mask before the product is there, and packing the answers
        x, shift = masked_scores(qk, variant.cut(0, s, args, fixed(CONFIG, "BN")), beside, r, s, args, S_LAYOUT, CONFIG)
    else:
        x, shift = whole_scores(qk, 0, beside, r, s, args, S_LAYOUT, CONFIG)
    if few_bits(k_s[0].dtype):
        m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        new, alpha, peak = softmax(x[0], shift, m, c, fixed(CONFIG, "POLY"))
        p, l, late = (rounded(new),), lane_sum(new), (alpha,)
    elif len(variant.base()) > 0:
        new = weights_within(x, c, variant.base()[0])
        p, l, late = in_pairs(new), lane_sums(new), ()
        peak = add_pairs(p, of_no_keys(x, 0.0))
    else:
        p, l, peak, _, _ = weigh(x, shift, of_no_keys(x, LOWEST), c, k_s[0].dtype, False)
        late = ()
    return p, peak, l, late


@gluon.jit
def overlap(
    q_at, p, m, l, acc, late, t, read, places, bars, mail, letter, known, c, r, s, args, write_lse,
    NUMBER: gl.constexpr, S_LAYOUT: gl.constexpr, IS_CUT: gl.constexpr, CONFIG,
):  # fmt: skip
    """A turn of a loop over cut tiles, or of the main one over whole tiles: Q K(n) and P V(n - 1) are issued together,
    the softmax of n follows. Where scores have limits, m are sums of weights as products took them."""
    _, _, k_full, k_empty, v_full, v_empty, _, _ = bars
    q_s, k_s, v_s, x_s = places
    CONSUMERS: gl.constexpr = fixed(CONFIG, "CONSUMERS")
    STAGES: gl.constexpr = fixed(CONFIG, "STAGES")
    TURNS: gl.constexpr = fixed(CONFIG, "TURNS")
    slot = read % STAGES
    before = (read - 1) % STAGES
    mbarrier.wait(k_full.index(slot), (read // STAGES) & 1)
    first = opening(x_s, slot, NUMBER, S_LAYOUT, CONFIG)
    if TURNS:
        take_turn(NUMBER)
    qk_sent = product(q_s, q_at, k_s, slot, first, CONFIG)
    mbarrier.wait(v_full.index(before), ((read - 1) // STAGES) & 1)
    acc_sent = add_values(p, v_s, before, acc, CONFIG)
    beside = read_beside(x_s, slot, NUMBER, S_LAYOUT, CONFIG)
    if TURNS == 1:
        pass_turn((NUMBER + 1) % CONSUMERS)
    qk = arrived(qk_sent, len(v_s))
    if TURNS == 2:
        pass_turn((NUMBER + 1) % CONSUMERS)
    leave_keys(k_empty.index(slot), x_s, CONFIG)
    if IS_CUT:
        x, shift = cut_scores(qk, t, beside, mail, letter, known, r, args, NUMBER, S_LAYOUT, CONFIG)
    else:
        x, shift = whole_scores(qk, t, beside, r, s, args, S_LAYOUT, CONFIG)
    if few_bits(k_s[0].dtype):
        new, alpha, peak = softmax(x[0], shift, m, c, fixed(CONFIG, "POLY"))
        l = l * per_lane(alpha, l) + lane_sum(new)
        got = arrived(acc_sent)
        p_new = (rounded(new),)  # what the next product reads must not be written while this one runs
        mbarrier.arrive(v_empty.index(before), count=1)
        acc, late = joined(got, acc, late), (alpha,)
    elif len(variant.base()) > 0:
        got = acc_sent
        if CONSUMERS == 3:  # they have no registers for these weights beside those that the product still reads
            got = arrived(got)
        new = weights_within(x, c, variant.base()[0])
        if write_lse > 0:  # a branch, which also keeps ptxas from waiting for the product before there are weights
            l = l + lane_sums(new)
        if CONSUMERS == 2:
            got = arrived(got)
        acc, late = got, ()
        mbarrier.arrive(v_empty.index(before), count=1)
        p_new = in_pairs(new)  # and added before more is sent: sums would wait for all of that
        peak = add_pairs(p_new, m)
    else:
        bar = v_empty.index(before)
        got, p_new, sums, peak, alpha, answer = weighed(
            x, shift, m, c, p, acc_sent, bar, s, k_s[0].dtype, not IS_CUT, CONFIG
        )
        l = l * alpha + sums
        acc, late = scaled_if(answer, got, alpha), ()
    return p_new, peak, l, acc, late
