"""`python -m trainer`: train and publish until done or told to stop."""

import logging
import signal
import sys
import threading
from types import FrameType

from emaswap import EmaswapError
from trainer.display import Display
from trainer.distributed import joined
from trainer.loop import prepare, train
from trainer.settings import TrainerSettings
from trainer.tasks import find_task


def main(arguments: list[str] | None = None) -> int:
    """Run the trainer with command-line arguments and return the exit status."""
    settings = TrainerSettings.read(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    try:
        prepare(settings)
        with joined(settings.device, settings.ranks_timeout_s) as ranks:
            task = find_task(settings.task)
            with Display(settings.steps, quiet=not ranks.leads) as display:
                _stop_on_signals(stop)
                step = train(settings, task, display, stop, ranks)
                display.say(f"done: {step} steps" if step == settings.steps else f"stopped at step {step}")
    except EmaswapError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 1
    return 0


def _stop_on_signals(stop: threading.Event) -> None:
    """Have SIGTERM and Ctrl-C end the run after its current step; a second one ends it at once."""

    def handle(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


if __name__ == "__main__":
    sys.exit(main())
