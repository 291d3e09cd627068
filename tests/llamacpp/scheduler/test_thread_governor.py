"""The number of threads follows what they get of the cores."""

from appliance.llamacpp.scheduler.thread_governor import FIRST_REST_SECONDS, LONGEST_REST_SECONDS, ThreadGovernor

STEP_SECONDS = 0.02


def steps(pace: ThreadGovernor, seconds: float, cores: float) -> list[int]:
    """The threads of each step while `cores` cores are free for us."""
    used = []
    while seconds > 0:
        used.append(pace.threads)
        pace.observe(STEP_SECONDS, STEP_SECONDS * min(cores, pace.threads))
        seconds -= STEP_SECONDS
    return used


def test_all_threads_compute_while_they_get_their_cores() -> None:
    assert set(steps(ThreadGovernor(2), 5, cores=1.9)) == {2}


def test_two_threads_on_one_free_core_become_one() -> None:
    used = steps(ThreadGovernor(2), 1, cores=1.0)
    assert used[0] == 2
    assert used[-1] == 1


def test_many_threads_go_down_to_what_is_free() -> None:
    assert steps(ThreadGovernor(16), 1, cores=9)[-1] == 9


def test_all_threads_come_back_soon_after_the_others_have_gone() -> None:
    pace = ThreadGovernor(2)
    steps(pace, 0.5, cores=1.0)
    used = steps(pace, FIRST_REST_SECONDS + 1, cores=2.0)
    assert used[0] == 1
    assert used[-1] == 2
    assert used.count(1) * STEP_SECONDS <= FIRST_REST_SECONDS + STEP_SECONDS


def test_trials_beside_a_busy_program_become_rare() -> None:
    pace = ThreadGovernor(2)
    early = steps(pace, 10, cores=1.0).count(2)
    steps(pace, 60, cores=1.0)
    late = steps(pace, 4 * LONGEST_REST_SECONDS, cores=1.0).count(2)
    assert early > 0
    assert 0 < late * STEP_SECONDS < 0.02 * 4 * LONGEST_REST_SECONDS


def test_one_thread_stays_one() -> None:
    assert set(steps(ThreadGovernor(1), 2, cores=0.2)) == {1}
