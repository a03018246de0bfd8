"""Tiny models of Transformers with random weights, a window of a few tokens and odd sizes."""

import pytest
import torch
import transformers

WINDOW = 7
WORDS = 53
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

_BASE = dict(
    vocab_size=WORDS,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    sliding_window=WINDOW,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    attention_dropout=0.0,
    tie_word_embeddings=False,  # tied, the greedy next token is the last one again
)


def _bert(base):
    known = {
        key: value
        for key, value in base.items()
        if key not in ("num_key_value_heads", "head_dim", "sliding_window")
    }
    return {
        **known,
        "local_attention": 2 * WINDOW,
        "global_attn_every_n_layers": 3,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }


def _llama4(base):
    return {
        **{key: value for key, value in base.items() if key != "sliding_window"},
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
        "intermediate_size_mlp": 40,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
    }


FAMILIES = {
    "Mistral": ("MistralForCausalLM", "MistralConfig", dict),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        lambda base: {**base, "attn_logit_softcapping": 2.0},
    ),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        lambda base: {**base, "layer_types": LAYERS},
    ),
    "ModernBERT": ("ModernBertForMaskedLM", "ModernBertConfig", _bert),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        lambda base: {
            **base,
            "layer_types": LAYERS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_scaling": None,
        },
    ),
    "Llama 4": ("Llama4ForCausalLM", "Llama4TextConfig", _llama4),
    # Families that nothing in flexlocal was written for.
    "Cohere 2": (
        "Cohere2ForCausalLM",
        "Cohere2Config",
        lambda base: {**base, "layer_types": LAYERS},
    ),
    "OLMo 3": ("Olmo3ForCausalLM", "Olmo3Config", lambda base: {**base, "layer_types": LAYERS}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", dict),
}
DECODERS = [name for name in FAMILIES if name != "ModernBERT"]
CACHE = "cache" if transformers.__version__ > "5.20" else "past_key_values"
"""What models call the argument."""


def tiny(family, implementation="eager", **changes):
    """A model in inference mode; the same weights for the same arguments."""
    model, config, adapted = FAMILIES[family]
    config = getattr(transformers, config)(**{**adapted(_BASE), **changes})
    torch.manual_seed(3)
    model = getattr(transformers, model)._from_config(config, attn_implementation=implementation)
    with torch.no_grad():  # drawn as usual, weights are too small for windows to matter
        for name, weight in model.named_parameters():
            if "sinks" in name:
                weight.normal_()
            elif weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model.eval()


def words(rows, n, seed=0):
    """Random tokens, no special ones among them."""
    return torch.randint(3, WORDS, (rows, n), generator=torch.Generator().manual_seed(seed))


def padded(rows, n):
    """A mask of padding: left in the first row, right in the second, both in the third."""
    mask = torch.ones(rows, n, dtype=torch.long)
    mask[0, : n // 4] = 0
    mask[1, n - n // 5 :] = 0
    mask[2, :3], mask[2, n - 2 :] = 0, 0
    return mask


def largest(difference):
    return difference.abs().max().item()


only_where_newest = pytest.mark.skipif(
    CACHE != "cache", reason="Transformers 5.17 itself fails or counts otherwise here"
)
