"""What a person sees while a run goes on: one bar over the whole training, and a line an epoch."""

import contextlib
import sys
from typing import Any


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; silent in all but the main process.

    Args:
        total: steps in all.
        done: steps done before, when a run is resumed.
        visible: False to print nothing.
        unit: what is counted.
    """

    def __init__(self, total: int, done: int = 0, visible: bool = True, unit: str = "step") -> None:
        self.visible = visible
        self.bar: Any = None
        if visible and sys.stderr.isatty():
            with contextlib.suppress(ImportError):  # tqdm comes with mbib-timm[train]; plain lines will do
                from tqdm import tqdm

                self.bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, smoothing=0.05)

    def step(self, count: int = 1) -> None:
        """Count one step, or several."""
        if self.bar is not None:
            self.bar.update(count)

    def status(self, text: str) -> None:
        """Show a short text beside the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.visible:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
