"""What a run is asked for, looked at and tried before it begins."""
