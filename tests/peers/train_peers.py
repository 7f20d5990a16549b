"""Trains an autoencoder with SAELens or dictionary_learning on a Stratascope store, in their own format.

    python train_peers.py STORE OUT --tap resid.14 --peer saelens --variant jumprelu --l0 40
    python train_peers.py STORE OUT --tap resid.14 --peer dictionary_learning --variant topk --l0 40

For comparisons at equal data, width, steps and batch: `stratascope eval --sae OUT` measures the result as it measures its own.
The libraries' own training steps run, with their own defaults, but for the learning rate (--lr), its warm-up and its decay over the
last 30 % of a run this short, and, for JumpReLU, the weight of the quadratic L0 term that both have (--l0-coefficient; dictionary_learning
fixes its bandwidth at --bandwidth). Vectors longer than four times the median norm are left out, as Stratascope leaves them out, and
vectors are scaled as each library scales them.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from safetensors import safe_open

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("store", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--tap", required=True)
parser.add_argument("--peer", choices=["saelens", "dictionary_learning"], required=True)
parser.add_argument("--variant", choices=["jumprelu", "topk"], required=True)
parser.add_argument("--l0", type=float, required=True, help="k, or the target L0")
parser.add_argument("--width", type=int, default=4096)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--batch", type=int, default=1024)
parser.add_argument("--lr", type=float, help="default: the library's own")
parser.add_argument("--l0-coefficient", type=float, default=1.0)
parser.add_argument("--bandwidth", type=float, help="of the straight-through window; default: the library's own")
parser.add_argument("--init-l0", type=float, help="thresholds from the data, such that training starts near this L0")
parser.add_argument("--warmup", type=int, default=100)
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
torch.set_num_threads(args.threads)
DECAY = 0.3


def shards():
    return sorted((args.store / "train" / args.tap).glob("shard-*.safetensors"))


def read(path):
    with safe_open(path, "pt") as file:
        return file.get_tensor("x").float()


first = read(shards()[0])
limit = 4 * first.norm(dim=1).median()
kept = first[first.norm(dim=1) <= limit]
d = kept.shape[1]
# C, with C² = mean ‖x‖².
scale = kept.square().sum(1).mean().sqrt().item()


def batches(factor):
    """Endless batches: shards in a shuffled order, rows shuffled within a shard, times `factor`."""
    order = np.random.default_rng(args.seed)
    left = torch.empty(0, d)
    while True:
        for number in order.permutation(len(shards())):
            x = read(shards()[number])
            x = x[x.norm(dim=1) <= limit]
            x = torch.cat([left, x[torch.from_numpy(order.permutation(len(x)))]])
            whole = len(x) // args.batch * args.batch
            for start in range(0, whole, args.batch):
                yield x[start : start + args.batch] * factor
            left = x[whole:].clone()


def rate(step):
    warm = min(1.0, (step + 1) / max(1, args.warmup))
    return warm * min(1.0, (args.steps - step) / max(1, int(DECAY * args.steps)))


def quantile_thresholds(x, weights, bias):
    """Per latent, the value that a share l0 / width of its pre-activations lies above."""
    z = x @ weights + bias
    return torch.quantile(z, 1 - args.init_l0 / args.width, dim=0).clamp(min=1e-3)


def saelens():
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    common = dict(d_in=d, d_sae=args.width, device="cpu", dtype="float32")
    if args.variant == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=int(args.l0), **common))
    else:
        window = {} if args.bandwidth is None else {"jumprelu_bandwidth": args.bandwidth}
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                l0_coefficient=args.l0_coefficient,
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=args.l0,
                **window,
                **common,
            )
        )
    # What "expected_average_only_in" does: vectors of norm about √d, undone in the weights at the end.
    factor = d**0.5 / scale
    if args.init_l0 is not None and args.variant == "jumprelu":
        with torch.no_grad():
            sae.threshold.copy_(quantile_thresholds(kept[:2048] * factor, sae.W_enc, sae.b_enc))
    lr = args.lr or 3e-4
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999))
    since_fired = torch.zeros(args.width, dtype=torch.long)
    for step, batch in zip(range(args.steps), batches(factor)):
        for group in optimiser.param_groups:
            group["lr"] = lr * rate(step)
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=batch,
                coefficients={"l0": args.l0_coefficient},
                dead_neuron_mask=since_fired > 1000,
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        since_fired += 1
        since_fired[out.feature_acts.detach().bool().any(0)] = 0
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        yield step
    sae.fold_activation_norm_scaling_factor(factor)
    sae.cfg.metadata.hook_name = f"blocks.{args.tap.split('.')[1]}.hook_resid_post"
    sae.save_inference_model(args.out)


def dictionary_learning():
    # Its buffer and evaluation want libraries that run language models; its trainers do not.
    for name in ["nnsight", "datasets", "einops", "wandb", "transformer_lens"]:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock()
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    common = dict(
        steps=args.steps,
        activation_dim=d,
        dict_size=args.width,
        layer=int(args.tap.split(".")[1]),
        lm_name="lm",
        seed=args.seed,
        device="cpu",
        warmup_steps=args.warmup,
        decay_start=int((1 - DECAY) * args.steps),
    )
    lr = {} if args.lr is None else {"lr": args.lr}
    if args.variant == "topk":
        trainer = TopKTrainer(k=int(args.l0), **lr, **common)
    else:
        window = {} if args.bandwidth is None else {"bandwidth": args.bandwidth}
        trainer = JumpReluTrainer(
            target_l0=args.l0,
            sparsity_penalty=args.l0_coefficient,
            sparsity_warmup_steps=args.warmup,
            **window,
            **lr,
            **common,
        )
        if args.init_l0 is not None:
            with torch.no_grad():
                ae = trainer.ae
                ae.threshold.copy_(quantile_thresholds(kept[:2048] / scale, ae.W_enc, ae.b_enc))
    # `normalize_activations = True`: a mean squared norm of 1, undone in the biases at the end.
    for step, batch in zip(range(args.steps), batches(1 / scale)):
        trainer.update(step, batch)
        yield step
    trainer.ae.scale_biases(scale)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(trainer.ae.state_dict(), args.out / "ae.pt")
    (args.out / "config.json").write_text(json.dumps({"trainer": trainer.config}))


started = time.time()
for step in saelens() if args.peer == "saelens" else dictionary_learning():
    if (step + 1) % 100 == 0:
        speed = (step + 1) * args.batch / (time.time() - started)
        print(f"{args.out.name}: step {step + 1} of {args.steps}, {speed:.0f} vectors/s", flush=True)
