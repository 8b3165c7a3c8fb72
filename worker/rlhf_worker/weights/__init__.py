"""Moving the trainer's weights into the engines, through vLLM's weight-transfer API."""
