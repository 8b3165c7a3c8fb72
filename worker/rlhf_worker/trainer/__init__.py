"""The trainer: one rank, the roles that it holds, their models and checkpoints."""
