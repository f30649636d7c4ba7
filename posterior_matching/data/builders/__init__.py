"""TFDS builders of the paper's five tables, one file each; the class is named like the file."""
