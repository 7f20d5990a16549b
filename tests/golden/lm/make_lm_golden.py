"""Tiny random checkpoints of every family and what transformers computes on them (nanoGPT: what nanogpt.py computes).

    python make_lm_golden.py [OUT_DIR]            # writes the folders the tests read
    python make_lm_golden.py --sweep N OUT_DIR    # N further random shapes, for checking by hand

Each folder: config.json, model.safetensors (or shards with an index) and expected.safetensors with input_ids,
embed.0, resid.L, mlp.L, attn.L, mlp_in.L, logits and nll, in float32 with eager attention. Versions and seed are in
the metadata of expected.safetensors.
"""

import argparse
import json
import pathlib
import random
import shutil
from types import SimpleNamespace

import torch
import transformers
from nanogpt import NanoGpt
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM, Gemma2Config, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, GPT2Config,
    GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Where the family keeps what is tapped: (body, blocks, attention's output projection, norm before the MLP, what is
# added to the residual stream).
LLAMA_PLACES = ("model", "layers", "self_attn.o_proj", "post_attention_layernorm", "mlp")
GEMMA_PLACES = ("model", "layers", "self_attn.o_proj", "pre_feedforward_layernorm", "post_feedforward_layernorm")
GPT2_PLACES = ("transformer", "h", "attn.c_proj", "ln_2", "mlp")
PLACES = {
    "gemma2": GEMMA_PLACES, "gemma3_text": GEMMA_PLACES, "gemma3": ("model.language_model", *GEMMA_PLACES[1:]),
    "llama": LLAMA_PLACES, "mistral": LLAMA_PLACES, "qwen2": LLAMA_PLACES, "qwen3": LLAMA_PLACES,
    "gpt2": GPT2_PLACES, "nanogpt": GPT2_PLACES,
    "gpt_neox": ("gpt_neox", "layers", "attention.dense", "post_attention_layernorm", "mlp"),
}


def drop(fields, *names):
    for name in names:
        fields.pop(name, None)


def classic_llama(fields):
    fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
    drop(fields, "head_dim", "num_key_value_heads")


def classic_gemma3(fields):
    rope = fields.pop("rope_parameters")
    full = rope["full_attention"]
    fields["rope_theta"], fields["rope_local_base_freq"] = full.pop("rope_theta"), rope["sliding_attention"]["rope_theta"]
    fields["rope_scaling"], fields["sliding_window_pattern"] = full, 3
    drop(fields, "layer_types", "attn_logit_softcapping", "attention_bias")


def classic_neox(fields):
    rope = fields.pop("rope_parameters")
    fields["rotary_emb_base"], fields["rotary_pct"] = rope["rope_theta"], rope["partial_rotary_factor"]
    drop(fields, "attention_bias", "use_parallel_residual")


def compiled(tensors):
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def gemma3(**changes):
    settings = dict(
        vocab_size=96, hidden_size=24, intermediate_size=36, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=6, sliding_window=5, max_position_embeddings=64,
        rms_norm_eps=1e-5, layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
        },
    )
    return settings | changes


def nanogpt(**settings):
    return SimpleNamespace(model_type="nanogpt", **settings)


CASES = {
    # Window shorter than the text, soft-caps that bite, 4 query heads on 2 key heads, heads·head_dim ≠ d_model,
    # 27B's query scale (d_model / heads, not head_dim), stored in bf16 and in two shards.
    "gemma2": dict(
        config=Gemma2Config(
            vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=6, sliding_window=7,
            attn_logit_softcapping=1.5, final_logit_softcapping=2.0, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 300.0}, rms_norm_eps=1e-5,
        ),
        batch=2, seq=29, dtype=torch.bfloat16, shards=2,
    ),
    # Untied head, llama3 frequencies, biases everywhere, one key head for three query heads.
    "llama": dict(
        config=LlamaConfig(
            vocab_size=101, hidden_size=24, intermediate_size=56, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
            max_position_embeddings=128, rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5,
        ),
        batch=2, seq=33,
    ),
    # Llama 2's layout: a key head for each query head, neither that nor head_dim in the file, rope_theta at the top
    # level; tied head, f16.
    "llama-classic": dict(
        config=LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0},
        ),
        batch=3, seq=17, dtype=torch.float16, edit=classic_llama,
    ),
    # Normalised query and key heads, a global layer between sliding ones, two rotary bases of which the global one is
    # stretched; the classic layout with its pattern as a number.
    "gemma3": dict(config=Gemma3TextConfig(**gemma3(final_logit_softcapping=3.0)), batch=2, seq=23, dtype=torch.bfloat16, edit=classic_gemma3),
    # The newer layout, nested in a model with an image encoder; biases, 3 heads on 1.
    "gemma3-images": dict(
        config=Gemma3Config(
            text_config=Gemma3TextConfig(**gemma3(
                num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], num_attention_heads=3,
                num_key_value_heads=1, attention_bias=True,
            )).to_dict(),
            vision_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                               image_size=8, patch_size=4),
            mm_tokens_per_image=4,
        ),
        batch=2, seq=19, dtype=torch.bfloat16,
    ),
    # Parallel residual, a quarter of each head turned, biases, exact GELU, untied; the classic layout and its defaults.
    "pythia": dict(
        config=GPTNeoXConfig(
            vocab_size=90, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.25},
        ),
        batch=2, seq=21, dtype=torch.float16, edit=classic_neox,
    ),
    # One after the other, three quarters turned and stretched, no biases in attention, another activation, tied.
    "neox-serial": dict(
        config=GPTNeoXConfig(
            vocab_size=70, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new",
            tie_word_embeddings=True, layer_norm_eps=1e-3, rope_parameters={
                "rope_type": "linear", "factor": 3.0, "rope_theta": 50.0, "partial_rotary_factor": 0.75},
        ),
        batch=2, seq=19,
    ),
    # Attention scaled by layer, an inner width of its own; a text as long as the positions.
    "gpt2": dict(
        config=GPT2Config(
            vocab_size=83, n_positions=20, n_embd=24, n_layer=3, n_head=4, n_inner=50,
            scale_attn_by_inverse_layer_idx=True,
        ),
        batch=2, seq=20,
    ),
    # nanoGPT without biases, tied, both names of the one table in the file.
    "nanogpt": dict(
        config=nanogpt(vocab_size=61, block_size=24, n_embd=24, n_layer=3, n_head=3, bias=False,
                       tie_word_embeddings=True),
        batch=2, seq=22,
    ),
    # With biases, untied, saved from a compiled model.
    "nanogpt-untied": dict(
        config=nanogpt(vocab_size=32, block_size=16, n_embd=24, n_layer=2, n_head=4, bias=True,
                       tie_word_embeddings=False),
        batch=2, seq=11, names=compiled,
    ),
    # A window on every layer.
    "mistral": dict(
        config=MistralConfig(
            vocab_size=59, hidden_size=24, intermediate_size=30, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=6, max_position_embeddings=64,
        ),
        batch=2, seq=17,
    ),
    # Biases on queries, keys and values alone; the later layers slide.
    "qwen2": dict(
        config=Qwen2Config(
            vocab_size=59, hidden_size=24, intermediate_size=30, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1,
            max_position_embeddings=64,
        ),
        batch=2, seq=17,
    ),
    # Plain gains on query and key heads.
    "qwen3": dict(
        config=Qwen3Config(
            vocab_size=59, hidden_size=24, intermediate_size=30, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=14, max_position_embeddings=64, tie_word_embeddings=True,
        ),
        batch=2, seq=17,
    ),
}


def new_model(config):
    if config.model_type == "nanogpt":
        return NanoGpt(config).float().eval()
    config._attn_implementation = "eager"
    if config.model_type == "gemma3":
        return Gemma3ForConditionalGeneration(config).float().eval()
    return AutoModelForCausalLM.from_config(config).float().eval()


def random_model(config, dtype, spread):
    model = new_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if any(word in name for word in ("norm", "ln_")) and name.endswith("weight"):
                noise = 0.3 * noise + (0.0 if config.model_type.startswith("gemma") else 1.0)
            else:
                noise = spread * noise
            # Values that the stored type holds exactly, so that both programs start from the same weights.
            p.copy_(noise.to(dtype).float())
    if config.model_type != "nanogpt":
        model.tie_weights()
    return model


def without_gain(norm, x):
    """What the norm makes of x before its gain and bias."""
    if hasattr(norm, "eps") and isinstance(norm, torch.nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    if type(norm).__module__ == "nanogpt":
        return F.layer_norm(x, x.shape[-1:], eps=1e-5)
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def expected(model, ids):
    values, handles = {}, []
    keep = lambda name, x: values.__setitem__(name, x.detach().clone().contiguous())
    body, blocks, out, pre_mlp, added = PLACES[model.config.model_type]
    layers = getattr(model.get_submodule(body), blocks)
    # Pre-hook of the first block: what enters it.
    handles.append(layers[0].register_forward_pre_hook(lambda m, a: keep("embed.0", a[0])))
    for i, layer in enumerate(layers):
        hook = layer.get_submodule(added).register_forward_hook(lambda m, a, out, i=i: keep(f"mlp.{i}", out))
        handles.append(hook)
        hook = layer.get_submodule(out).register_forward_pre_hook(lambda m, a, i=i: keep(f"attn.{i}", a[0]))
        handles.append(hook)
        hook = layer.get_submodule(pre_mlp).register_forward_pre_hook(
            lambda m, a, i=i: keep(f"mlp_in.{i}", without_gain(m, a[0])))
        handles.append(hook)
        handles.append(layer.register_forward_hook(
            lambda m, a, out, i=i: keep(f"resid.{i}", out[0] if isinstance(out, tuple) else out)))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    for handle in handles:
        handle.remove()
    log_p = torch.log_softmax(logits.double(), -1)
    nll = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].float()
    return {"input_ids": ids, "logits": logits.contiguous(), "nll": nll.contiguous(), **values}


def fields_of(config, case):
    fields = dict(vars(config)) if config.model_type == "nanogpt" else config.to_dict()
    case.get("edit", lambda fields: None)(fields)
    fields = {k: v for k, v in fields.items() if not k.startswith("_")}
    if config.model_type != "nanogpt":
        fields["dtype"] = str(case["dtype"]).removeprefix("torch.")
    return fields


def write(folder, model, case, seed):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = model.config
    text = getattr(config, "text_config", config)
    ids = torch.randint(0, text.vocab_size, (case["batch"], case["seq"]), dtype=torch.int64)
    values = expected(model, ids)
    tied = config.model_type != "nanogpt" and config.tie_word_embeddings
    saved = {k: v.to(case["dtype"]).clone() for k, v in model.state_dict().items()
             if not (tied and k in ("lm_head.weight", "embed_out.weight"))}
    saved = case.get("names", lambda saved: saved)(saved)
    if case["shards"] == 1:
        save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names, weight_map = sorted(saved), {}
        for s in range(case["shards"]):
            file = f"model-{s + 1:05d}-of-{case['shards']:05d}.safetensors"
            part = {k: saved[k] for k in names[s::case["shards"]]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= {k: file for k in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps(fields_of(config, case), indent=1, sort_keys=True) + "\n")
    meta = {"seed": str(seed), "torch": torch.__version__, "transformers": transformers.__version__,
            "attention": "eager", "dtype": "float32"}
    save_file(values, folder / "expected.safetensors", metadata=meta)
    # The files must mean to transformers what the model in memory means.
    if config.model_type != "nanogpt":
        again = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        again_values = expected(again, ids)
        for name, value in values.items():
            assert torch.allclose(again_values[name].float(), value.float(), rtol=1e-6, atol=1e-6), (folder, name)


def sweep_config(rng, family):
    n_heads, n_kv = rng.choice([(4, 2), (6, 3), (5, 1), (4, 4), (9, 3), (8, 2)])
    n_layers, hidden = rng.randint(1, 5), n_heads * rng.choice([4, 6, 8])
    common = dict(vocab_size=rng.randint(50, 400), tie_word_embeddings=rng.random() < 0.5)
    theta, head_dim = rng.choice([100.0, 10000.0, 500000.0]), rng.choice([6, 14, 18, 32, 64])
    types = [rng.choice(["sliding_attention", "full_attention"]) for _ in range(n_layers)]
    linear = {"rope_type": "linear", "factor": 2.5, "rope_theta": theta}
    plain = {"rope_type": "default", "rope_theta": theta}
    act = rng.choice(["silu", "gelu", "gelu_pytorch_tanh", "relu"])
    if family == "nanogpt":
        return nanogpt(**common, block_size=rng.choice([60, 300]), n_embd=hidden, n_layer=n_layers, n_head=n_heads,
                       bias=rng.random() < 0.5)
    if family == "gpt2":
        return GPT2Config(**common, n_positions=300, n_embd=hidden, n_layer=n_layers, n_head=n_heads,
                          n_inner=rng.choice([None, 50]), scale_attn_weights=rng.random() < 0.5,
                          scale_attn_by_inverse_layer_idx=rng.random() < 0.5,
                          reorder_and_upcast_attn=rng.random() < 0.5,
                          activation_function=rng.choice(["gelu_new", "relu", "gelu"]))
    common |= dict(hidden_size=hidden, intermediate_size=rng.randint(20, 150), num_hidden_layers=n_layers,
                   num_attention_heads=n_heads, max_position_embeddings=512)
    if family == "gpt_neox":
        share = rng.choice([0.25, 0.5, 1.0])
        return GPTNeoXConfig(**common, use_parallel_residual=rng.random() < 0.5, attention_bias=rng.random() < 0.5,
                             hidden_act=rng.choice(["gelu", "gelu_new", "relu"]),
                             rope_parameters={**rng.choice([linear, plain]), "partial_rotary_factor": share})
    common |= dict(num_key_value_heads=n_kv, rms_norm_eps=rng.choice([1e-5, 1e-6]))
    if family == "gemma3_text":
        rope = {"full_attention": dict(rng.choice([linear, plain])),
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0}}
        return Gemma3TextConfig(**common, head_dim=head_dim, rope_parameters=rng.choice([None, rope]),
                                query_pre_attn_scalar=rng.randint(1, 80), sliding_window=rng.randint(1, 60),
                                layer_types=rng.choice([None, types]), attention_bias=rng.random() < 0.5)
    if family == "gemma2":
        return Gemma2Config(**common, head_dim=head_dim, rope_parameters=rng.choice([linear, plain]),
                            query_pre_attn_scalar=rng.randint(1, 80), sliding_window=rng.randint(1, 60),
                            layer_types=rng.choice([None, types]), attention_bias=rng.random() < 0.5,
                            attn_logit_softcapping=rng.choice([None, 0.8, 50.0]),
                            final_logit_softcapping=rng.choice([None, 1.2, 30.0]))
    if family == "llama":
        llama3 = {**LLAMA3_ROPE, "rope_theta": theta}
        return LlamaConfig(**common, head_dim=rng.choice([None, head_dim]), mlp_bias=rng.random() < 0.5,
                           attention_bias=rng.random() < 0.5, rope_parameters=rng.choice([linear, plain, llama3]),
                           hidden_act=act)
    window = rng.randint(1, 60)
    if family == "mistral":
        return MistralConfig(**common, head_dim=rng.choice([None, head_dim]), rope_parameters=plain,
                             sliding_window=rng.choice([None, window]))
    cls = Qwen2Config if family == "qwen2" else Qwen3Config
    extra = {} if family == "qwen2" else dict(head_dim=head_dim, attention_bias=rng.random() < 0.5)
    return cls(**common, **extra, rope_parameters=plain, use_sliding_window=rng.random() < 0.5, sliding_window=window,
               max_window_layers=rng.randint(1, 3))


# Fields that may be left out of a file when they hold what the configuration classes default to.
OPTIONAL = ("head_dim", "rope_parameters", "layer_types", "attention_bias", "mlp_bias", "tie_word_embeddings", "n_inner",
            "hidden_activation", "attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual",
            "hidden_act", "layer_norm_eps", "rms_norm_eps", "scale_attn_weights", "activation_function",
            "num_key_value_heads", "use_sliding_window", "bias")


def drop_defaults(rng):
    """An edit that leaves out half of the fields whose value the family's class would fill in."""
    chosen = [name for name in OPTIONAL if rng.random() < 0.5]

    def edit(fields):
        if fields["model_type"] == "nanogpt":
            return
        kept = {k: v for k, v in fields.items() if k not in OPTIONAL}
        for name in chosen:
            if name in fields:
                defaults = transformers.AutoConfig.for_model(**kept).to_dict()
                if defaults.get(name) == fields[name]:
                    del fields[name]

    return edit


def sweep_case(rng, i):
    families = ["gemma3_text", "gpt_neox", "gpt2", "nanogpt", "llama", "gemma2", "mistral", "qwen2", "qwen3"]
    config = sweep_config(rng, families[i % len(families)])
    longest = min(getattr(config, "block_size", 300), 300)
    return dict(config=config, batch=rng.randint(1, 3), seq=min(rng.choice([1, 5, 40, 150, 300]), longest),
                dtype=rng.choice([torch.float32, torch.bfloat16, torch.float16]), shards=rng.randint(1, 3),
                spread=rng.choice([0.02, 0.1, 0.25]), edit=drop_defaults(rng))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", default=pathlib.Path(__file__).parent, type=pathlib.Path)
    parser.add_argument("--sweep", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(20240808)
    cases = {f"sweep-{i}": sweep_case(rng, i) for i in range(args.sweep)} if args.sweep else CASES
    for seed, (name, case) in enumerate(cases.items()):
        case = dict(dtype=torch.float32, shards=1, spread=0.25) | case
        torch.manual_seed(seed)
        write(args.out / name, random_model(case["config"], case["dtype"], case["spread"]), case, seed)
        print(name, sum(f.stat().st_size for f in (args.out / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()
