"""Attention over several devices: heads split (tensor parallel), the prompt split (context)."""

from minference_jax.sharding.attention import HEADS_AXIS as HEADS_AXIS
from minference_jax.sharding.attention import SEQUENCE_AXIS as SEQUENCE_AXIS
from minference_jax.sharding.attention import ShardedAttention as ShardedAttention
from minference_jax.sharding.attention import attention_mesh as attention_mesh
from minference_jax.sharding.keep import keep_sharded as keep_sharded
from minference_jax.sharding.order import balanced_order as balanced_order
from minference_jax.sharding.order import natural_order as natural_order
from minference_jax.sharding.order import padded_length as padded_length
