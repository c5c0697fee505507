"""What attention computes with decoded tokens on a CPU: scores, exponentials, weighted sums; all fp32."""

import numpy as np
from numba import njit

from kvist.kernels.numba.codes import FAST


@njit(**FAST)
def dots(q, x, scores):
    """scores (R, T) = q (R, D) · x (T, D)."""
    rows, tokens, dim = q.shape[0], x.shape[0], x.shape[1]
    for r in range(0, rows - 3, 4):
        q0, q1, q2, q3 = q[r], q[r + 1], q[r + 2], q[r + 3]
        for t in range(tokens):
            y = x[t]
            a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for d in range(dim):
                a0 += q0[d] * y[d]
                a1 += q1[d] * y[d]
                a2 += q2[d] * y[d]
                a3 += q3[d] * y[d]
            scores[r, t], scores[r + 1, t], scores[r + 2, t], scores[r + 3, t] = a0, a1, a2, a3
    for r in range(rows // 4 * 4, rows):
        q0 = q[r]
        for t in range(0, tokens - 3, 4):
            x0, x1, x2, x3 = x[t], x[t + 1], x[t + 2], x[t + 3]
            a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for d in range(dim):
                a0 += q0[d] * x0[d]
                a1 += q0[d] * x1[d]
                a2 += q0[d] * x2[d]
                a3 += q0[d] * x3[d]
            scores[r, t], scores[r, t + 1], scores[r, t + 2], scores[r, t + 3] = a0, a1, a2, a3
        for t in range(tokens // 4 * 4, tokens):
            y = x[t]
            a0 = np.float32(0)
            for d in range(dim):
                a0 += q0[d] * y[d]
            scores[r, t] = a0


@njit(**FAST)
def weigh(weights, x, out):
    """out (R, D) += weights (R, T) · x (T, D)."""
    tokens = x.shape[0]
    for t in range(0, tokens - 3, 4):
        x0, x1, x2, x3 = x[t], x[t + 1], x[t + 2], x[t + 3]
        for r in range(out.shape[0]):
            o, w0, w1, w2, w3 = out[r], weights[r, t], weights[r, t + 1], weights[r, t + 2], weights[r, t + 3]
            for d in range(o.shape[0]):
                o[d] += w0 * x0[d] + w1 * x1[d] + w2 * x2[d] + w3 * x3[d]
    for t in range(tokens // 4 * 4, tokens):
        x0 = x[t]
        for r in range(out.shape[0]):
            o, w0 = out[r], weights[r, t]
            for d in range(o.shape[0]):
                o[d] += w0 * x0[d]


@njit(**FAST)
def exponentials(x, top, power):
    """x (n,) becomes exp(x - top), to 2e-7·(1 + top - x) of itself; 0 where x - top < -87. `power` (n,) is scratch."""
    powers = power.view(np.int32)
    for i in range(x.shape[0]):
        y = max((x[i] - top) * np.float32(1.4426950408889634), np.float32(-126.0))
        whole = np.floor(y)
        f = y - whole
        p = np.float32(2.161291542e-04)
        p = p * f + np.float32(1.246784629e-03)
        p = p * f + np.float32(9.675451586e-03)
        p = p * f + np.float32(5.548528061e-02)
        p = p * f + np.float32(2.402293056e-01)
        p = p * f + np.float32(6.931470444e-01)
        p = p * f + np.float32(1.0)
        powers[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        x[i] = p if y > np.float32(-126.0) else np.float32(0.0)
    for i in range(x.shape[0]):
        x[i] *= power[i]
