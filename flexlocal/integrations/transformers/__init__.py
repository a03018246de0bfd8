"""Hugging Face Transformers with local layers on flexlocal.

After ``register()``, ``from_pretrained(..., attn_implementation="flexlocal")`` or
``model.set_attn_implementation("flexlocal")`` serve every model that asks Transformers' mask and
attention interfaces. Transformers hands a layer the object that the mask function of its
implementation made. ``mask.py`` makes a ``LocalMask`` there, a few numbers instead of a tensor of
queries by keys, and ``attention.py`` turns it into a call of ``local_attention``. Layers that are
not local go to another implementation. ``packing.py`` finds documents.

Source of the contract: ``masking_utils.py`` and ``integrations/sdpa_attention.py`` of
https://github.com/huggingface/transformers, 5.17 to 5.24.
"""

from .attention import Calls, calls
from .compare import Comparison, compare_logits
from .registry import NAME, register, unregister

__all__ = [
    "NAME", "Calls", "Comparison", "calls", "compare_logits", "register", "unregister",
]  # fmt: skip
