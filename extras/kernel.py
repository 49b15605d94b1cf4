"""The image's joint attention in one pass over memory: FlashAttention (Dao et al. 2022; Dao 2023)
in Triton, with two sources of keys. Written to learn from; SDPA is the default (see attention.py).

    JOINT_ATTENTION=triton python train.py         # asks for it, on an NVIDIA GPU from sm_80 on

Softmax needs the largest score and the sum of all of them before it can weigh a single value. Kept
for what has been seen so far, both can be mended whenever a larger score turns up (Milakov &
Gimelshein 2018). Say the keys so far have the largest score m, the sum z of exp(score - m), and
the output o, not yet divided by z. A block of new keys with scores s makes of them

    m' = max(m, max s)
    z' = z exp(m - m') + sum exp(s - m')
    o' = o exp(m - m') + exp(s - m') V

and o / z at the end is softmax(s) V, exactly, though no row of scores was ever whole. So they stay
on the chip. A program takes a block of one head's rows (image queries) and walks over the text's
keys, then over the image's: the text ends at its length, so there is no mask, no padding is read,
nothing is concatenated. What a row gives depends on its own head's keys alone, and on the blocks'
sizes: it is the same to the last bit whatever else is in the batch and however it is padded.

Backward, nothing of size rows x keys was kept. One number a row brings the weights back,
lse = m + log z, because softmax(s) = exp(s - lse). With dO the gradient of the output O:

    dV = P^T dO          P = exp(S - lse)                  S = scale Q K^T
    dP = dO V^T          dS = P (dP - delta)               delta = rowsum(dO O), the softmax's
    dQ = scale dS K      dK = scale dS^T Q                 own gradient (appendix B.4)

_backward_rows walks as the forward does and sums dQ; _backward_keys takes a block of keys, walks
over all rows of all heads that share it, and sums dK and dV. No two programs add to one place.

Beside the tensor cores every other instruction of the walk counts: exp(x) = exp2(x log2 e) is what
the hardware has, and the scale goes into the same multiply-add; only a walk's last block can be
partial, and it alone carries masks; widths are constants.

Letters: BM rows and BN keys in a block, DK and DV the widths, S a number of keys. A matrix argument
is a tuple: (pointer, strides over the batch, the heads, the tokens), the last stride being 1.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.constexpr_function
def _padded(width):
    return max(16, triton.next_power_of_2(width))  # what a block's width may be


@triton.jit
def _place(heads, count, BLOCK: tl.constexpr):
    """This program's batch row and head, and where its block of `count` rows or keys starts."""
    blocks = tl.cdiv(count, BLOCK)
    both = tl.program_id(0) // blocks  # one axis for all: the grid's other two end at 65,535
    return (both // heads).to(tl.int64), both % heads, tl.program_id(0) % blocks * BLOCK


@triton.jit
def _where(X, b, head, start, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to a block of rows, (BLOCK, padded width), and which columns exist."""
    d = tl.arange(0, _padded(WIDTH))
    rows = start + tl.arange(0, BLOCK)
    where = X[0] + b * X[1] + head * X[2] + rows[:, None] * X[3] + d[None, :]
    return where, (d < WIDTH)[None, :]


@triton.jit
def _load(X, b, head, start, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr):
    """A block of rows. Only the LAST of a walk may reach beyond `count`: zeros there."""
    where, columns = _where(X, b, head, start, BLOCK, WIDTH)
    if LAST:
        rows = start + tl.arange(0, BLOCK) < count
        return tl.load(where, mask=rows[:, None] & columns, other=0.0)
    elif WIDTH == _padded(WIDTH):
        return tl.load(where)
    else:
        return tl.load(where, mask=columns, other=0.0)


@triton.jit
def _store(X, x, b, head, start, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    where, columns = _where(X, b, head, start, BLOCK, WIDTH)
    rows = start + tl.arange(0, BLOCK) < count
    tl.store(where, x.to(X[0].dtype.element_ty), mask=rows[:, None] & columns)


# --------------------------------------------------------------------------------------------------
# a block of rows and its walk: forward, and for the rows' gradient


@triton.jit
def _walk(SEE: tl.constexpr, row, sums, K, V, b, g, count, scale, BN: tl.constexpr,
          DK: tl.constexpr, DV: tl.constexpr):
    """A block of rows looks at all `count` keys of one source: SEE takes in one block of them."""
    whole = count // BN * BN
    for start in range(0, whole, BN):
        sums = SEE(row, sums, K, V, b, g, start, count, scale, BN, DK, DV, False)
    if whole < count:
        sums = SEE(row, sums, K, V, b, g, whole, count, scale, BN, DK, DV, True)
    return sums


@triton.jit
def _see(q, sums, K, V, b, g, start, count, scale, BN: tl.constexpr, DK: tl.constexpr,
         DV: tl.constexpr, LAST: tl.constexpr):
    m, z, o = sums
    k = _load(K, b, g, start, count, BN, DK, LAST)
    v = _load(V, b, g, start, count, BN, DV, LAST)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BM, BN), not yet scaled
    if LAST:
        real = start + tl.arange(0, BN) < count
        scores = tl.where(real[None, :], scores, float("-inf"))
    larger = tl.maximum(m, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - larger[:, None])
    mend = tl.exp2(m - larger)
    z = z * mend + tl.sum(weights, 1)
    o = tl.dot(weights.to(v.dtype), v, o * mend[:, None], input_precision="ieee")
    return larger, z, o


@triton.jit
def _see_backward(row, dq, K, V, b, g, start, count, scale, BN: tl.constexpr, DK: tl.constexpr,
                  DV: tl.constexpr, LAST: tl.constexpr):
    q, do, lse, delta = row
    k = _load(K, b, g, start, count, BN, DK, LAST)
    v = _load(V, b, g, start, count, BN, DV, LAST)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.exp2(scores * scale - lse[:, None])
    if LAST:
        real = start + tl.arange(0, BN) < count
        weights = tl.where(real[None, :], weights, 0.0)
    dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
    dscores = weights * (dweights - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _forward(Q, K, V, TK, TV, LENGTHS, OUT, LSE, scale, H, G, N, S, BM: tl.constexpr,
             BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    b, h, start = _place(H, N, BM)
    g = h // (H // G)  # grouped queries: these heads share keys
    q = _load(Q, b, h, start, N, BM, DK, True)
    m = tl.full([BM], float("-inf"), tl.float32)
    z = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, _padded(DV)], tl.float32)
    sums = m, z, o
    sums = _walk(_see, q, sums, TK, TV, b, g, tl.load(LENGTHS + b), scale, BN, DK, DV)
    m, z, o = _walk(_see, q, sums, K, V, b, g, S, scale, BN, DK, DV)
    z = tl.where(z > 0, z, 1.0)  # a row that sees no key at all gives zeros, as SDPA's does
    _store(OUT, o / z[:, None], b, h, start, N, BM, DV)
    rows = start + tl.arange(0, BM)
    tl.store(LSE + (b * H + h) * N + rows, m + tl.log2(z), mask=rows < N)


@triton.jit
def _backward_rows(Q, K, V, TK, TV, LENGTHS, OUT, LSE, DO, DELTA, DQ, scale, factor, H, G, N, S,
                   BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """The gradient of a block of rows, and their delta for _backward_keys."""
    b, h, start = _place(H, N, BM)
    g = h // (H // G)
    q = _load(Q, b, h, start, N, BM, DK, True)
    o = _load(OUT, b, h, start, N, BM, DV, True)
    do = _load(DO, b, h, start, N, BM, DV, True)
    rows = start + tl.arange(0, BM)
    lse = tl.load(LSE + (b * H + h) * N + rows, mask=rows < N, other=float("inf"))
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + (b * H + h) * N + rows, delta, mask=rows < N)
    row = q, do, lse, delta
    dq = tl.zeros([BM, _padded(DK)], tl.float32)
    dq = _walk(_see_backward, row, dq, TK, TV, b, g, tl.load(LENGTHS + b), scale, BN, DK, DV)
    dq = _walk(_see_backward, row, dq, K, V, b, g, S, scale, BN, DK, DV)
    _store(DQ, dq * factor, b, h, start, N, BM, DK)


# --------------------------------------------------------------------------------------------------
# a block of keys, and all rows that look at it


@triton.jit
def _seen_by(dk, dv, k, v, Q, DO, LSE, DELTA, b, h, start, N, scale, BM: tl.constexpr,
             DK: tl.constexpr, DV: tl.constexpr, FLIP: tl.constexpr, LAST: tl.constexpr):
    """A block of keys learns what one more block of rows asks of it. Rows that do not exist have
    lse = inf, so their weights are 0. FLIP only decides which product the hardware computes."""
    q = _load(Q, b, h, start, N, BM, DK, LAST)
    do = _load(DO, b, h, start, N, BM, DV, LAST)
    rows = start + tl.arange(0, BM)
    if LAST:
        lse = tl.load(LSE + rows, mask=rows < N, other=float("inf"))
        delta = tl.load(DELTA + rows, mask=rows < N, other=0.0)
    else:
        lse = tl.load(LSE + rows)
        delta = tl.load(DELTA + rows)
    if FLIP:
        scores = tl.trans(tl.dot(q, tl.trans(k), input_precision="ieee"))  # (BN, BM)
        dweights = tl.trans(tl.dot(do, tl.trans(v), input_precision="ieee"))
    else:
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
    weights = tl.exp2(scores * scale - lse[None, :])
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
    dscores = weights * (dweights - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _backward_keys(Q, K, V, COUNTS, LSE, DO, DELTA, DKEYS, DVALUES, scale, factor, H, G, N, S,
                   BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
                   FLIP: tl.constexpr):
    """The gradients of a block of keys and values, of the image or of the text: S of them, of which
    COUNTS exist; the padding behind gets zeros."""
    b, g, start = _place(G, S, BN)
    count = tl.load(COUNTS + b)
    k = _load(K, b, g, start, count, BN, DK, True)
    v = _load(V, b, g, start, count, BN, DV, True)
    dk = tl.zeros([BN, _padded(DK)], tl.float32)
    dv = tl.zeros([BN, _padded(DV)], tl.float32)
    whole = N // BM * BM
    if start < count:
        for h in range(g * (H // G), (g + 1) * (H // G)):
            lse = LSE + (b * H + h) * N
            delta = DELTA + (b * H + h) * N
            for i in range(0, whole, BM):
                dk, dv = _seen_by(dk, dv, k, v, Q, DO, lse, delta, b, h, i, N, scale, BM, DK, DV,
                                  FLIP, False)
            if whole < N:
                dk, dv = _seen_by(dk, dv, k, v, Q, DO, lse, delta, b, h, whole, N, scale, BM, DK,
                                  DV, FLIP, True)
    real = (start + tl.arange(0, BN) < count)[:, None]
    _store(DKEYS, tl.where(real, dk * factor, 0.0), b, g, start, S, BN, DK)
    _store(DVALUES, tl.where(real, dv, 0.0), b, g, start, S, BN, DV)


# --------------------------------------------------------------------------------------------------
# launching them

# compute capability -> for heads of up to so many: (BM, BN, warps, stages) of _forward, of
# _backward_rows and, with FLIP, of _backward_keys. They fit the card's shared memory and keep
# every loop in registers (tests/test_kernel.py); no card has timed them.
BLOCKS = {
    80: {  # and 86, 89, 120: at most 99 KB
        64: ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2, False)),
        128: ((128, 32, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2, True)),
        256: ((32, 32, 4, 2), (32, 32, 4, 2), (16, 64, 8, 2, True)),
    },
    90: {
        64: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2, False)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2, False)),
        256: ((128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 8, 1, True)),
    },
    100: {
        64: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 2, False)),
        128: ((128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 2, False)),
        256: ((128, 64, 8, 1), (128, 32, 8, 2), (32, 64, 8, 1, True)),
    },
}


def blocks(capability: int, width: int) -> tuple[tuple, tuple, tuple]:
    """The table's line for heads of this width on a card of this compute capability."""
    table = BLOCKS.get(capability // 10 * 10, BLOCKS[80])
    return table[next(limit for limit in table if width <= limit)]


def launch(kernel, index: int, count: int, heads: int, *args) -> None:
    """One program for each block of the `count` rows or keys of every head. index: the kernel's
    place in the table. Matrices go in with their strides; Q, K, V come first."""
    q, _, v, *_ = args
    capability = 80
    if v.is_cuda:
        major, minor = torch.cuda.get_device_capability(v.device)
        capability = 10 * major + minor
    sizes = {"DK": q.shape[-1], "DV": v.shape[-1]}
    sizes["BM"], sizes["BN"], warps, stages, *flip = blocks(capability, max(sizes.values()))[index]
    if flip:
        sizes["FLIP"] = flip[0]
    arguments = []
    for x in args:
        is_matrix = torch.is_tensor(x) and x.dim() == 4
        arguments.append((x, *x.stride()[:3]) if is_matrix else x)
    programs = triton.cdiv(count, sizes["BN" if flip else "BM"]) * heads * len(v)
    if programs:
        with torch.cuda.device_of(v):  # Triton launches on the current GPU, wherever tensors lie
            kernel[(programs,)](*arguments, **sizes, num_warps=warps, num_stages=stages,
                                enable_fp_fusion=True)
