"""Golden forward passes of small sparse autoencoders, computed in float64 by NumPy alone.

    python make_sae_golden.py

writes jumprelu, relu, topk, transcoder, skip, standardised and norm `.safetensors` and four `.npz` archives beside itself. Written with numpy 2.4.6 and safetensors 0.8.0.
Weights are latent-major (`w_enc [n, d_in]`, `w_dec [n, d_out]`, `w_skip [d_out, d_in]`). In each of the first four one row
sits exactly on a decision: on a threshold (jumprelu, transcoder), on zero (relu), or on a tie for the k-th place (topk), with values that are multiples of
1/8 small enough for f32 to be exact in any order. Every other decision is at least 1e-3 away from its boundary.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
CLEAR = 1e-3


def weights(rng, d_in, n, d_out):
    w_dec = rng.normal(size=(n, d_out))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    return {
        "w_enc": (rng.normal(size=(n, d_in)) / np.sqrt(d_in)).astype(np.float32),
        "b_enc": rng.normal(0.1, 0.3, size=n).astype(np.float32),
        "w_dec": w_dec.astype(np.float32),
        "b_dec": rng.normal(0, 0.5, size=d_out).astype(np.float32),
    }


def eighths(rng, size):
    return (rng.integers(-16, 17, size=size) / 8).astype(np.float32)


def pre_activations(p, x):
    return x.astype(np.float64) @ p["w_enc"].astype(np.float64).T + p["b_enc"].astype(np.float64)


def save(name, p, x, active, z, **more):
    features = np.where(active, z, 0.0)
    reconstruction = features @ p["w_dec"].astype(np.float64) + p["b_dec"].astype(np.float64)
    tensors = dict(p, x=x, features=features.astype(np.float32), reconstruction=reconstruction.astype(np.float32), **more)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, HERE / f"{name}.safetensors")
    print(f"{name}: {x.shape[0]} rows, L0 {active.sum(1).tolist()}")


def thresholded(name, seed, d_in, n, d_out, n_rows, on_row, on_latent, relu=False):
    """One latent of one row lands exactly on its threshold, and so stays silent."""
    for attempt in range(1000):
        rng = np.random.default_rng([seed, attempt])
        p = weights(rng, d_in, n, d_out)
        x = rng.normal(size=(n_rows, d_in)).astype(np.float32)
        p["w_enc"][on_latent] = eighths(rng, d_in)
        p["b_enc"][on_latent] = 0.375
        x[on_row] = eighths(rng, d_in)
        threshold = (0.05 + 0.5 * rng.random(n)).astype(np.float32)
        z = pre_activations(p, x)
        if relu:
            threshold[:] = 0
            p["b_enc"][on_latent] -= np.float32(z[on_row, on_latent])
        else:
            threshold[on_latent] = z[on_row, on_latent]
        z = pre_activations(p, x)
        distance = np.abs(z - threshold)
        exact = distance[on_row, on_latent] == 0
        distance[on_row, on_latent] = 1
        if exact and threshold[on_latent] >= 0 and distance.min() > CLEAR and (relu or len(set(threshold)) == n):
            more = {} if relu else {"threshold": threshold}
            return save(name, p, x, z > threshold, z, **more)
    raise SystemExit(f"{name}: no seed keeps its distance")


def top_k(name, seed, d, n, n_rows, k, tie_row, tie):
    """Two latents of one row are equal and only one of them fits: the lower one."""
    for attempt in range(10000):
        rng = np.random.default_rng([seed, attempt])
        p = weights(rng, d, n, d)
        x = rng.normal(size=(n_rows, d)).astype(np.float32)
        x[tie_row] = eighths(rng, d)
        # In the last row fewer than k are positive, so that the ReLU after the ranking matters.
        p["b_enc"] -= np.float32(0.6)
        x[-1] *= np.float32(0.2)
        for latent in tie:
            p["w_enc"][latent] = eighths(np.random.default_rng([seed, attempt, 1]), d) / 4
            p["b_enc"][latent] = 0.25
        # Equal in every row would tie everywhere: one of the two also reads a direction absent from the tie row.
        x[tie_row, 0] = 0
        p["w_enc"][tie[1], 0] += 1
        z = pre_activations(p, x)
        order = np.argsort(-z, axis=1, kind="stable")
        ranked = np.take_along_axis(z, order, axis=1)
        gap = ranked[:, k - 1] - ranked[:, k]
        tied = gap[tie_row] == 0 and sorted(order[tie_row, k - 1 : k + 1]) == sorted(tie)
        gap[tie_row] = ranked[tie_row, k - 2] - ranked[tie_row, k - 1]
        clear = min(gap.min(), np.abs(z).min(), ranked[tie_row, k] - ranked[tie_row, k + 1])
        if tied and clear > CLEAR and (z[-1] > 0).sum() < k:
            active = np.zeros_like(z, dtype=bool)
            np.put_along_axis(active, order[:, :k], True, axis=1)
            return save(name, p, x, active & (z > 0), z, k=np.array([k], dtype=np.float32))
    raise SystemExit(f"{name}: no seed keeps its distance")


def scaled(name, seed, d, n, n_rows, k=None, eps=None, skip=False):
    """Rows off centre and of different sizes, one of them constant, standardised or brought to a norm of sqrt(d)."""
    for attempt in range(10000):
        rng = np.random.default_rng([seed, attempt])
        p = weights(rng, d, n, d)
        size = np.array([1.0, 20.0, 0.003, 0.0, 5.0])[np.arange(n_rows) % 5]
        x = (rng.normal(size=(n_rows, d)) * size[:, None] + rng.normal(size=(n_rows, 1)) * (size[:, None] + 0.5)).astype(np.float32)
        if skip:
            p["w_skip"] = rng.normal(0, 0.3, size=(d, d)).astype(np.float32)
        wide = x.astype(np.float64)
        if eps is None:
            shift, scale = 0.0, np.linalg.norm(wide, axis=1, keepdims=True) / np.sqrt(d)
            inputs = wide / scale
        else:
            shift, scale = wide.mean(1, keepdims=True), wide.std(1, ddof=1, keepdims=True)
            inputs = (wide - shift) / (scale + np.float64(np.float32(eps)))
        z = pre_activations(p, inputs)
        if k is None:
            more = {"threshold": (0.05 + 0.5 * rng.random(n)).astype(np.float32)}
            active, clear = z > more["threshold"], np.abs(z - more["threshold"]).min()
        else:
            more = {"k": np.array([k], dtype=np.float32)}
            order = np.argsort(-z, axis=1, kind="stable")
            ranked = np.take_along_axis(z, order, axis=1)
            active = np.zeros_like(z, dtype=bool)
            np.put_along_axis(active, order[:, :k], True, axis=1)
            active &= z > 0
            clear = min((ranked[:, k - 1] - ranked[:, k]).min(), np.abs(z).min())
        if clear > CLEAR:
            more |= {"norm": np.ones(1, dtype=np.float32)} if eps is None else {"eps": np.array([eps], dtype=np.float32)}
            features = np.where(active, z, 0.0)
            inside = features @ p["w_dec"].astype(np.float64) + p["b_dec"].astype(np.float64)
            reconstruction = scale * inside + shift + (wide @ p["w_skip"].astype(np.float64).T if skip else 0.0)
            tensors = dict(p, x=x, features=features, reconstruction=reconstruction, **more)
            save_file({key: np.ascontiguousarray(v.astype(np.float32)) for key, v in tensors.items()}, HERE / f"{name}.safetensors")
            return print(f"{name}: {n_rows} rows, L0 {active.sum(1).tolist()}")
    raise SystemExit(f"{name}: no seed keeps its distance")


def skipped(name, seed, d_in, n, d_out, n_rows):
    """A transcoder with a skip connection from d_in to d_out."""
    for attempt in range(10000):
        rng = np.random.default_rng([seed, attempt])
        p = weights(rng, d_in, n, d_out)
        p["w_skip"] = rng.normal(0, 0.4, size=(d_out, d_in)).astype(np.float32)
        x = rng.normal(size=(n_rows, d_in)).astype(np.float32)
        threshold = (0.05 + 0.5 * rng.random(n)).astype(np.float32)
        z = pre_activations(p, x)
        if np.abs(z - threshold).min() > CLEAR:
            features = np.where(z > threshold, z, 0.0)
            reconstruction = features @ p["w_dec"].astype(np.float64) + p["b_dec"].astype(np.float64)
            reconstruction += x.astype(np.float64) @ p["w_skip"].astype(np.float64).T
            tensors = dict(p, x=x, features=features, reconstruction=reconstruction, threshold=threshold)
            save_file({key: np.ascontiguousarray(v.astype(np.float32)) for key, v in tensors.items()}, HERE / f"{name}.safetensors")
            return print(f"{name}: {n_rows} rows, L0 {(features > 0).sum(1).tolist()}")
    raise SystemExit(f"{name}: no seed keeps its distance")


def archives(name):
    """The transcoder's weights as `params.npz` in the ways NumPy can write them, `[d_in, n]` as Gemma Scope stores them."""
    g = load_file(HERE / f"{name}.safetensors")
    arrays = {
        "W_enc": np.ascontiguousarray(g["w_enc"].T),
        "W_dec": g["w_dec"],
        "b_enc": g["b_enc"],
        "b_dec": g["b_dec"],
        "threshold": g["threshold"],
    }
    np.savez(HERE / "stored.npz", **arrays)
    np.savez_compressed(HERE / "deflated.npz", **arrays, notes=np.array(["ignored"]))
    np.savez(HERE / "fortran_f8.npz", **{k: np.asfortranarray(v.astype(np.float64)) for k, v in arrays.items()})
    np.savez(HERE / "lower_case.npz", **{k.lower(): v for k, v in arrays.items()})


if __name__ == "__main__":
    thresholded("jumprelu", 1, d_in=24, n=40, d_out=24, n_rows=9, on_row=3, on_latent=7)
    thresholded("relu", 2, d_in=10, n=33, d_out=10, n_rows=5, on_row=4, on_latent=32, relu=True)
    thresholded("transcoder", 3, d_in=13, n=37, d_out=18, n_rows=6, on_row=0, on_latent=0)
    top_k("topk", 4, d=12, n=29, n_rows=7, k=5, tie_row=2, tie=(11, 20))
    skipped("skip", 5, d_in=13, n=37, d_out=9, n_rows=6)
    scaled("standardised", 6, d=12, n=29, n_rows=10, k=5, eps=1e-5)
    scaled("norm", 7, d=11, n=31, n_rows=7, skip=True)
    archives("transcoder")
