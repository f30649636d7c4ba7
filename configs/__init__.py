"""One file per experiment; `common.py` holds what experiments of one kind share, with every key and its meaning."""
