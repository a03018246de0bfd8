"""Local attention of real models as windows, each with its source and where it is off by one.

Models count windows differently: with or without the query's own key, on one side or on both. Each
preset says in words how its source counts; ``keys`` is how many keys a query far from both ends
sees. An exact ``Window`` reaches ``look_backward * size`` keys back and does not count the query's
own. A model's window of 4096 that includes the query becomes one of size 4095. Layers of these
models that see the whole sequence are left out.
"""

import textwrap
from dataclasses import dataclass

from .window import Window

_TRANSFORMERS = "https://github.com/huggingface/transformers/blob/main/src/transformers/"
_OVERLAY = _TRANSFORMERS + "masking_utils.py"


@dataclass(frozen=True)
class Preset:
    """One model's local attention.

    Attributes:
        name: for the command line.
        model: the model, and which of its layers.
        window: the rule.
        keys: most keys that a query sees, its own included, by the source's own numbers.
        convention: how the source counts, and where a reader may be off by one.
        sources: addresses.
    """

    name: str
    model: str
    window: Window
    keys: int
    convention: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.name}: {self.model}, {self.keys} keys at most",
                f"  {self.window.words}",
                *textwrap.wrap(self.convention, 96, initial_indent="  ", subsequent_indent="  "),
                *(f"  {source}" for source in self.sources),
            )
        )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "documented-default",
            "the example of local-attention and zeta, window_size 512, causal",
            Window(512, causal=True),
            1024,
            "Windows are fixed: a query sees its own window up to itself and the window before it, "
            "513 to 1024 keys. The page promises window_size keys with exact_windowsize; the code "
            "gives 513, one more for the query's own.",
            ("https://github.com/lucidrains/local-attention#usage",),
        ),
        Preset(
            "reformer",
            "Reformer's local layers as a decoder, local_attn_chunk_length 64",
            Window(64, causal=True),
            128,
            "Chunks are fixed: a query sees its own chunk up to itself and the chunk before it "
            "(local_num_chunks_before=1), 65 to 128 keys.",
            (_TRANSFORMERS + "models/reformer/configuration_reformer.py",),
        ),
        Preset(
            "llama-4",
            "Llama 4's chunked layers, attention_chunk_size 8192",
            Window(8192, causal=True, look_backward=0),
            8192,
            "Chunks are fixed and none looks back: kv // 8192 == q // 8192, 1 to 8192 keys. The "
            "first query of a chunk sees itself alone.",
            (_TRANSFORMERS + "models/llama4/configuration_llama4.py", _OVERLAY),
        ),
        Preset(
            "mistral-7b",
            "Mistral 7B v0.1, sliding_window 4096",
            Window.sliding(4096),
            4096,
            "kv > q - 4096: the window holds the query, itself and 4095 before it, in Mistral's "
            "cache and in transformers. The paper's words (positions i - W to i) make it 4097, and "
            "so did transformers with FlashAttention until issue 39408.",
            (
                "https://arxiv.org/abs/2310.06825",
                "https://github.com/mistralai/mistral-inference/blob/main/src/mistral_inference/cache.py",
                _TRANSFORMERS + "models/mistral/configuration_mistral.py",
                _OVERLAY,
                "https://github.com/huggingface/transformers/issues/39408",
            ),
        ),
        Preset(
            "gemma-2",
            "Gemma 2's local layers, sliding_window_size 4096",
            Window.sliding(4096),
            4096,
            "kv > q - 4096: the window holds the query, itself and 4095 before it.",
            (
                "https://github.com/google-deepmind/gemma/blob/main/gemma/gm/nn/_gemma.py",
                "https://github.com/google-deepmind/gemma/blob/main/gemma/gm/nn/_modules.py",
            ),
        ),
        Preset(
            "gemma-3",
            "Gemma 3's local layers (4B, 12B, 27B), sliding_window_size 1024",
            Window.sliding(1024),
            1024,
            "kv > q - 1024: the window holds the query, itself and 1023 before it.",
            (
                "https://github.com/google-deepmind/gemma/blob/main/gemma/gm/nn/_gemma.py",
                "https://github.com/google-deepmind/gemma/blob/main/gemma/gm/nn/_modules.py",
            ),
        ),
        Preset(
            "gemma-3-1b",
            "Gemma 3's local layers (270M, 1B), sliding_window_size 512",
            Window.sliding(512),
            512,
            "kv > q - 512: the window holds the query, itself and 511 before it.",
            (
                "https://github.com/google-deepmind/gemma/blob/main/gemma/gm/nn/_gemma.py",
                "https://github.com/google-deepmind/gemma/blob/main/gemma/gm/nn/_modules.py",
            ),
        ),
        Preset(
            "gpt-oss",
            "GPT-OSS's local layers (20B, 120B), sliding_window 128",
            Window.sliding(128),
            128,
            "tril(diagonal=-128) is hidden: the window holds the query, itself and 127 before it. "
            "The learned sink beside it is no key.",
            ("https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/model.py",),
        ),
        Preset(
            "gpt-neo",
            "GPT-Neo's local layers, window_size 256",
            Window.sliding(256),
            256,
            "tril(-256) is hidden: the window holds the query, itself and 255 before it, though "
            "the code's comment says the previous window_size tokens.",
            (
                _TRANSFORMERS + "models/gpt_neo/modeling_gpt_neo.py",
                _TRANSFORMERS + "models/gpt_neo/configuration_gpt_neo.py",
            ),
        ),
        Preset(
            "longformer",
            "Longformer base 4096, attention_window 512",
            Window.around(256),
            513,
            "The window counts both sides, 256 each, and the query comes on top: 513 keys, not "
            "512. Tokens with global attention are left out.",
            (
                "https://arxiv.org/abs/2004.05150",
                _TRANSFORMERS + "models/longformer/modeling_longformer.py",
            ),
        ),
        Preset(
            "longt5",
            "LongT5's local encoder, local_radius 127",
            Window.around(127),
            255,
            "The radius is one side: |kv - q| < 128, the query and 127 on each side.",
            (
                _TRANSFORMERS + "models/longt5/configuration_longt5.py",
                _TRANSFORMERS + "models/longt5/modeling_longt5.py",
            ),
        ),
        Preset(
            "modernbert",
            "ModernBERT's local layers, local_attention 128",
            Window.around(64),
            129,
            "The window counts both sides, |kv - q| <= 64, and the query comes on top: 129 keys, "
            "not 128.",
            (
                _TRANSFORMERS + "models/modernbert/configuration_modernbert.py",
                _OVERLAY,
            ),
        ),
    )
}
"""By name."""


def preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
