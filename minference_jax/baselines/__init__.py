"""Methods that the paper compares with (section 4.1, Tables 2 to 5), as attention callables."""

from minference_jax.baselines.dilated import DilatedStreaming as DilatedStreaming
from minference_jax.baselines.dilated import streaming_dilated as streaming_dilated
from minference_jax.baselines.dilated import streaming_strided as streaming_strided
from minference_jax.baselines.inf_llm import InfLLM as InfLLM
from minference_jax.baselines.static import StaticAttention as StaticAttention
from minference_jax.baselines.static import StaticLines as StaticLines
from minference_jax.baselines.static import static_lines as static_lines
from minference_jax.baselines.top_k import TopKAttention as TopKAttention
