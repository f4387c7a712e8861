"""What stays of a layer's keys and values after prefill: SnapKV, PyramidKV, StreamingLLM."""

from minference_jax.kv_cache.pyramid_kv import PyramidKV as PyramidKV
from minference_jax.kv_cache.snap_kv import SnapKV as SnapKV
from minference_jax.kv_cache.streaming import StreamingKV as StreamingKV
from minference_jax.kv_cache.types import KeptKV as KeptKV
from minference_jax.kv_cache.types import KVCompression as KVCompression
