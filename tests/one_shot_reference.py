"""One-shot pruning written plainly in numpy (float64), as a reference to test the library against.

W is (out, in); each row of X (n, in) is one token. Masks are True where a weight is kept.
"""

import numpy as np


def keep_best(scores, keep):
    """Mark the `keep` highest scores along the last axis.
    Among equal scores the lower index is dropped first.
    """
    order = np.argsort(scores, axis=-1, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order[..., scores.shape[-1] - keep :], True, axis=-1)
    return mask


def magnitude(W, keep):
    """Keep the `keep` largest absolute weights of the whole layer.
    This is the baseline that looks at no inputs.
    """
    return keep_best(np.abs(W).ravel(), keep).reshape(W.shape)


def wanda(W, X, keep):
    """Keep, in every output row, the `keep` weights with the highest Wanda score.
    The score is the absolute weight times the length of its input's column in X.
    """
    return keep_best(np.abs(W) * np.linalg.norm(X, axis=0), keep)


def wanda_n_of_m(W, X, n, m):
    """Keep the n best Wanda scores among every m consecutive inputs of an output.
    The number of inputs must be a multiple of m.
    """
    scores = np.abs(W) * np.linalg.norm(X, axis=0)
    return keep_best(scores.reshape(len(W), -1, m), n).reshape(W.shape)


def ria(W, X, keep, a=0.5):
    """Keep the `keep` weights of the whole layer with the highest RIA score.
    A weight's shares of its input's and its output's total are weighed by the input's length^a.
    """
    size = np.abs(W)
    total_of_input = size.sum(axis=0, keepdims=True)
    total_of_output = size.sum(axis=1, keepdims=True)
    share = size / np.where(total_of_input == 0, 1, total_of_input)
    share = share + size / np.where(total_of_output == 0, 1, total_of_output)
    scores = share * np.linalg.norm(X, axis=0) ** a
    return keep_best(scores.ravel(), keep).reshape(W.shape)


def damped_hessian(X, damping=0.01):
    """Return SparseGPT's damped Hessian 2/N X^T X and which inputs are dead (always zero).
    Dead inputs get a 1 on the diagonal, then damping * (mean of the diagonal) is added to it.
    """
    H = 2 / len(X) * X.T @ X
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    return H + damping * np.diag(H).mean() * np.eye(len(H)), dead


def sparsegpt(W, X, keep, block=128, damping=0.01):
    """Prune with SparseGPT; `keep` is a fraction of the layer or a pair (n, m) for n of m.
    Returns the mask, the repaired weights and the loss summed over all rows.
    """
    H, dead = damped_hessian(X, damping)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    W = np.where(dead, 0.0, W)
    rows, inputs = W.shape
    pattern = keep if isinstance(keep, tuple) else None
    if pattern and (block % pattern[1] or inputs % pattern[1]):
        raise ValueError("groups must not run over the end of a block or of a row")
    mask = np.zeros(W.shape, bool)
    loss = 0.0
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        if not pattern:
            here = slice(start, stop)
            count = round(rows * stop * keep) - round(rows * start * keep)
            scores = W[:, here] ** 2 / np.diag(U)[here] ** 2
            mask[:, here] = keep_best(scores.ravel(), count).reshape(scores.shape)
        errors = np.zeros((rows, stop - start))
        for j in range(start, stop):
            if pattern and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                mask[:, group] = keep_best(W[:, group] ** 2 / np.diag(U)[group] ** 2, pattern[0])
            q = np.where(mask[:, j], W[:, j], 0.0)
            err = (W[:, j] - q) / U[j, j]
            loss += (err**2).sum() / 2
            W[:, j:stop] -= np.outer(err, U[j, j:stop])
            W[:, j] = q
            errors[:, j - start] = err
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return mask, W, loss


def alps(W, X, keep, rho=0.1, iterations=300, cg_steps=10):
    """Prune the whole layer to `keep` weights with ALPS: ADMM finds the support, CG repairs it.
    Returns the mask and the repaired weights.
    """
    G = X.T @ X
    G = G + 0.01 * np.diag(G).mean() * np.eye(len(G))
    scale = np.sqrt(np.diag(G)) + 1e-8
    G = G / np.outer(scale, scale)
    B0 = scale[:, None] * W.T
    target = G @ B0
    values, vectors = np.linalg.eigh(G)

    start = magnitude(B0, keep)
    support, D, V, grown = start, B0 * start, np.zeros_like(B0), False
    last_support = support
    for i in range(1, iterations + 1):
        right = vectors.T @ (target - V + rho * D)
        B = vectors @ (right / (values + rho)[:, None])
        support = magnitude(B + V / rho, keep)
        D = (B + V / rho) * support
        V = V + rho * (B - D)
        if i % 3:
            continue
        changed = np.sum(support != last_support)
        last_support = support
        if changed > 0.005 * keep:
            rho, grown = rho * (1.3 if changed > 0.1 * keep else 1.2), True
        elif changed and grown:
            rho *= 1.1
        elif grown:
            break
        else:
            rho /= 5
            if changed:
                support, D, V = start, B0 * start, np.zeros_like(B0)
                last_support = support
    B = conjugate_gradient(G, target, D, support, cg_steps)
    return support.T, (B / scale[:, None]).T


def conjugate_gradient(G, target, B, support, steps):
    """Solve G B = target by conjugate gradients, each column on its own, moving only the support.
    Starts at B and returns B after that many steps.
    """
    residual = (target - G @ B) * support
    direction, size = residual, (residual**2).sum(axis=0)
    for _ in range(steps):
        image = (G @ direction) * support
        curvature = (direction * image).sum(axis=0)
        step = size / np.where(curvature == 0, 1, curvature)
        B = B + step * direction
        residual = residual - step * image
        new_size = (residual**2).sum(axis=0)
        direction = residual + new_size / np.where(size == 0, 1, size) * direction
        size = new_size
    return B


def output_error(W0, W1, X):
    """Return how far the layer's outputs moved from W0 to W1, squared, summed,
    and divided by the squared size of the outputs under W0.
    """
    return np.sum((X @ (W0 - W1).T) ** 2) / np.sum((X @ W0.T) ** 2)


def main():
    """Check SparseGPT's loss identity and the order of the methods on correlated inputs.
    Prints the output errors.
    """
    for seed in range(5):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(512, 64)) @ rng.normal(size=(64, 64)) * rng.uniform(0.2, 3, 64)
        W = rng.normal(size=(48, 64))
        H, _ = damped_hessian(X)
        half = W.size // 2
        for keep, block in ((0.5, 128), (0.5, 16), (0.3, 24), ((2, 4), 128), ((2, 4), 16)):
            mask, repaired, loss = sparsegpt(W, X, keep, block)
            expected = np.sum((W - repaired) @ H * (W - repaired)) / 2
            assert abs(loss - expected) < 1e-8 * expected, (loss, expected)
            share = 0.5 if isinstance(keep, tuple) else keep
            assert mask.sum() == round(W.size * share)
            assert not repaired[~mask].any()
        mask, pruned = alps(W, X, half)
        assert mask.sum() == half
        assert not pruned[~mask].any()
        free = [
            output_error(W, pruned, X),
            output_error(W, sparsegpt(W, X, 0.5)[1], X),
            output_error(W, W * wanda(W, X, 32), X),
            output_error(W, W * magnitude(W, half), X),
        ]
        groups = [
            output_error(W, sparsegpt(W, X, (2, 4))[1], X),
            output_error(W, W * wanda_n_of_m(W, X, 2, 4), X),
            output_error(W, W * wanda_n_of_m(W, np.ones_like(X), 2, 4), X),
        ]
        layer_ria = output_error(W, W * ria(W, X, half), X)
        print(f"seed {seed}: alps, sparsegpt, wanda, magnitude at 50 %:", np.round(free, 4))
        print(f"        sparsegpt, wanda, magnitude at 2:4: {np.round(groups, 4)}", end="")
        print(f"; ria at 50 %: {layer_ria:.4f}")
        assert free[0] <= free[1] < free[2] < free[3], free
        assert groups[0] < groups[1] < groups[2], groups


if __name__ == "__main__":
    main()
