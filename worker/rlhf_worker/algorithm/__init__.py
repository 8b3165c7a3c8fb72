"""The arithmetic of reinforcement learning: pure functions of tensors and of what a step's samples are."""
