"""Weight files of other programs, written by their own code, with the features and reconstructions it computes.

    python make_peer_golden.py [dictionary_learning] [sparsify] [openmoss] [openai] [mlsae] [gemma_scope_2]

writes `peers/NAME/` beside itself: the files of the format and `expected.safetensors` with `x`, `features` (dense, in the
units the reader promises) and `reconstruction`. Written with torch 2.15.0 (CPU), dictionary-learning 0.1.0, eai-sparsify
1.3.3, llamascopium 2.0.0b34 and sae-lens 6.54.12, which loads and computes the Gemma Scope 2 folder. OpenAI's and mlsae's code
is not on a package index: their folders are written here from the formulas in their model files. Rows in which a decision is closer than 1e-3 to its boundary are replaced.
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


def uneven(rows_of_one_size):
    """Off centre and of many sizes, as vectors are that have to be scaled one by one."""
    n = rows_of_one_size.shape[0]
    size = torch.tensor([1.0, 12.0, 0.01, 3.0])[torch.arange(n) % 4]
    return (rows_of_one_size + torch.linspace(-2, 2, n)[:, None]) * size[:, None]


def standardised(x):
    mu = x.mean(dim=-1, keepdim=True)
    std = (x - mu).std(dim=-1, keepdim=True)
    return (x - mu) / (std + 1e-5), mu, std


def uneven_rows(margin, generator):
    while True:
        x = uneven(torch.randn(ROWS, D, generator=generator))
        if margin(x).min() > 1e-3:
            return x


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

    cases = {"sparsify": (False, False), "sparsify_transcode": (True, False), "sparsify_skip": (False, True),
             "sparsify_skip_transcode": (True, True)}
    for seed, (name, (transcode, skip)) in enumerate(cases.items()):
        generator = torch.Generator().manual_seed(200 + seed)
        coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, transcode=transcode, skip_connection=skip))
        fill(coder.named_parameters(), generator)
        z = lambda x: coder.encoder(x if transcode else x - coder.b_dec)
        x = rows(lambda x: topk_margin(z(x)), generator)
        path = folder(name) / "layers.3"
        coder.save_to_disk(path)
        acts, indices, _ = coder.encode(x)
        features = torch.zeros(ROWS, N).scatter_(1, indices, acts)
        # Its forward pass alone adds the skip connection.
        expected(path.parent, x, features, coder(x).sae_out if skip else coder.decode(acts, indices))


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
        "openmoss_tokenwise": dict(act_fn="jumprelu", norm_activation="token-wise"),
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

        token_wise = options["norm_activation"] == "token-wise"

        def margin(x):
            inputs = sae.normalize_activations({hook: x})[hook] if token_wise else x * scale
            z = inputs @ sae.W_E + sae.b_E
            if cfg.sparsity_include_decoder_norm:
                z = z * sae.decoder_norm()
            if options["act_fn"] == "topk":
                # Its top-k keeps negative values; rows are taken in which there are none.
                return torch.minimum(topk_margin(z), z.sort(dim=-1, descending=True).values[:, K - 1])
            threshold = sae.activation_function.log_jumprelu_threshold.exp() if options["act_fn"] == "jumprelu" else 0
            return torch.minimum(z.abs(), (z - threshold).abs())

        x = uneven_rows(margin, generator) if token_wise else rows(margin, generator)
        path = folder(name)
        sae.save_checkpoint(path / "sae_weights.safetensors")
        sae.cfg.save_hyperparameters(path)
        if token_wise:
            batch, factors = sae.normalize_activations({hook: x}, return_scale_factor=True)
            acts = sae.encode(batch[hook])
            back = sae.denormalize_activations({hook: sae.decode(acts)}, factors)
            expected(path, x, acts, back[hook])
            continue
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


    generator = torch.Generator().manual_seed(401)
    state["stats_last_nonzero"] += 3
    fill([(k, v) for k, v in state.items() if k.endswith("weight") or k.endswith("_bias")], generator)
    x = uneven_rows(lambda x: topk_margin(z(standardised(x)[0])), generator)
    state["activation"], state["activation_state_dict"] = "TopK", {"k": K, "postact_fn": "ReLU"}
    path = folder("openai_topk")
    torch.save(state, path / "3.pt")
    inputs, mu, std = standardised(x)
    top = z(inputs).topk(K)
    features = torch.zeros(ROWS, N).scatter_(1, top.indices, top.values.relu())
    expected(path, x, features, (features @ state["decoder.weight"].T + state["pre_bias"]) * std + mu)


@torch.no_grad()
def mlsae():
    mlsae_plain()
    for seed, (name, prefix) in enumerate({"mlsae_standardised": "", "mlsae_tfm": "autoencoder."}.items()):
        generator = torch.Generator().manual_seed(501 + seed)
        n = 2 * D if prefix else N
        state = {"encoder.weight": torch.zeros(n, D), "decoder.weight": torch.zeros(D, n), "pre_encoder_bias": torch.zeros(D)}
        fill(state.items(), generator)
        z = lambda x: (standardised(x)[0] - state["pre_encoder_bias"]) @ state["encoder.weight"].T
        x = uneven_rows(lambda x: topk_margin(z(x)), generator)
        path = folder(name)
        tensors = {prefix + key: value for key, value in state.items()}
        if prefix:
            tensors["transformer.model.gpt_neox.embed_in.weight"] = torch.zeros(3, D)
            config = {"model_name": "EleutherAI/pythia-70m-deduped", "layers": [0, 1, 2], "expansion_factor": 2, "k": K,
                      "auxk": 256, "auxk_coef": 1 / 32, "dead_tokens_threshold": 10_000_000, "dead_threshold": 0.001, "lr": 1e-4,
                      "standardize": True, "skip_special_tokens": True, "max_length": 2048, "batch_size": 1,
                      "accumulate_grad_batches": 64, "tuned_lens": False}
        else:
            config = {"layers": [3], "n_inputs": D, "n_latents": n, "k": K, "auxk": 256, "dead_steps_threshold": 76,
                      "dead_threshold": 0.001, "standardize": True, "lens": False}
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        top = z(x).topk(K)
        features = torch.zeros(ROWS, n).scatter_(1, top.indices, top.values.relu())
        _, mu, std = standardised(x)
        expected(path, x, features, (features @ state["decoder.weight"].T + state["pre_encoder_bias"]) * std + mu)


@torch.no_grad()
def gemma_scope_2():
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.registry import get_sae_class

    for seed, (where, name, width, skip) in enumerate([
        ("gemma_scope_2_affine", "transcoder_all/layer_3_width_16k_l0_small_affine", D + 3, True),
        ("gemma_scope_2_resid", "resid_post/layer_3_width_16k_l0_small", D, False),
    ]):
        generator = torch.Generator().manual_seed(600 + seed)
        state = {"w_enc": torch.zeros(D, N), "w_dec": torch.zeros(N, width), "b_enc": torch.zeros(N), "b_dec": torch.zeros(width),
                 "threshold": torch.zeros(N)}
        module = "model.layers.3.output"
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "width": N, "l0": 15, "type": "sae",
                  "hf_hook_point_in": module, "hf_hook_point_out": module}
        if skip:
            state["affine_skip_connection"] = torch.zeros(D, width)
            config |= {"type": "transcoder", "affine_connection": True,
                       "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
                       "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output"}
        fill(state.items(), generator)
        path = folder(where)
        save_file(state, path / "params.safetensors")
        (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        # SAELens downloads from the hub; here the hub is this folder.
        loaders.hf_hub_download = lambda *args, filename=None, **_: str(path / (filename or args[1]).split("/")[-1])
        loaders.get_safetensors_tensor_shapes = lambda *_: {key: list(value.shape) for key, value in state.items()}
        cfg, weights, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-1b-pt", name)
        sae_class, config_class = get_sae_class(cfg["architecture"])
        sae = sae_class(config_class.from_dict(cfg))
        sae.load_state_dict(weights)

        def margin(x):
            z = x @ sae.W_enc + sae.b_enc
            return torch.minimum(z.abs(), (z - sae.threshold).abs())

        x = rows(margin, generator)
        expected(path, x, sae.encode(x), sae(x))


@torch.no_grad()
def mlsae_plain():
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
    for name in sys.argv[1:] or ["dictionary_learning", "sparsify", "openmoss", "openai", "mlsae", "gemma_scope_2"]:
        globals()[name]()
