"""CTranslate2: int8 weights and activations.

It goes on from a cache only inside one generation. So decoding is a generation from a prompt of one token, as many
forward passes of one token as are asked for, and what it follows are its own tokens; logits come from one pass.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks.peers.base import Model, ModelForm
from benchmarks.peers.conversion import Weights

ENVIRONMENT = "shared"
PACKAGE = "ctranslate2"
MODELS = (ModelForm("ctranslate2 int8", 8, "int8", 8),)


class Model(Model):
    """See `benchmarks.peers.base.Model`."""

    def __init__(self, form: ModelForm, threads: int, work: Path, source: Path, context: int):
        import ctranslate2

        target = work / source.name
        if not (target / "model.bin").exists():
            convert(source, target)
        options = {"compute_type": "int8", "inter_threads": 1, "intra_threads": threads}
        self._model = ctranslate2.Generator(str(target), device="cpu", **options)

    def prefill(self, tokens: list[int]) -> None:
        """See `Model.prefill`."""
        self._prompt = tokens
        self._generate(tokens, 1)

    def decode_all(self, tokens: list[int]) -> None:
        """See `Model.decode_all`."""
        self._generate(self._prompt[:1], len(tokens))

    def _generate(self, prompt: list[int], count: int) -> None:
        options = {"min_length": count, "max_length": count, "include_prompt_in_result": False}
        made = self._model.generate_batch([list(map(str, prompt))], **options)
        if len(made[0].sequences_ids[0]) != count:
            raise RuntimeError(f"ctranslate2 made {len(made[0].sequences_ids[0])} tokens, not {count}")

    def logits(self, tokens: list[int]) -> np.ndarray:
        """See `Model.logits`."""
        return np.array(self._model.forward_batch([list(map(str, tokens))]))[0].astype("float32")


def convert(source: Path, target: Path) -> None:
    """Write a LLaMA as CTranslate2 stores it: its tokens are called by their numbers."""
    from ctranslate2.converters.utils import fuse_linear
    from ctranslate2.specs import common_spec, transformer_spec

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config["num_hidden_layers"],
        heads,
        activation=common_spec.Activation.SWISH,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=config["rope_theta"],
        num_heads_kv=None if kv_heads == heads else kv_heads,
    )
    weights = Weights(source)
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["model.embed_tokens.weight"]
    decoder.layer_norm.gamma = weights["model.norm.weight"]
    head = "lm_head" if "lm_head.weight" in weights else "model.embed_tokens"
    decoder.projection.weight = weights[f"{head}.weight"]
    for number, layer in enumerate(decoder.layer):
        own = {name: weights[f"model.layers.{number}.{name}.weight"] for name in _LINEARS + _NORMS}
        layer.self_attention.layer_norm.gamma, layer.ffn.layer_norm.gamma = (own[name] for name in _NORMS)
        parts = []
        for name in _LINEARS[:3]:
            parts.append(common_spec.LinearSpec())
            parts[-1].weight = own[name]
        fuse_linear(layer.self_attention.linear[0], parts)
        layer.self_attention.linear[1].weight = own["self_attn.o_proj"]
        layer.ffn.linear_0.weight, layer.ffn.linear_0_noact.weight = own["mlp.gate_proj"], own["mlp.up_proj"]
        layer.ffn.linear_1.weight = own["mlp.down_proj"]
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "0", "1", "2"
    spec.config.layer_norm_epsilon = config["rms_norm_eps"]
    spec.register_vocabulary([str(i) for i in range(config["vocab_size"])])
    spec.validate()
    spec.optimize("int8")
    target.mkdir(parents=True, exist_ok=True)
    spec.save(str(target))


_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
