"""The progress bar of training and evaluation."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A `tqdm` bar that refreshes every second on a terminal, and every half minute in a log file."""
    interval = 1 if sys.stderr.isatty() else 30
    return tqdm(*arguments, mininterval=interval, maxinterval=interval, dynamic_ncols=True, smoothing=0.1, **options)
