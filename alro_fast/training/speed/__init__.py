"""What a step computes, what the machine could, and where the time goes."""
