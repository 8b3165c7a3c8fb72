"""The Ray, vLLM and torch runtime of an RLHFJob. Read `run.py` first."""
