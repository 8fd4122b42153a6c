"""llama_jax: fine-tune any LLaMA checkpoint on TPU and GPU with JAX/Flax."""

__version__ = "0.1.0"
