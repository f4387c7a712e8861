"""What stays of keys and values after prefill: SnapKV, PyramidKV, StreamingLLM, 8 bits, nothing."""

from minference_jax.kv_cache.drop import DropKV as DropKV
from minference_jax.kv_cache.eight_bits import EightBitKV as EightBitKV
from minference_jax.kv_cache.pyramid_kv import PyramidKV as PyramidKV
from minference_jax.kv_cache.snap_kv import SnapKV as SnapKV
from minference_jax.kv_cache.streaming import StreamingKV as StreamingKV
from minference_jax.kv_cache.types import KeptKV as KeptKV
from minference_jax.kv_cache.types import KVCompression as KVCompression
from minference_jax.kv_cache.types import KVScales as KVScales
