"""Any OpenAI-compatible server as an engine: one that Tripod starts, or one that runs elsewhere."""
