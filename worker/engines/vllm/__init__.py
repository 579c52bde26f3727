"""vLLM in this process. Only here is vllm imported."""
