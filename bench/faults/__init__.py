"""What a run loses when it is killed, or its machine fails: `python -m bench.faults`."""
