"""`prepare --partitions N`: lists of ratings that do not fit into memory, one part of the users after the other."""
