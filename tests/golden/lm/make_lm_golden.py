"""Tiny random Gemma 2 and Llama checkpoints and what transformers computes on them.

    python make_lm_golden.py [OUT_DIR]            # writes the folders the tests read
    python make_lm_golden.py --sweep N OUT_DIR    # N further random shapes, for checking by hand

Each folder: config.json, model.safetensors (or shards with an index) and expected.safetensors with input_ids,
embed.0, resid.L, mlp.L, attn.L, logits and nll, in float32 with eager attention. Versions and seed are in the
metadata of expected.safetensors.
"""

import argparse
import json
import pathlib
import random
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES = {
    # Window shorter than the text, soft-caps that bite, 4 query heads on 2 key heads, heads·head_dim ≠ d_model,
    # query scale ≠ 1/√head_dim, stored in bf16 and in two shards.
    "gemma2": dict(
        config=Gemma2Config(
            vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=10, query_pre_attn_scalar=3, sliding_window=7,
            attn_logit_softcapping=1.5, final_logit_softcapping=2.0, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 300.0}, rms_norm_eps=1e-5,
        ),
        batch=2, seq=29, dtype=torch.bfloat16, shards=2, spread=0.25,
    ),
    # Untied head, llama3 frequencies, biases everywhere, one key head for three query heads.
    "llama": dict(
        config=LlamaConfig(
            vocab_size=101, hidden_size=24, intermediate_size=56, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, head_dim=12, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
            max_position_embeddings=128, rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5,
        ),
        batch=2, seq=33, dtype=torch.float32, shards=1, spread=0.25,
    ),
    # The classic layout: tied head, no head_dim in the file, rope_theta at the top level, f16.
    "llama-classic": dict(
        config=LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0},
        ),
        batch=3, seq=17, dtype=torch.float16, shards=1, spread=0.25, classic=True,
    ),
}


def random_model(config, dtype, spread):
    cls = Gemma2ForCausalLM if config.model_type == "gemma2" else LlamaForCausalLM
    config._attn_implementation = "eager"
    model = cls(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if "norm" in name:
                noise = 0.3 * noise + (0.0 if config.model_type == "gemma2" else 1.0)
            else:
                noise = spread * noise
            # Values that the stored type holds exactly, so that both programs start from the same weights.
            p.copy_(noise.to(dtype).float())
    model.tie_weights()
    return model


def expected(model, ids):
    values, handles = {}, []
    keep = lambda name, x: values.__setitem__(name, x.detach().clone().contiguous())
    base = model.model
    # Pre-hook of the first block: the scaled embedding.
    handles.append(base.layers[0].register_forward_pre_hook(lambda m, a: keep("embed.0", a[0])))
    for i, layer in enumerate(base.layers):
        added = layer.post_feedforward_layernorm if model.config.model_type == "gemma2" else layer.mlp
        handles.append(added.register_forward_hook(lambda m, a, out, i=i: keep(f"mlp.{i}", out)))
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, i=i: keep(f"attn.{i}", a[0])))
        handles.append(layer.register_forward_hook(
            lambda m, a, out, i=i: keep(f"resid.{i}", out[0] if isinstance(out, tuple) else out)))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    for handle in handles:
        handle.remove()
    log_p = torch.log_softmax(logits.double(), -1)
    nll = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].float()
    return {"input_ids": ids, "logits": logits.contiguous(), "nll": nll.contiguous(), **values}


def write(folder, model, case, seed):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = model.config
    ids = torch.randint(0, config.vocab_size, (case["batch"], case["seq"]), dtype=torch.int64)
    values = expected(model, ids)
    saved = {k: v.to(case["dtype"]).contiguous() for k, v in model.state_dict().items()
             if not (config.tie_word_embeddings and k == "lm_head.weight")}
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
    fields = config.to_dict()
    if case.get("classic"):
        fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        del fields["head_dim"]
    fields = {k: v for k, v in fields.items() if not k.startswith("_")}
    fields["dtype"] = str(case["dtype"]).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    meta = {"seed": str(seed), "torch": torch.__version__, "transformers": transformers.__version__,
            "attention": "eager", "dtype": "float32"}
    save_file(values, folder / "expected.safetensors", metadata=meta)
    # The files must mean to transformers what the model in memory means.
    again = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    again_values = expected(again, ids)
    for name, value in values.items():
        assert torch.allclose(again_values[name].float(), value.float(), rtol=1e-6, atol=1e-6), (folder, name)


def sweep_case(rng):
    heads_kv = rng.choice([(4, 2), (6, 3), (5, 1), (4, 4), (9, 3), (8, 2)])
    hidden = heads_kv[0] * rng.choice([4, 6, 8])
    common = dict(
        vocab_size=rng.randint(50, 400), hidden_size=hidden, intermediate_size=rng.randint(20, 150),
        num_hidden_layers=rng.randint(1, 5), num_attention_heads=heads_kv[0], num_key_value_heads=heads_kv[1],
        attention_bias=rng.random() < 0.5, tie_word_embeddings=rng.random() < 0.5,
        max_position_embeddings=512, rms_norm_eps=rng.choice([1e-5, 1e-6]),
    )
    theta = rng.choice([100.0, 10000.0, 500000.0])
    scaling = rng.choice([
        {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.5},
        {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
    ])
    rope = {"rope_theta": theta, **scaling}
    head_dim = rng.choice([6, 14, 18, 32, 64])
    if rng.random() < 0.5:
        n = common["num_hidden_layers"]
        types = rng.choice([None, [rng.choice(["sliding_attention", "full_attention"]) for _ in range(n)]])
        config = Gemma2Config(
            **common, head_dim=head_dim, rope_parameters=rope, query_pre_attn_scalar=rng.randint(1, 80),
            sliding_window=rng.randint(1, 60), layer_types=types, attn_logit_softcapping=rng.choice([None, 0.8, 50.0]),
            final_logit_softcapping=rng.choice([None, 1.2, 30.0]),
        )
    else:
        config = LlamaConfig(
            **common, head_dim=rng.choice([None, head_dim]), mlp_bias=rng.random() < 0.5, rope_parameters=rope,
            hidden_act=rng.choice(["silu", "silu", "gelu", "gelu_pytorch_tanh"]),
        )
    return dict(config=config, batch=rng.randint(1, 3), seq=rng.choice([1, 5, 40, 150, 300]),
                dtype=rng.choice([torch.float32, torch.bfloat16, torch.float16]), shards=rng.randint(1, 3),
                spread=rng.choice([0.02, 0.1, 0.25]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", default=pathlib.Path(__file__).parent, type=pathlib.Path)
    parser.add_argument("--sweep", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(20240808)
    cases = {f"sweep-{i}": sweep_case(rng) for i in range(args.sweep)} if args.sweep else CASES
    for seed, (name, case) in enumerate(cases.items()):
        torch.manual_seed(seed)
        write(args.out / name, random_model(case["config"], case["dtype"], case["spread"]), case, seed)
        print(name, sum(f.stat().st_size for f in (args.out / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()
