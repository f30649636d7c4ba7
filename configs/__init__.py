"""One file per experiment; `common.py` documents every key and holds what the experiments of a family share."""
