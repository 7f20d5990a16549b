"""Weight files of other programs, written by their own code, with the features and reconstructions it computes.

    python make_peer_golden.py [dictionary_learning] [sparsify] [openmoss] [openai] [mlsae]

writes `peers/NAME/` beside itself: the files of the format and `expected.safetensors` with `x`, `features` (dense, in the
units the reader promises) and `reconstruction`. Written with torch 2.15.0 (CPU), dictionary-learning 0.1.0, eai-sparsify
1.3.3 and llamascopium 2.0.0b34. OpenAI's and mlsae's code is not on a package index: those two folders are written here from
the formulas in their model files. Rows in which a decision is closer than 1e-3 to its boundary are replaced.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "peers"
D, N, ROWS, K = 10, 26, 8, 5


class Stub(types.ModuleType):
    """Stands for packages that the peers import and that weights do not need."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__class_getitem__": classmethod(lambda cls, _: cls), "__init__": lambda self, *_, **__: None})


class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder asked: packages that weights do not need become stubs where they are not installed."""

    NAMES = set(["natsort", "nnsight", "schedulefree"])

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.NAMES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def fill(tensors, generator):
    """Random values: trained ones are not on hand, and fresh ones have zero biases and tied weights."""
    for name, tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() == 2:
            value = noise / D**0.5
        elif "threshold" in name and "log" not in name:
            value = noise.abs() * 0.3
        else:
            value = noise * 0.3
        tensor.data.copy_(value.to(tensor.dtype))


def rows(margin, generator):
    out = []
    while len(out) < ROWS:
        x = torch.randn(1, D, generator=generator)
        if margin(x).min() > 1e-3:
            out.append(x)
    return torch.cat(out)


def topk_margin(z, k=K):
    ranked = z.sort(dim=-1, descending=True).values
    return torch.minimum(z.abs().min(-1).values, ranked[:, k - 1] - ranked[:, k])


def expected(folder, x, features, reconstruction):
    save_file({"x": x, "features": features.contiguous().float(), "reconstruction": reconstruction.contiguous().float()},
              folder / "expected.safetensors")
    print(folder.name, "L0", (features > 0).sum(1).tolist())


def folder(name):
    path = HERE / name
    path.mkdir(parents=True, exist_ok=True)
    return path


@torch.no_grad()
def dictionary_learning():
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    makes = {
        "AutoEncoder": lambda: classes.AutoEncoder(D, N),
        "AutoEncoderNew": lambda: classes.AutoEncoderNew(D, N),
        "GatedAutoEncoder": lambda: classes.GatedAutoEncoder(D, N),
        "JumpReluAutoEncoder": lambda: classes.JumpReluAutoEncoder(D, N),
        "AutoEncoderTopK": lambda: AutoEncoderTopK(D, N, K),
        "BatchTopKSAE": lambda: BatchTopKSAE(D, N, K),
        "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D, N, K, [6, 8, 12]),
    }
    for seed, (name, make) in enumerate(makes.items()):
        generator = torch.Generator().manual_seed(100 + seed)
        ae = make()
        fill(ae.named_parameters(), generator)
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            ae.threshold.fill_(0.37)

        def margin(x):
            if name == "GatedAutoEncoder":
                z = ae.encoder(x - ae.decoder_bias)
                return torch.minimum((z + ae.gate_bias).abs(), (ae.r_mag.exp() * z + ae.mag_bias).abs())
            if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
                z = (x if name[0] == "J" else x - ae.b_dec) @ ae.W_enc + ae.b_enc
                return torch.minimum(z.abs(), (z - ae.threshold).abs())
            shift = {"AutoEncoder": lambda: ae.bias, "AutoEncoderNew": lambda: 0}.get(name, lambda: ae.b_dec)()
            z = ae.encoder(x - shift)
            if name == "AutoEncoderTopK":
                return topk_margin(z)
            return torch.minimum(z.abs(), (z - getattr(ae, "threshold", 0)).abs())

        x = rows(margin, generator)
        path = folder(f"dictionary_learning_{name}")
        torch.save(ae.state_dict(), path / "ae.pt")
        dict_class = f"<class 'dictionary_learning.dictionary.{name}'>" if name == "AutoEncoder" else name
        config = {"trainer": {"trainer_class": "Trainer", "dict_class": dict_class, "activation_dim": D, "dict_size": N,
                              "lr": 1e-4, "steps": 100, "seed": seed, "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped",
                              "submodule_name": "resid_post_layer_3", "k": K},
                  "buffer": {"d_submodule": D, "io": "out", "n_ctxs": 10, "ctx_len": 128, "device": "cpu"}}
        (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        features = ae.encode(x)
        expected(path, x, features, ae.decode(features))


@torch.no_grad()
def sparsify():
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    for seed, (name, transcode) in enumerate({"sparsify": False, "sparsify_transcode": True}.items()):
        generator = torch.Generator().manual_seed(200 + seed)
        coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, transcode=transcode))
        fill(coder.named_parameters(), generator)
        z = lambda x: coder.encoder(x if transcode else x - coder.b_dec)
        x = rows(lambda x: topk_margin(z(x)), generator)
        path = folder(name) / "layers.3"
        coder.save_to_disk(path)
        acts, indices, _ = coder.encode(x)
        features = torch.zeros(ROWS, N).scatter_(1, indices, acts)
        expected(path.parent, x, features, coder.decode(acts, indices))


@torch.no_grad()
def openmoss():
    # Past the package's own start, which loads its analysis tools.
    where = importlib.util.find_spec("llamascopium").submodule_search_locations
    package = types.ModuleType("llamascopium")
    package.__path__ = list(where)
    sys.modules["llamascopium"] = package
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    hook = "blocks.3.hook_resid_post"
    cases = {
        "openmoss_jumprelu": dict(act_fn="jumprelu", norm_activation="dataset-wise"),
        "openmoss_plain": dict(act_fn="jumprelu", norm_activation="inference", sparsity_include_decoder_norm=False),
        "openmoss_relu": dict(act_fn="relu", norm_activation="inference", use_decoder_bias=False),
        "openmoss_topk": dict(act_fn="topk", top_k=K, norm_activation="dataset-wise"),
    }
    for seed, (name, options) in enumerate(cases.items()):
        generator = torch.Generator().manual_seed(300 + seed)
        cfg = SAEConfig(d_model=D, expansion_factor=N / D, hook_point_in=hook, hook_point_out=hook, device="cpu",
                        dtype=torch.float32, **options)
        sae = SparseAutoEncoder(cfg)
        fill(sae.named_parameters(), generator)
        if options["act_fn"] == "jumprelu":
            sae.activation_function.log_jumprelu_threshold.data.sub_(1.0)
        if options["norm_activation"] == "dataset-wise":
            sae.set_dataset_average_activation_norm({hook: 5.0})
        scale = D**0.5 / 5.0 if options["norm_activation"] == "dataset-wise" else 1.0

        def margin(x):
            z = x * scale @ sae.W_E + sae.b_E
            if cfg.sparsity_include_decoder_norm:
                z = z * sae.decoder_norm()
            if options["act_fn"] == "topk":
                # Its top-k keeps negative values; rows are taken in which there are none.
                return torch.minimum(topk_margin(z), z.sort(dim=-1, descending=True).values[:, K - 1])
            threshold = sae.activation_function.log_jumprelu_threshold.exp() if options["act_fn"] == "jumprelu" else 0
            return torch.minimum(z.abs(), (z - threshold).abs())

        x = rows(margin, generator)
        path = folder(name)
        sae.save_checkpoint(path / "sae_weights.safetensors")
        sae.cfg.save_hyperparameters(path)
        acts = sae.encode(x * scale)
        # Features in the scale of the activations; those of top-k ranked by decoder norms times these norms.
        features = acts / scale
        if options["act_fn"] == "topk":
            features = features * sae.decoder_norm()
        expected(path, x, features, sae.decode(acts) / scale)


@torch.no_grad()
def openai():
    generator = torch.Generator().manual_seed(400)
    state = {"pre_bias": torch.zeros(D), "latent_bias": torch.zeros(N),
             "stats_last_nonzero": torch.zeros(N, dtype=torch.long), "latents_activation_frequency": torch.ones(N),
             "latents_mean_square": torch.zeros(N), "encoder.weight": torch.zeros(N, D), "decoder.weight": torch.zeros(D, N)}
    fill([(k, v) for k, v in state.items() if k.endswith("weight") or k.endswith("_bias")], generator)
    z = lambda x: (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    x = rows(lambda x: z(x).abs(), generator)
    state["activation"], state["activation_state_dict"] = "ReLU", torch.nn.ReLU().state_dict()
    path = folder("openai")
    torch.save(state, path / "3.pt")
    features = z(x).relu()
    expected(path, x, features, features @ state["decoder.weight"].T + state["pre_bias"])


@torch.no_grad()
def mlsae():
    generator = torch.Generator().manual_seed(500)
    state = {"encoder.weight": torch.zeros(N, D), "decoder.weight": torch.zeros(D, N), "pre_encoder_bias": torch.zeros(D)}
    fill(state.items(), generator)
    z = lambda x: (x - state["pre_encoder_bias"]) @ state["encoder.weight"].T
    x = rows(lambda x: topk_margin(z(x)), generator)
    path = folder("mlsae")
    save_file(state, path / "model.safetensors")
    config = {"layers": [0, 1, 2], "n_inputs": D, "n_latents": N, "k": K, "auxk": 256, "dead_steps_threshold": 76,
              "dead_threshold": 0.001, "standardize": False, "lens": False}
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    top = z(x).topk(K)
    features = torch.zeros(ROWS, N).scatter_(1, top.indices, top.values.relu())
    expected(path, x, features, features @ state["decoder.weight"].T + state["pre_encoder_bias"])


if __name__ == "__main__":
    sys.meta_path.append(Missing())
    for name in sys.argv[1:] or ["dictionary_learning", "sparsify", "openmoss", "openai", "mlsae"]:
        globals()[name]()
