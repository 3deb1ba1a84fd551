"""DDP, FSDP2 and ZeRO: which engine a run has, what it cannot do with it, and the launcher above."""
