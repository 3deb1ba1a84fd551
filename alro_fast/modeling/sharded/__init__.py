"""Models whose weights an engine (FSDP2, ZeRO-3) holds in parts: how to read them."""

from .calls import accept_work, is_sharded, together, trained_weights, with_head, within

__all__ = ["accept_work", "is_sharded", "together", "trained_weights", "with_head", "within"]
