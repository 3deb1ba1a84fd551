"""Inputs that do not fit into memory: peak memory of preparing them, and of ranking a stream of lists."""
