"""Random blocks of every quantised number format, and their values by the gguf package's own NumPy code.

    python make_gguf_blocks.py        # writes gguf_blocks.safetensors beside this file

For each format F: `F.bytes` (uint8) and `F.values` (float32). The package's version is in the metadata.
"""

import importlib.metadata
import pathlib

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as Kind
from gguf.quants import dequantize
from safetensors.numpy import save_file

# Where the half-precision scales of a block lie, in bytes.
SCALES = {
    Kind.Q4_0: [0], Kind.Q4_1: [0, 2], Kind.Q5_0: [0], Kind.Q5_1: [0, 2], Kind.Q8_0: [0],
    Kind.Q2_K: [80, 82], Kind.Q3_K: [108], Kind.Q4_K: [0, 2], Kind.Q5_K: [0, 2], Kind.Q6_K: [208],
}

rng = np.random.default_rng(20261122)
tensors = {}
for kind, places in SCALES.items():
    values, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (512 // values, size), dtype=np.uint8)
    for place in places:
        scales = rng.normal(0, 0.05, len(blocks)).astype(np.float16)
        blocks[:, place:place + 2] = scales.view(np.uint8).reshape(-1, 2)
    tensors[f"{kind.name}.bytes"] = blocks.reshape(-1)
    tensors[f"{kind.name}.values"] = dequantize(blocks, kind).astype(np.float32).reshape(-1)
version = importlib.metadata.version("gguf")
save_file(tensors, pathlib.Path(__file__).parent / "gguf_blocks.safetensors",
          metadata={"gguf": version, "numpy": np.__version__})
