"""Steps at the shapes of language models people tune, on prompts of real lengths."""
