"""Runs the first blocks of a language model with Hugging Face transformers, one batch a round, for a comparison of speed.

    python bench_harvest.py MODEL ids.json --layers 15 --threads 2 --dtype float32

MODEL is a Hugging Face folder or a .gguf file, ids.json a list of token sequences. Prints one line of JSON when ready, then
one for each line `round` read from standard input, as `stratascope bench harvest` does. Attention is the faster of sdpa and
eager, found while warming up. Nothing after the last block is computed.
"""

import argparse
import json
import os
import sys
import time

import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("ids")
parser.add_argument("--layers", type=int, default=15)
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()

torch.set_num_threads(args.threads)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder, options = args.model, {}
if os.path.isfile(args.model):
    folder, options = os.path.dirname(args.model), {"gguf_file": os.path.basename(args.model)}
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype), **options)
model = model.model.eval()
model.layers = model.layers[: args.layers]
model.norm = torch.nn.Identity()
with open(args.ids) as file:
    ids = torch.tensor(json.load(file))


def round_of(attention):
    model.set_attn_implementation(attention)
    started = time.perf_counter()
    with torch.inference_mode():
        last = model(ids, use_cache=False).last_hidden_state
    assert last.shape[:2] == ids.shape
    return time.perf_counter() - started


best = {}
for attention in ("sdpa", "eager"):
    round_of(attention)
    best[attention] = min(round_of(attention) for _ in range(2))
attention = min(best, key=best.get)
print(
    json.dumps(
        {
            "tokens": ids.numel(),
            "attention": attention,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }
    ),
    flush=True,
)
for line in sys.stdin:
    if line.strip() != "round":
        sys.exit(f"expected `round`, found {line.strip()!r}")
    print(json.dumps({"seconds": round_of(attention)}), flush=True)
