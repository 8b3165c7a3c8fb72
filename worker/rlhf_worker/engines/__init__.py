"""The engines: vLLM's actors, the fleet that keeps them alive, and their stand-in for debugging."""
