"""Times JumpReLU training steps of SAELens and dictionary_learning on a card, at the sizes of `stratascope bench cuda`.

    python bench_cuda.py --widths 16384,131072
    python bench_cuda.py --widths 16384,131072 --autocast --compile

A step is what each library's trainer does, with its defaults; thresholds are set so that about --l0 latents are active. With
--autocast products are in bfloat16, with --compile the modules go through torch.compile. A width that does not fit is said so.
Prints one line a library and width: milliseconds of the median step, vectors a second, L0, gigabytes at most.
"""

import argparse
import contextlib
import importlib.util
import sys
import time
from unittest.mock import MagicMock

import torch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda:0")
parser.add_argument("--d", type=int, default=2304)
parser.add_argument("--widths", default="16384,65536,131072")
parser.add_argument("--batch", type=int, default=4096)
parser.add_argument("--l0", type=float, default=64)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--autocast", action="store_true")
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()

torch.manual_seed(0)
device = torch.device(args.device)
on_card = device.type == "cuda"
x = torch.randn(args.batch, args.d, device=device) / args.d**0.5


def autocast():
    return torch.autocast(device.type, torch.bfloat16) if args.autocast else contextlib.nullcontext()


def threshold(weights, width):
    """The value that a share l0 / width of some pre-activations lies above."""
    z = (x[:64] @ weights[:, : min(width, 16384)]).flatten()
    return z.kthvalue(int(len(z) * (1 - args.l0 / width))).values


def saelens(width):
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = JumpReLUTrainingSAEConfig(
        d_in=args.d, d_sae=width, l0_coefficient=1.0, device=str(device), dtype="float32"
    )
    sae = JumpReLUTrainingSAE(config)
    with torch.no_grad():
        sae.threshold.fill_(threshold(sae.W_enc, width))
    forward = torch.compile(sae.training_forward_pass) if args.compile else sae.training_forward_pass
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-7, betas=(0.9, 0.999))
    for number in range(args.steps + 3):
        batch = TrainStepInput(
            sae_in=x, coefficients={"l0": 1.0}, dead_neuron_mask=None, n_training_steps=number, is_logging_step=False
        )
        with autocast():
            out = forward(batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        yield lambda: (out.feature_acts > 0).sum().item() / len(x)


def dictionary_learning(width):
    for name in ["nnsight", "datasets", "einops", "wandb", "transformer_lens"]:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock()
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    steps = 10**6
    trainer = JumpReluTrainer(
        steps=steps, activation_dim=args.d, dict_size=width, layer=0, lm_name="lm", lr=1e-7, device=str(device)
    )
    with torch.no_grad():
        trainer.ae.threshold.fill_(threshold(trainer.ae.W_enc, width))
    if args.compile:
        trainer.loss = torch.compile(trainer.loss)
    for number in range(args.steps + 3):
        with autocast():
            trainer.update(number, x)
        yield lambda: (trainer.ae.encode(x) > 0).sum().item() / len(x)


def wait():
    if on_card:
        torch.cuda.synchronize()


print(f"{torch.cuda.get_device_name(device) if on_card else device}, torch {torch.__version__}", flush=True)
for name, library in [("SAELens", saelens), ("dictionary_learning", dictionary_learning)]:
    for width in map(int, args.widths.split(",")):
        if on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            times, steps = [], library(width)
            active = None
            for _ in range(args.steps + 3):
                wait()
                started = time.perf_counter()
                active = next(steps)
                wait()
                times.append(time.perf_counter() - started)
            median = sorted(times[3:])[len(times[3:]) // 2]
            memory = torch.cuda.max_memory_allocated() / 1e9 if on_card else float("nan")
            print(
                f"{name:<20} {width:>9} {1e3 * median:>9.2f} ms {args.batch / median:>10.0f} vectors/s"
                f"  L0 {active():6.1f} {memory:6.2f} GB",
                flush=True,
            )
        except torch.OutOfMemoryError:
            print(f"{name:<20} {width:>9} does not fit", flush=True)
        except Exception as error:  # A library that refuses is a line of the table, not its end.
            print(f"{name:<20} {width:>9} failed: {type(error).__name__}: {str(error)[:160]}", flush=True)
