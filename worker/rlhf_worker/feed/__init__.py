"""What needs the files of a trainer pod and no GPU: prompts, rewards, telemetry."""
