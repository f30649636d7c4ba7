"""Progress of training and evaluation: bars on a terminal, plain lines in logs and pipes."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A `tqdm` bar on stderr that refreshes every second; it draws nothing if stderr is not a terminal."""
    return tqdm(
        *arguments,
        disable=not sys.stderr.isatty(),
        mininterval=1,
        maxinterval=1,
        dynamic_ncols=True,
        smoothing=0.1,
        **options,
    )


def with_log(items: Sequence[Item], name: str) -> Iterator[Item]:
    """Yields the items; if stderr is not a terminal, prints a line after each: "trial 2 of 5: 12 s"."""
    for number, item in enumerate(items, start=1):
        start = time.perf_counter()
        yield item
        if not sys.stderr.isatty():
            seconds = time.perf_counter() - start
            print(f"{name} {number} of {len(items)}: {seconds:.3g} s", file=sys.stderr, flush=True)
