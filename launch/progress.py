"""A progress bar on a terminal, nothing elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str) -> Iterator[Callable[[float], None]]:
    """Yields a function that takes the share done (0..1); draws on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    from tqdm import tqdm

    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=1.0, desc=label, bar_format=layout, leave=False) as bar:

        def show(share: float) -> None:
            bar.update(max(0.0, min(share, 1.0) - bar.n))

        yield show
