"""TFDS builders of the paper's five tabular datasets, one file each; the class is named after the file."""
