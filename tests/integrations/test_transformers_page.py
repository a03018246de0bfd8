"""The page's table of models says what the integration makes of their configs."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from flexlocal.integrations.transformers import mask, registry

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
CONFIGS = {
    "Mistral 7B v0.1": "MistralConfig",
    "Gemma 2": "Gemma2Config",
    "Gemma 3": "Gemma3TextConfig",
    "ModernBERT": "ModernBertConfig",
    "gpt-oss": "GptOssConfig",
    "Llama 4": "Llama4TextConfig",
    "Cohere 2": "Cohere2Config",
    "OLMo 3": "Olmo3Config",
    "Phi-3 mini": "Phi3Config",
}
ROWS = re.findall(
    r"^\| ([^|]+) \| `(\w+)=(\d+)` \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE
)


def test_the_table_has_every_model():
    assert [row[0] for row in ROWS] == list(CONFIGS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_says_what_a_layer_sees(row):
    name, field, number, words, others = row
    config = getattr(transformers, CONFIGS[name])(**{field: int(number)})
    both_ways = name == "ModernBERT"
    found = mask.local_mask(
        batch_size=1,
        q_length=3,
        kv_length=3,
        mask_function=None,
        local_size=getattr(config, "sliding_window", None) or config.attention_chunk_size,
        config=config,
        **({"allow_is_bidirectional_skip": True} if both_ways else {}),
    )
    assert found.window.words == words
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    named = registry._full("sdpa", config)
    assert others.partition(",")[0] == (named if "full_attention" in kinds else "none")


@pytest.mark.parametrize("capped", [None, 50.0])
def test_where_full_layers_go_follows_from_the_config(capped):
    unknown = SimpleNamespace(attn_logit_softcapping=capped)
    assert registry._full("sdpa", unknown) == ("sdpa" if capped is None else "flexlocal")
    assert registry._full("flex_attention", unknown) == "flex_attention"
