"""Methods that MInference is compared with."""

from minference_jax.baselines.inf_llm import InfLLM as InfLLM
