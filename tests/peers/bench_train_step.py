"""Runs SAELens' JumpReLU training step, one step a round, for a comparison of speed.

    python bench_train_step.py vectors.safetensors --threads 2

The file has batch `x [N, d]`, directions `w [n, d]` and `threshold [n]`, as `stratascope bench train-step --vectors`
writes them. Prints one line of JSON when ready, then one for each line `round` read from standard input. A step is what
SAELens' trainer does: forward pass, which latents fired, backward pass, clipping of the gradient's norm, Adam.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time

import torch
from safetensors.torch import load_file
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

parser = argparse.ArgumentParser()
parser.add_argument("vectors")
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()

torch.set_num_threads(args.threads)
tensors = load_file(args.vectors)
x, w = tensors["x"], tensors["w"]
sae = JumpReLUTrainingSAE(
    JumpReLUTrainingSAEConfig(
        d_in=x.shape[1],
        d_sae=w.shape[0],
        l0_coefficient=1.0,
        jumprelu_bandwidth=0.05,
        device="cpu",
        dtype="float32",
    )
)
with torch.no_grad():
    sae.W_enc.copy_(w.T)
    sae.W_dec.copy_(w)
    sae.b_enc.zero_()
    sae.b_dec.zero_()
    sae.threshold.copy_(tensors["threshold"])
sae.train()
# A learning rate so small that L0 stays where it is, and no momentum, as in the step beside it.
optimiser = torch.optim.Adam(sae.parameters(), lr=1e-6, betas=(0.0, 0.999))
since_fired = torch.zeros(w.shape[0])
frequency = torch.zeros(w.shape[0])


def step(number):
    started = time.perf_counter()
    out = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={"l0": 1.0},
            dead_neuron_mask=None,
            n_training_steps=number,
            is_logging_step=False,
        )
    )
    with torch.no_grad():
        fired = out.feature_acts.bool().float()
        since_fired.add_(1)
        since_fired[fired.sum(-2).bool()] = 0
        frequency.add_(fired.sum(0))
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "l0": fired.sum().item() / len(x)}


print(
    json.dumps(
        {
            "tokens": len(x),
            "threads": torch.get_num_threads(),
            "sae_lens": importlib.metadata.version("sae-lens"),
            "torch": torch.__version__,
        }
    ),
    flush=True,
)
for number, line in enumerate(sys.stdin):
    if line.strip() != "round":
        sys.exit(f"expected `round`, found {line.strip()!r}")
    print(json.dumps(step(number)), flush=True)
