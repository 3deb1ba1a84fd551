"""Raw ratings from files: readers, downloads, one table of interactions."""
