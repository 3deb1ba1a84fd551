"""What is trained together: lists measured, dealt into batches, and packed when asked for."""
