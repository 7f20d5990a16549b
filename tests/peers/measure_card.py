"""Measures everything that needs a card, in one go, and writes it down as Markdown with the card's name.

    python measure_card.py ../../target/release/stratascope --out card.md
    python measure_card.py stratascope --out card.md --store STORE --peers ~/venv/bin/python

In this order, so that a machine that is taken away early has told the most important: what `doctor` sees; `selftest` (every objective
and every encoder against the reference in double precision, and impostors); `bench cuda` at d = 2304 (copies, products, steps from 16k
to 1M latents and their floors, both routes of a step); the same steps through SAELens and dictionary_learning, at their defaults and
with bf16 autocast and torch.compile; what the precision of the products does to FVU and L0; and a longer run with its memory. Without
--store or --vectors it trains on made-up vectors, sums of a few of many directions.

Every command has a limit of time (--limit), and one that fails or runs out of it is a section that says so, not the end. Needs a
Python with numpy; the other libraries are looked for in --peers (this Python unless given).
"""

import argparse
import json
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("program", help="the built stratascope")
parser.add_argument("--out", type=pathlib.Path, required=True, help="the Markdown file")
parser.add_argument("--device", default="cuda:0")
parser.add_argument("--peers", default=sys.executable, help="a Python with torch, sae_lens and dictionary_learning")
data = parser.add_mutually_exclusive_group()
data.add_argument("--store", help="a store to train on (with --tap where it has several)")
data.add_argument("--vectors", help="a safetensors file with x [n, width] and held_out")
parser.add_argument("--tap")
parser.add_argument("--d", type=int, default=2304)
parser.add_argument("--widths", default="16384,65536,131072,262144,1048576")
parser.add_argument("--peer-widths", default="16384,131072")
parser.add_argument("--route-widths", default="4096,16384,65536")
parser.add_argument("--train-width", type=int, default=16384)
parser.add_argument("--steps", type=int, default=2000, help="steps of the runs that compare precisions")
parser.add_argument("--long-steps", type=int, default=20000, help="steps of the longer run; 0 leaves it out")
parser.add_argument("--batch", type=int, default=4096)
parser.add_argument("--limit", type=float, default=600, help="seconds a command may take")
args = parser.parse_args()

here = pathlib.Path(__file__).resolve().parent
text = []


def write(*lines):
    """Adds lines to the file, which is whole after every section."""
    text.extend(lines)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".partial")
    partial.write_text("\n".join(text) + "\n")
    partial.replace(args.out)
    print("\n".join(lines), flush=True)


def run(title, command):
    """A section with what a command printed; returns that, or nothing where it failed."""
    started = time.monotonic()
    command = [str(part) for part in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
        output, status = done.stdout, f"exit status {done.returncode}" if done.returncode else ""
        if done.returncode:
            output += done.stderr[-2000:]
    except subprocess.TimeoutExpired as late:
        output, status = (late.stdout or b"").decode(), f"not finished after {args.limit:.0f} s"
    except OSError as error:
        output, status = "", str(error)
    seconds = f"{time.monotonic() - started:.0f} s"
    write(f"## {title}", "", f"`{' '.join(command)}`: {status or 'done'}, {seconds}", "", "```", output.rstrip(), "```", "")
    return output if not status else ""


def made_up(path, n=200_000, n_held_out=8192, directions=32768, active=32):
    """Vectors that are sums of a few of many directions, with exponential weights and a little noise."""
    import numpy as np

    rng = np.random.default_rng(0)
    d = args.d
    dictionary = rng.standard_normal((directions, d), dtype=np.float32)
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    # Some directions are far more common than others.
    common = 1.0 / (1.0 + np.arange(directions)) ** 0.5
    common /= common.sum()
    shapes = {"x": n, "held_out": n_held_out}
    header, offset = {}, 0
    for name, rows in shapes.items():
        header[name] = {"dtype": "F32", "shape": [rows, d], "data_offsets": [offset, offset + 4 * rows * d]}
        offset += 4 * rows * d
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for rows in shapes.values():
            for first in range(0, rows, 8192):
                count = min(8192, rows - first)
                x = 0.01 * rng.standard_normal((count, d), dtype=np.float32)
                for _ in range(active):
                    chosen = rng.choice(directions, size=count, p=common)
                    x += rng.exponential(size=(count, 1)).astype(np.float32) * dictionary[chosen]
                file.write(x.astype("<f4").tobytes())


class Memory:
    """The most memory of the card in use while something runs, in MiB, as nvidia-smi tells it."""

    def __enter__(self):
        self.most, self.stop = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.stop.wait(0.5):
            try:
                used = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split()
                self.most = max([self.most, *map(int, used)])
            except (OSError, ValueError, subprocess.TimeoutExpired):
                return

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


def train(title, out, steps, *more):
    """Trains a JumpReLU autoencoder; its metrics, or nothing."""
    where = ["--store", args.store] if args.store else ["--vectors", args.vectors]
    where += ["--tap", args.tap] if args.tap else []
    command = [args.program, "train", *where, "--out", out, "--device", args.device, "--width", args.train_width]
    command += ["--batch", args.batch, "--steps", steps, "--target-l0", 64, *more]
    with Memory() as memory:
        run(title, command)
    try:
        metrics = json.loads((pathlib.Path(out) / "run.json").read_text())["metrics"]
    except (OSError, ValueError, KeyError):
        return None
    return metrics, memory.most


def ratios(ours, theirs, note):
    """Our milliseconds a step beside the others', at the widths that both have."""
    mine = {int(width): float(ms) for width, ms in re.findall(r"^ *(\d+) +[\d.]+ +([\d.]+)", ours, re.M)}
    lines = []
    for name, width, ms in re.findall(r"^(\S+) +(\d+) +([\d.]+) ms", theirs, re.M):
        if int(width) in mine:
            lines.append(f"ratio step-{name.lower()}{note}-{width} {float(ms) / mine[int(width)]:.2f}")
    if lines:
        write(*lines, "")


write(f"# A card, measured {time.strftime('%Y-%m-%d')}", "")
run("What is there", [args.program, "doctor"])
run("Judged by the reference", [args.program, "selftest", "--device", args.device])
size = ["--d", args.d, "--batch", args.batch]
steps = run("Steps", [args.program, "bench", "cuda", "--device", args.device, *size, "--widths", args.widths])
routes = ["--routes", "32,128,512,2048", "--widths", args.route_widths]
run("Both routes of a step", [args.program, "bench", "cuda", "--device", args.device, *size, *routes])
bench = here / "bench_cuda.py"
for name, note, more in [
    ("The other libraries' steps", "", []),
    ("The other libraries' steps, bf16 autocast and compiled", "-compiled", ["--autocast", "--compile"]),
]:
    sizes = [*size, "--device", args.device, "--widths", args.peer_widths]
    ratios(steps, run(name, [args.peers, bench, *sizes, *more]), note)
for products in ["bf16", "bf16x3"]:
    command = [args.program, "bench", "cuda", "--device", args.device, *size, "--widths", args.peer_widths]
    run(f"Steps with products of {products}", [*command, "--products", products])

with tempfile.TemporaryDirectory() as folder:
    if not args.store and not args.vectors:
        args.vectors = f"{folder}/vectors.safetensors"
        made_up(args.vectors)
        write(f"Vectors: made up, sums of 32 of 32,768 directions, d = {args.d}.", "")
    table = []
    for products in ["f32", "tf32", "bf16x3", "bf16"]:
        found = train(f"Trained with {products}", f"{folder}/{products}", args.steps, "--set", f"products={products}")
        if found:
            metrics, memory = found
            row = [metrics["held_out_l0"] or metrics["l0"], metrics["held_out_fvu"] or metrics["fvu"]]
            table.append(f"| {products} | {row[0]:.2f} | {row[1]:.5f} | {metrics['tokens_per_s']:.0f} | {memory} |")
    head = ["| products | L0 | FVU | vectors/s | most memory, MiB |", "|---|---:|---:|---:|---:|"]
    write("## What the precision of products does", "", *head, *table, "")
    if args.long_steps:
        found = train("A longer run", f"{folder}/long", args.long_steps)
        if found:
            write("```json", json.dumps(found[0], indent=2), "```", f"Most memory: {found[1]} MiB.", "")
