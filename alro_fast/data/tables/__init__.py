"""The tables of a prepared folder: their columns, the values they may hold, the files they stand in."""
