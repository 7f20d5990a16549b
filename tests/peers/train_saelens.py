"""Trains a SAELens JumpReLU autoencoder on given activations, for a comparison at equal width, steps and batch.

    python train_saelens.py acts.safetensors --width 4096 --steps 600 --batch 1024 --target-l0 40

Reads `x [n, d]` (and `held_out [m, d]`) as `stratascope train --vectors` does, with the same handling of
outliers (vectors longer than ten times the median norm are left out) and the same scale. Prints L0, FVU,
dead share and tokens/s. With --target-l0 its quadratic L0 loss is used.
"""

import argparse
import json
import time

import torch
from safetensors.torch import load_file
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

parser = argparse.ArgumentParser()
parser.add_argument("vectors")
parser.add_argument("--width", type=int, default=4096)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--batch", type=int, default=1024)
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--l0-coefficient", type=float, default=10.0)
parser.add_argument("--target-l0", type=float)
parser.add_argument("--bandwidth", type=float, default=0.05)
parser.add_argument("--init-threshold", type=float, default=0.01)
parser.add_argument("--init-l0", type=float, help="thresholds from the data, so that training starts near this L0")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
torch.set_num_threads(args.threads)
tensors = load_file(args.vectors)
x = tensors["x"]
norms = x.norm(dim=1)
limit = 10 * norms.median()
x = x[norms <= limit]
scale = x.square().sum(1).mean().sqrt()
# SAELens expects vectors of norm about sqrt(d) ("expected_average_only_in").
factor = x.shape[1] ** 0.5 / scale
x = x * factor
held = tensors.get("held_out")
held = x[:20000] if held is None else held[held.norm(dim=1) <= limit] * factor

sae = JumpReLUTrainingSAE(
    JumpReLUTrainingSAEConfig(
        d_in=x.shape[1],
        d_sae=args.width,
        l0_coefficient=args.l0_coefficient,
        jumprelu_sparsity_loss_mode="step" if args.target_l0 is None else "quadratic",
        target_l0=args.target_l0,
        jumprelu_bandwidth=args.bandwidth,
        jumprelu_init_threshold=args.init_threshold,
        device="cpu",
        dtype="float32",
    )
)
if args.init_l0 is not None:
    with torch.no_grad():
        z = x[:4096] @ sae.W_enc + sae.b_enc
        sae.threshold.copy_(torch.quantile(z[:2048], 1 - args.init_l0 / args.width, dim=0).clamp(min=1e-3))
        print("median initial threshold", sae.threshold.median().item())
optimiser = torch.optim.Adam(sae.parameters(), lr=args.lr, betas=(0.9, 0.999))
fired = torch.zeros(args.width, dtype=torch.long)
order, at = torch.randperm(len(x)), 0
started = time.time()
for step in range(args.steps):
    if at + args.batch > len(order):
        order, at = torch.randperm(len(x)), 0
    batch = x[order[at : at + args.batch]]
    at += args.batch
    warm = min(1.0, (step + 1) / max(1, args.steps // 20))
    left = min(1.0, (args.steps - step) / max(1, int(0.3 * args.steps)))
    for group in optimiser.param_groups:
        group["lr"] = args.lr * warm * left
    out = sae.training_forward_pass(
        TrainStepInput(
            sae_in=batch,
            coefficients={"l0": args.l0_coefficient * warm},
            dead_neuron_mask=None,
            n_training_steps=step,
            is_logging_step=False,
        )
    )
    optimiser.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimiser.step()
    active = (out.feature_acts > 0).any(0)
    fired[active] = step + 1
elapsed = time.time() - started

with torch.no_grad():
    codes, rebuilt = zip(*((f := sae.encode(rows), sae.decode(f)) for rows in held.split(1024)))
    l0 = sum((c > 0).sum().item() for c in codes) / len(held)
    error = (torch.cat(rebuilt) - held).double().square().sum()
    fvu = (error / (held - held.mean(0)).double().square().sum()).item()
window = 300_000 // args.batch
print(
    json.dumps(
        {
            "l0": l0,
            "fvu": fvu,
            "dead": (fired <= max(0, args.steps - window)).float().mean().item(),
            "tokens_per_s": args.steps * args.batch / elapsed,
            "steps": args.steps,
            "torch": torch.__version__,
        }
    )
)
