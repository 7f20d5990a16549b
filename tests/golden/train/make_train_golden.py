"""Golden losses and gradients of every training objective, from PyTorch autograd in float64.

The pseudo-derivatives are custom autograd Functions (arXiv 2407.14435, eqs. 11 and 12); everything
else is left to autograd, so the backward passes written by hand in Rust meet independent ones.

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


def largest(z, k, allowed=None):
    """1 at the k largest positive values along the last axis."""
    z = z if allowed is None else z.masked_fill(~allowed, float("-inf"))
    index = z.topk(min(k, z.shape[-1]), dim=-1).indices
    return torch.zeros_like(z).scatter(-1, index, 1.0) * (z > 0)


def case(name, seed, kind, **options):
    """One batch through one objective; `options` say which terms it has."""
    generator = torch.Generator().manual_seed(seed)

    def f32(*shape, scale=1.0, shift=0.0):
        # Inputs are float32 values, so that both programs start from the same numbers.
        return (shift + scale * torch.randn(*shape, generator=generator)).float().double()

    n_rows, d_in, n, bandwidth = 12, 5, 8, 0.5
    d_out = options.get("d_out", d_in)
    pre_bias = options.get("pre_bias", True) and d_out == d_in
    nu = options.get("normaliser", 1.0)
    x = f32(n_rows, d_in)
    y = f32(n_rows, d_out) if "d_out" in options else x
    leaves = {
        "w_enc": f32(n, d_in, scale=0.6),
        "b_enc": f32(n, scale=0.2),
        "w_dec": f32(n, d_out, scale=0.5),
        "b_dec": f32(d_out, scale=0.3),
    }
    log = options.get("parametrisation", "log") == "log"
    if kind == "jumprelu":
        theta = f32(n, scale=0.05, shift=0.3).abs()
        leaves["threshold"] = (theta.log() if log else theta).float().double()
    if kind == "gated":
        leaves["r_mag"], leaves["b_mag"] = f32(n, scale=0.3), f32(n, scale=0.3)
    if options.get("skip"):
        leaves["w_skip"] = f32(d_out, d_in, scale=0.3)
    p = {k: v.clone().requires_grad_() for k, v in leaves.items()}

    product = (x - p["b_dec"] if pre_bias else x) @ p["w_enc"].T
    z = product + p["b_enc"]
    gate = None
    if kind == "relu":
        f = z.relu()
    elif kind == "jumprelu":
        theta = p["threshold"].exp() if log else p["threshold"]
        f = JumpReLU.apply(z, theta, bandwidth)
        distance = (z - theta).abs()
        window = distance < bandwidth / 2
        assert ((distance - bandwidth / 2).abs().min() > 1e-4) and distance.min() > 1e-4, "choose another seed"
        assert (window & (z > theta)).any() and (window & (z <= theta)).any(), "the window must have both sides"
    elif kind == "gated":
        gate = z.relu()
        f = (z > 0) * (p["r_mag"].exp() * product + p["b_mag"]).relu()
    elif kind == "topk":
        f = z * largest(z.detach(), options["k"])
    elif kind == "batchtopk":
        f = z * largest(z.detach().flatten(), options["k"] * n_rows).view_as(z)

    skip = x @ p["w_skip"].T if "w_skip" in p else 0.0
    decode = lambda v, w, b: v @ w + b + skip
    error = lambda estimate, target: (estimate - target).square().sum(1).mean()
    whole = decode(f, p["w_dec"], p["b_dec"])
    mse = error(whole, y)
    reconstruction = mse / nu
    if "prefixes" in options:
        reconstruction = sum(
            weight / nu * error(decode(f[:, :m], p["w_dec"][:m], p["b_dec"]), y) for m, weight in options["prefixes"]
        )
    if "multi" in options:
        k, weight = options["multi"]
        wide = z * largest(z.detach(), k)
        reconstruction = reconstruction + weight / nu * error(decode(wide, p["w_dec"], p["b_dec"]), y)
    auxiliary = torch.zeros(())
    if gate is not None:
        frozen = gate @ p["w_dec"].detach() + p["b_dec"].detach() + (skip.detach() if "w_skip" in p else 0.0)
        auxiliary = auxiliary + error(frozen, y) / nu
    dead = [i % 3 == 0 for i in range(n)]
    if "aux_k" in options:
        k, weight = options["aux_k"]
        left = (y - whole).detach()
        values = z * largest(z.detach(), k, torch.tensor(dead))
        variance = (left - left.mean(0)).square().sum(1).mean()
        auxiliary = auxiliary + weight * error(values @ p["w_dec"], left) / variance
    if "dead_pull" in options:
        pulled = (theta - z).relu() * torch.tensor(dead)
        auxiliary = auxiliary + options["dead_pull"] * pulled.sum(1).mean()

    sparsity = torch.zeros(())
    term = options.get("sparsity", {"kind": "none"})
    if term["kind"] in ("l0", "target"):
        l0 = Step.apply(z, theta, bandwidth).sum(1).mean()
        lam = term["lambda"]
        sparsity = lam * l0 if term["kind"] == "l0" else lam * (l0 / term["target"] - 1).square()
    elif term["kind"] == "norm":
        values = f if gate is None else gate
        weight = p["w_dec"].norm(dim=1) if term["decoder_norm"] else torch.ones(n)
        # x^p has no derivative at 0: zero entries are left out, not multiplied by zero.
        powers = torch.where(values > 0, values, 1.0).pow(term["p"]) * (values > 0)
        sparsity = term["lambda"] * (powers * weight).sum(1).mean()

    (reconstruction + sparsity + auxiliary).backward()
    assert z.abs().min() > 1e-4 and (f > 0).any() and (f <= 0).any(), "choose another seed"
    flat = lambda t: t.detach().flatten().tolist()
    return {
        "name": name, "kind": kind, "d_in": d_in, "d_out": d_out, "pre_bias": pre_bias, "bandwidth": bandwidth,
        "parametrisation": "log" if log else "raw", "k": options.get("k", 0), "normaliser": nu, "sparsity": term,
        "prefixes": options.get("prefixes", []), "multi": options.get("multi"), "aux_k": options.get("aux_k"),
        "dead_pull": options.get("dead_pull"), "dead": dead, "x": flat(x), "y": flat(y),
        "parameters": {k: flat(v) for k, v in p.items()},
        "losses": {
            "mse": mse.item(), "reconstruction": reconstruction.item(), "sparsity": sparsity.item(),
            "auxiliary": auxiliary.item(), "l0": (f > 0).sum(1).double().mean().item(),
        },
        "gradients": {k: flat(v.grad) for k, v in p.items() if v.grad is not None},
    }


def norm(lam, p=1.0, decoder_norm=False):
    return {"kind": "norm", "lambda": lam, "p": p, "decoder_norm": decoder_norm}


L0, TARGET = {"kind": "l0", "lambda": 0.125}, {"kind": "target", "lambda": 0.125, "target": 2.0}
NESTED = [[2, 0.5], [5, 1.0], [8, 1.5]]
cases = []
for log in ("log", "raw"):
    for pre_bias in (True, False):
        for term in (L0, TARGET):
            name = f"jumprelu {log} {'pre-bias ' if pre_bias else ''}{term['kind']}"
            cases.append(case(name, 100 + len(cases), "jumprelu", parametrisation=log, pre_bias=pre_bias, sparsity=term))
cases += [
    case("relu l1", 201, "relu", sparsity=norm(0.1)),
    case("relu l1 without pre-bias", 202, "relu", sparsity=norm(0.1), pre_bias=False, normaliser=3.0),
    case("relu l1 by decoder norm", 203, "relu", sparsity=norm(0.1, decoder_norm=True)),
    case("relu p-annealed", 204, "relu", sparsity=norm(0.1, p=0.4)),
    case("relu p-annealed by decoder norm", 205, "relu", sparsity=norm(0.1, p=0.4, decoder_norm=True)),
    case("gated", 211, "gated", sparsity=norm(0.1)),
    case("gated RI-L1", 212, "gated", sparsity=norm(0.1, decoder_norm=True), pre_bias=False),
    case("gated p-annealed", 213, "gated", sparsity=norm(0.1, p=0.5), normaliser=2.0),
    case("topk", 221, "topk", k=2, normaliser=2.0),
    case("topk with auxk", 222, "topk", k=2, aux_k=[2, 0.25], normaliser=2.0),
    case("topk with multi and auxk", 223, "topk", k=1, multi=[4, 0.125], aux_k=[1, 0.25]),
    case("batchtopk", 231, "batchtopk", k=2),
    case("batchtopk with auxk", 232, "batchtopk", k=2, aux_k=[3, 0.25], pre_bias=False),
    case("matryoshka topk", 241, "topk", k=3, prefixes=NESTED),
    case("matryoshka batchtopk with auxk", 242, "batchtopk", k=3, prefixes=NESTED, aux_k=[2, 0.25]),
    case("matryoshka jumprelu", 243, "jumprelu", sparsity=TARGET, prefixes=NESTED),
    case("jumprelu with dead-latent loss", 251, "jumprelu", sparsity=L0, dead_pull=0.3),
    case("jumprelu with auxk", 252, "jumprelu", sparsity=L0, aux_k=[2, 0.25]),
    case("jumprelu transcoder", 261, "jumprelu", sparsity=L0, d_out=7),
    case("skip transcoder", 262, "topk", k=2, d_out=7, skip=True, aux_k=[2, 0.25]),
    case("gated skip transcoder", 263, "gated", sparsity=norm(0.1), d_out=3, skip=True),
    case("relu skip of the same width", 264, "relu", sparsity=norm(0.1), skip=True),
]
out = {
    "made_by": {"script": "make_train_golden.py", "torch": torch.__version__, "python": platform.python_version()},
    "cases": cases,
}
path = pathlib.Path(__file__).with_name("train.json")
path.write_text(json.dumps(out) + "\n")
print(path.name, path.stat().st_size, "bytes,", len(cases), "cases")
