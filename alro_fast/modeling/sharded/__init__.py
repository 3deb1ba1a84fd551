"""Models whose weights an engine (FSDP2, ZeRO-3) holds in parts: how they are loaded, read and saved."""

from .calls import accept_work, together, with_head, within
from .states import held, trained_weights, whole_weights

__all__ = ["accept_work", "held", "together", "trained_weights", "whole_weights", "with_head", "within"]
