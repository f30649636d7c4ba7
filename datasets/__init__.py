"""TFDS builders of the five tables of the paper; `data/tfds.py` opens them, and so does `import datasets.power`."""
