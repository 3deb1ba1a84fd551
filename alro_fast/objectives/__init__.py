"""Training objectives, one file each: which branches to build, which loss to take."""
