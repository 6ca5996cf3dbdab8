"""When something is due that only the device knows."""

from collections.abc import Callable
from typing import Any


class Countdown:
    """Tells when something is due in a training, such as new bases.

    To know it, the host has to wait for the device. So it does not ask at every step, but only
    after as many steps as were left when it last asked.

    Args:
      steps_left: how many more steps a state allows before it is due; 0: it is due now.
    """

    def __init__(self, steps_left: Callable[[Any], int]):
        self._steps_left, self._waiting = steps_left, 0

    def is_over(self, state: Any) -> bool:
        """Whether it is due before the next step from this state; to be called once per step."""
        if self._waiting == 0:
            self._waiting = self._steps_left(state)
            if self._waiting == 0:
                # Still due at the next step if it failed.
                return True
        self._waiting -= 1
        return False
