"""Sequences that lie on several devices: each rank holds a run, and receives its window's halo.

``torch.distributed`` does the sending, by NCCL between GPUs and by gloo between CPUs.
docs/several_devices.md says which bytes travel, and when it pays.
"""

from .attention import sharded_local_attention
from .lengths import shard_lengths
from .sequence import gather_sequence, shard_sequence

__all__ = ["gather_sequence", "shard_lengths", "shard_sequence", "sharded_local_attention"]
