"""Loads a folder that `stratascope convert --to mlsae` wrote into the published module, and compares values with what
`stratascope encode` made of the autoencoder that was converted.

    stratascope convert runs/all --to mlsae mlsae-folder
    python check_mlsae.py vectors 576 x.safetensors             writes made-up vectors
    stratascope encode --sae runs/all --input x.safetensors --out codes.safetensors
    python check_mlsae.py check mlsae-folder x.safetensors codes.safetensors

The module is arXiv 2409.04185 §3 (tim-lawson/mlsae, model/autoencoder.py): linear layers without biases, one bias subtracted before
and added after, the k largest, vectors standardised with an unbiased deviation plus 1e-5 and put back without it.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Autoencoder(torch.nn.Module):
    def __init__(self, n_inputs, n_latents, k, standardize=True, **_):
        super().__init__()
        self.k, self.standardize = k, standardize
        self.pre_encoder_bias = torch.nn.Parameter(torch.zeros(n_inputs))
        self.encoder = torch.nn.Linear(n_inputs, n_latents, bias=False)
        self.decoder = torch.nn.Linear(n_latents, n_inputs, bias=False)

    def forward(self, x):
        mean, std = torch.zeros(()), torch.ones(())
        if self.standardize:
            mean = x.mean(dim=-1, keepdim=True)
            x = x - mean
            std = x.std(dim=-1, keepdim=True)
            x = x / (std + 1e-5)
        top = self.encoder(x - self.pre_encoder_bias).topk(self.k, sorted=False)
        latents = torch.zeros(*x.shape[:-1], self.encoder.out_features, dtype=x.dtype)
        latents.scatter_(-1, top.indices, top.values.relu())
        return latents, (self.decoder(latents) + self.pre_encoder_bias) * std + mean


def vectors(width, path):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 2, 256).unsqueeze(1)
    save_file({"x": torch.randn(256, int(width), generator=generator) * scale}, path)


@torch.no_grad()
def check(folder, inputs, codes):
    config = json.loads((Path(folder) / "config.json").read_text())
    module = Autoencoder(**config)
    module.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=True)
    x, ours = load_file(inputs)["x"], load_file(codes)
    latents, reconstruction = module.double()(x.double())
    same = ((latents > 0) == (ours["features"] > 0)).all(dim=1)
    off = lambda a, b: ((a - b).abs().amax(dim=1) / b.abs().amax(dim=1))[same].max().item()
    latents_off, reconstruction_off = off(ours["features"], latents), off(ours["reconstruction"], reconstruction)
    print(f"layers {config['layers']}: {int(same.sum())} of {len(x)} rows with the same active latents, on average "
          f"{(latents > 0).sum(1).double().mean():.1f}; values off by {latents_off:.1e}, reconstructions by {reconstruction_off:.1e}")
    assert same.double().mean() > 0.99 and latents_off < 1e-5 and reconstruction_off < 1e-5


if __name__ == "__main__":
    {"vectors": vectors, "check": check}[sys.argv[1]](*sys.argv[2:])
