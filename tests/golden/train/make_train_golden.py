"""Golden losses and gradients of JumpReLU training, from PyTorch autograd in float64.

The pseudo-derivatives are custom autograd Functions (arXiv 2407.14435, eqs. 11 and 12); everything
else is left to autograd, so the backward pass written by hand in Rust meets an independent one.

    python make_train_golden.py        # writes train.json beside this file
"""

import json
import pathlib
import platform

import torch

torch.set_default_dtype(torch.float64)


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        window = (((z - theta) / ctx.bandwidth).abs() < 0.5).to(z.dtype)
        return None, (-(1.0 / ctx.bandwidth) * window * g).sum(0), None


class JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return z * (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        window = (((z - theta) / ctx.bandwidth).abs() < 0.5).to(z.dtype)
        return g * (z > theta).to(z.dtype), (-(theta / ctx.bandwidth) * window * g).sum(0), None


def case(seed, n_rows, d_in, n_latents, log, pre_bias, target):
    generator = torch.Generator().manual_seed(seed)

    def f32(*shape, scale=1.0, shift=0.0):
        # Inputs are float32 values, so that both programs start from the same numbers.
        return (shift + scale * torch.randn(*shape, generator=generator)).float().double()

    bandwidth, lam = 0.5, 0.125
    x = f32(n_rows, d_in)
    w_enc = f32(n_latents, d_in, scale=0.6)
    b_enc = f32(n_latents, scale=0.2)
    w_dec = f32(n_latents, d_in, scale=0.5)
    b_dec = f32(d_in, scale=0.3)
    theta = f32(n_latents, scale=0.05, shift=0.3).abs()
    parameter = (theta.log() if log else theta).float().double()
    leaves = [t.clone().requires_grad_() for t in (w_enc, b_enc, w_dec, b_dec, parameter)]
    we, be, wd, bd, par = leaves
    th = par.exp() if log else par
    z = (x - bd if pre_bias else x) @ we.T + be
    f = JumpReLU.apply(z, th, bandwidth)
    residual = f @ wd + bd - x
    mse = residual.square().sum(1).mean()
    l0 = Step.apply(z, th, bandwidth).sum(1).mean()
    sparsity = lam * l0 if target is None else lam * (l0 / target - 1).square()
    (mse + sparsity).backward()
    distance = (z - th).abs()
    in_window = distance < bandwidth / 2
    assert ((distance - bandwidth / 2).abs().min() > 1e-4) and distance.min() > 1e-4, "choose another seed"
    assert (in_window & (z > th)).any() and (in_window & (z <= th)).any(), "the window must have both sides"
    names = ["w_enc", "b_enc", "w_dec", "b_dec", "threshold"]
    return {
        "d_in": d_in,
        "parametrisation": "log" if log else "raw",
        "pre_bias": pre_bias,
        "bandwidth": bandwidth,
        "lambda": lam,
        "target": target,
        "x": x.flatten().tolist(),
        "parameters": {k: v.detach().flatten().tolist() for k, v in zip(names, leaves)},
        "losses": {"mse": mse.item(), "sparsity": sparsity.item(), "l0": l0.item()},
        "gradients": {k: v.grad.flatten().tolist() for k, v in zip(names, leaves)},
    }


cases = []
for k, (log, pre_bias, target) in enumerate(
    (log, pre_bias, target) for log in (True, False) for pre_bias in (True, False) for target in (None, 2.0)
):
    cases.append(case(100 + k, 12, 5, 8, log, pre_bias, target))
out = {
    "made_by": {"script": "make_train_golden.py", "torch": torch.__version__, "python": platform.python_version()},
    "cases": cases,
}
path = pathlib.Path(__file__).with_name("train.json")
path.write_text(json.dumps(out) + "\n")
print(path.name, path.stat().st_size, "bytes,", len(cases), "cases")
