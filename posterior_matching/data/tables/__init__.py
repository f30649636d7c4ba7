"""Tables of the user's own: reading, what a cell means, the columns of a run, writing."""
