"""How many threads compute the next step: all of them, or fewer while other programs hold the cores.

Threads wait for each other about a thousand times a step. Where one of them shares its core with another program, all
wait for it each time: two threads then need 40 ms for 16 sequences of SmolLM2-135M and one thread alone 28, though on
an idle machine two need 17. The two cases differ in the CPU time that the threads get together.
"""

from typing import Final

LEAST_SHARE: Final = 0.65
"""Of the CPU time that all threads could have used. Two threads that get less are slower than one."""
WINDOW_SECONDS: Final = 0.25
TRIAL_SECONDS: Final = 0.08
FIRST_REST_SECONDS: Final = 1.0
LONGEST_REST_SECONDS: Final = 16.0


class ThreadGovernor:
    """Goes down to the threads that got through, and tries all of them again after a rest that grows each time the
    trial fails. Pure: times come in, a number of threads comes out."""

    def __init__(self, threads: int) -> None:
        self.threads = self._most = threads
        self._seconds = self._cpu_seconds = 0.0
        self._rest_seconds = FIRST_REST_SECONDS
        self._trial = False

    def observe(self, seconds: float, cpu_seconds: float) -> int:
        """Take in what a step took, by the clock and of all cores together; give the threads for the next one."""
        if self._most == 1:
            return 1
        self._seconds += seconds
        self._cpu_seconds += cpu_seconds
        if self.threads < self._most:
            if self._seconds >= self._rest_seconds:
                self._set_threads(self._most)
                self._trial = True
        elif self._seconds >= (TRIAL_SECONDS if self._trial else WINDOW_SECONDS):
            self._decide()
        return self.threads

    def _decide(self) -> None:
        parallel = self._cpu_seconds / self._seconds
        crowded = parallel < LEAST_SHARE * self._most
        if crowded and self._trial:
            self._rest_seconds = min(LONGEST_REST_SECONDS, 2 * self._rest_seconds)
        elif not crowded:
            self._rest_seconds = FIRST_REST_SECONDS
        self._set_threads(max(1, min(self._most - 1, round(parallel))) if crowded else self._most)
        self._trial = False

    def _set_threads(self, threads: int) -> None:
        self.threads = threads
        self._seconds = self._cpu_seconds = 0.0
