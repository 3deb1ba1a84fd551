"""Files to ranking lists."""
