"""The Ray actors: policy ranks, engines, and the feed of prompts and rewards."""
