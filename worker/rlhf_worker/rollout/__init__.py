"""From prompts to finished, scored groups of samples."""
