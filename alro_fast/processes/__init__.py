"""The processes of one launch, and work dealt over them."""
