"""Training: the loop, what it logs, how it feeds data, and models built on trained ones."""
