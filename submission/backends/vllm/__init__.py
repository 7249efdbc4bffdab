"""Backend vllm: transformers folders on GPUs, with paged attention, continuous batching and a prefix cache."""
