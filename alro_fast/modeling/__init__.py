"""Trees of shared prefixes, and what a model does with them."""
