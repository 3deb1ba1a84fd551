"""Studies: a grid of options x seeds over training runs, and one table of paired differences."""
