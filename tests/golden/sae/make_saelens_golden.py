"""Folders written by SAELens itself, with the features and reconstructions it computes from them.

    python make_saelens_golden.py

writes `saelens/NAME/{cfg.json, sae_weights.safetensors, expected.safetensors}` beside itself. Written with sae-lens 6.54.12,
torch 2.15.0 (CPU), transformer-lens 3.9.0. Weights are float32 (one folder is bfloat16 on disk and computed in float32);
SAELens' arithmetic is float32 throughout. `expected.safetensors` holds `x`, `features` and `reconstruction`; rows in which a
decision is closer than 1e-3 to its boundary are replaced.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.registry import get_sae_class

HERE = Path(__file__).parent / "saelens"
D_IN, N, D_OUT, ROWS = 12, 31, 9, 8
HOOK = "blocks.4.hook_resid_post"


def fill(sae, generator):
    """Random parameters: SAELens' own start has zero biases, tied weights and equal thresholds."""
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name in ("W_enc", "W_dec"):
            value = noise / parameter.shape[0] ** 0.5
        elif name == "threshold":
            value = noise.abs() * 0.3
        else:
            value = noise * 0.3
        parameter.data = value.to(parameter.dtype)


def boundary(sae, x):
    """Distance of every decision from its boundary, [rows, n]."""
    sae_in = sae.process_sae_in(x)
    architecture = sae.cfg.architecture()
    if architecture == "gated":
        gate = sae_in @ sae.W_enc + sae.b_gate
        magnitude = sae_in @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag
        return torch.minimum(gate.abs(), magnitude.abs())
    z = sae_in @ sae.W_enc + sae.b_enc
    if architecture == "topk":
        if sae.cfg.rescale_acts_by_decoder_norm:
            z = z * sae.W_dec.norm(dim=-1)
        ranked = z.sort(dim=-1, descending=True).values
        gap = ranked[:, sae.cfg.k - 1] - ranked[:, sae.cfg.k]
        return torch.minimum(z.abs(), gap[:, None])
    return torch.minimum((z - getattr(sae, "threshold", 0)).abs(), z.abs())


@torch.no_grad()
def make(name, architecture, seed, flat=None, disk_dtype=None, **config):
    generator = torch.Generator().manual_seed(seed)
    sae_class, config_class = get_sae_class(architecture)
    cfg = config_class(d_in=D_IN, d_sae=N, device="cpu", **config)
    cfg.metadata.model_name, cfg.metadata.hook_name = "pythia-70m-deduped", HOOK
    cfg.metadata.context_size, cfg.metadata.prepend_bos = 128, True
    sae = sae_class(cfg)
    fill(sae, generator)
    folder = HERE / name
    sae.save_model(folder)
    weights = folder / "sae_weights.safetensors"
    if disk_dtype:
        save_file({k: v.to(disk_dtype) for k, v in load_file(weights).items()}, weights)
    if flat is not None:
        (folder / "cfg.json").write_text(json.dumps(flat, indent=1) + "\n")
    sae = SAE.load_from_disk(folder, device="cpu", dtype="float32")
    rows = []
    scaled = config.get("normalize_activations") in ("layer_norm", "constant_norm_rescale")
    while len(rows) < ROWS:
        x = torch.randn(1, D_IN, generator=generator)
        if scaled:
            # Off centre and of many sizes.
            x = (x + len(rows) / 2 - 2) * (1.0, 12.0, 0.01, 3.0)[len(rows) % 4]
        if boundary(sae, x).min() > 1e-3:
            rows.append(x)
    x = torch.cat(rows)
    features = sae.encode(x)
    # Scaling by rows is kept from one call to the next; a skip connection is added by the forward pass alone.
    reconstruction = sae(x) if hasattr(sae, "W_skip") else sae.decode(features)
    save_file({"x": x, "features": features, "reconstruction": reconstruction.contiguous()},
              folder / "expected.safetensors")
    print(f"{name}: {type(sae).__name__}, L0 {(features > 0).sum(1).tolist()}")


if __name__ == "__main__":
    flat = {"d_in": D_IN, "d_sae": N, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small",
            "hook_point": HOOK, "hook_point_layer": 4, "context_size": 128, "normalize_activations": False,
            "dataset_path": "text", "sae_lens_training_version": "3.1.0"}
    make("standard", "standard", 1, apply_b_dec_to_input=True)
    make("standard_flat", "standard", 2, flat=flat, apply_b_dec_to_input=True)
    make("jumprelu", "jumprelu", 3, apply_b_dec_to_input=True)
    make("jumprelu_bf16", "jumprelu", 4, disk_dtype=torch.bfloat16, apply_b_dec_to_input=False)
    make("topk", "topk", 5, k=6, apply_b_dec_to_input=False)
    make("topk_rescaled", "topk", 6, k=6, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=True)
    make("topk_flat", "topk", 7, k=5, apply_b_dec_to_input=True,
         flat=dict(flat, activation_fn_str="topk", activation_fn_kwargs={"k": 5}))
    make("gated", "gated", 8, apply_b_dec_to_input=True)
    make("transcoder", "transcoder", 9, d_out=D_OUT, apply_b_dec_to_input=False)
    make("jumprelu_transcoder", "jumprelu_transcoder", 10, d_out=D_OUT, apply_b_dec_to_input=False)
    make("skip_transcoder", "skip_transcoder", 12, d_out=D_OUT, apply_b_dec_to_input=False)
    make("jumprelu_skip_transcoder", "jumprelu_skip_transcoder", 13, d_out=D_OUT, apply_b_dec_to_input=False)
    make("layer_norm", "jumprelu", 14, normalize_activations="layer_norm", apply_b_dec_to_input=True)
    make("constant_norm", "topk", 15, k=6, normalize_activations="constant_norm_rescale", apply_b_dec_to_input=True)
    make("scaled_input", "jumprelu", 11, normalize_activations="expected_average_only_in", apply_b_dec_to_input=True)
