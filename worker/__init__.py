"""The Runpod worker: what runs in the container."""
