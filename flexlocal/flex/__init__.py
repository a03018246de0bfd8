"""The flex path: local attention in one fused kernel, by FlexAttention.

Inside a user's ``torch.compile`` a call becomes part of the user's graph; outside, it goes through
a callable that is compiled here and kept. Where they are faster, kernels of others serve: those of
FlashAttention 4, and for short sequences those of ``scaled_dot_product_attention``.
"""
