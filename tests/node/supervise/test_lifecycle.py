"""One engine's life, step by step, without a process or a clock."""

import pytest

from appliance.node.supervise.lifecycle import (
    EngineLifecycle,
    Event,
    Exited,
    Healthy,
    LifecycleLimits,
    Phase,
    ProgressReport,
    Start,
    Stop,
    Tick,
    Unhealthy,
    advance,
    describe_exit,
)

LIMITS = LifecycleLimits(start_seconds=100, stall_seconds=60, unhealthy_seconds=20, drain_seconds=30)


class Story:
    """A life under test: feeds events at given times and collects the actions."""

    def __init__(self) -> None:
        self.life = EngineLifecycle()
        self.actions: list[str] = []

    def at(self, now: float, *events: Event) -> "Story":
        for event in events:
            self.life, actions = advance(self.life, event, now, LIMITS)
            self.actions += actions
        return self

    @property
    def phase(self) -> Phase:
        return self.life.phase


def ready() -> Story:
    return Story().at(0, Start()).at(5, Healthy())


def test_a_start_spawns_and_health_makes_it_ready() -> None:
    story = ready()
    assert (story.phase, story.life.state, story.actions) == ("ready", "ready", ["spawn"])


def test_starting_twice_spawns_once() -> None:
    assert Story().at(0, Start(), Start()).at(1, Healthy(), Start()).actions == ["spawn"]


def test_a_crash_waits_and_restarts_and_counts() -> None:
    story = ready().at(6, Exited(-11, "boom"))
    assert (story.phase, story.life.state, story.life.wake_at) == ("waiting", "failed", 6.5)
    assert story.life.reason == "was ended by signal 11: boom; starts again in 0.5 s"
    story.at(6.4, Tick())
    assert story.phase == "waiting"
    story.at(6.5, Tick())
    assert (story.phase, story.life.restarts, story.actions) == ("starting", 1, ["spawn", "spawn"])


def test_an_exit_with_code_zero_that_nobody_asked_for_is_a_crash() -> None:
    assert ready().at(6, Exited(0)).phase == "waiting"


def test_the_pause_doubles_up_to_thirty_seconds() -> None:
    story, now, pauses = Story().at(0, Start()), 0.0, []
    for _ in range(8):
        story.at(now, Exited(1))
        assert story.life.wake_at is not None
        pauses.append(story.life.wake_at - now)
        now = story.life.wake_at
        story.at(now, Tick())
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(("good_seconds", "pause"), [(59, 2.0), (60, 0.5)])
def test_a_minute_of_good_running_earns_a_quick_restart(good_seconds: float, pause: float) -> None:
    story = Story().at(0, Start(), Exited(1)).at(0.5, Tick(), Exited(1)).at(1.5, Tick()).at(2, Healthy())
    story.at(2 + good_seconds, Exited(-9))
    assert story.life.wake_at == 2 + good_seconds + pause


@pytest.mark.parametrize("code", [2, 3])
def test_bad_arguments_and_bad_model_files_are_not_tried_again(code: int) -> None:
    story = Story().at(0, Start()).at(1, Exited(code, "the file is cut off"))
    assert (story.phase, story.life.wake_at) == ("failed", None)
    assert story.life.reason == f"ended by itself with code {code}: the file is cut off"
    assert story.at(500, Tick()).actions == ["spawn"]


def test_the_same_codes_after_readiness_are_crashes() -> None:
    assert ready().at(6, Exited(2)).phase == "waiting"


def test_a_program_that_cannot_be_started_is_tried_again() -> None:
    story = Story().at(0, Start()).at(0, Exited(None, "No such file"))
    assert (story.phase, story.life.reason) == ("waiting", "could not be started: No such file; starts again in 0.5 s")


def test_a_start_that_takes_too_long_is_killed_and_tried_again() -> None:
    story = Story().at(0, Start()).at(99, Tick())
    assert story.phase == "starting"
    story.at(100, Tick())
    assert (story.phase, story.actions) == ("killing", ["spawn", "kill"])
    story.at(101, Exited(-9))
    assert (story.phase, story.life.reason) == ("waiting", "not ready within 100 s; starts again in 0.5 s")


def test_work_without_steps_is_a_hung_engine() -> None:
    story = ready().at(6, ProgressReport(10, has_work=True))
    for now in range(7, 66):
        story.at(now, ProgressReport(10, has_work=True))
    assert story.phase == "ready"
    story.at(66, ProgressReport(10, has_work=True))
    assert (story.phase, story.actions) == ("killing", ["spawn", "kill"])
    assert story.life.reason == "hung: work waited and no step was done for 60 s"


def test_steps_and_idleness_both_clear_the_suspicion() -> None:
    story = ready()
    for now in range(6, 600):
        story.at(now, ProgressReport(now // 50, has_work=True))
    for now in range(600, 900):
        story.at(now, ProgressReport(99, has_work=False))
    assert story.phase == "ready"
    assert story.life.stalled_seconds == 0


def test_a_machine_that_slept_does_not_make_an_engine_look_hung() -> None:
    story = ready().at(6, ProgressReport(10, has_work=True)).at(3606, ProgressReport(10, has_work=True))
    assert story.phase == "ready"
    assert ready().at(3606, Unhealthy("timed out")).phase == "ready"


def test_an_engine_that_answers_nothing_is_killed_and_one_that_hiccups_is_not() -> None:
    story = ready()
    for now in (9, 13, 17, 21):
        story.at(now, Unhealthy("ReadTimeout"))
    story.at(22, ProgressReport(1, has_work=False))
    for now in (26, 30, 34, 38):
        story.at(now, Unhealthy("ReadTimeout"))
    assert story.phase == "ready"
    story.at(42, Unhealthy("ReadTimeout"))
    assert (story.phase, story.life.reason) == ("killing", "no answer for 20 s: ReadTimeout")


def test_a_stop_drains_and_ends() -> None:
    story = ready().at(6, Stop())
    assert (story.phase, story.life.state, story.life.wake_at) == ("stopping", "draining", 36)
    story.at(8, Exited(0))
    assert (story.phase, story.actions) == ("stopped", ["spawn", "terminate"])


def test_a_drain_that_lasts_too_long_is_cut() -> None:
    story = ready().at(6, Stop()).at(36, Tick())
    assert (story.phase, story.actions) == ("killing", ["spawn", "terminate", "kill"])
    assert story.at(36.1, Exited(-9)).phase == "stopped"


def test_a_stop_while_starting_kills_at_once_because_a_loading_engine_may_swallow_sigterm() -> None:
    story = Story().at(0, Start()).at(1, Stop())
    assert (story.phase, story.actions) == ("killing", ["spawn", "kill"])
    assert story.at(1.1, Exited(-9)).phase == "stopped"


def test_a_stop_while_waiting_ends_the_restarts() -> None:
    story = ready().at(6, Exited(1)).at(6.1, Stop()).at(60, Tick())
    assert (story.phase, story.actions) == ("stopped", ["spawn"])


def test_stopping_twice_is_harmless() -> None:
    assert ready().at(6, Stop(), Stop()).at(7, Exited(0)).at(8, Stop()).actions == ["spawn", "terminate"]


def test_a_stopped_engine_can_be_started_again() -> None:
    assert ready().at(6, Stop()).at(7, Exited(0)).at(8, Start()).actions == ["spawn", "terminate", "spawn"]


def test_answers_that_come_late_change_nothing() -> None:
    for event in (Healthy(), Unhealthy("late"), ProgressReport(1, has_work=True)):
        assert ready().at(6, Exited(1)).at(6.1, event).phase == "waiting"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "could not be started"),
        (-9, "was killed (signal 9); the system does so when memory runs out"),
        (-15, "was ended by signal 15"),
        (4, "ended by itself with code 4"),
    ],
)
def test_an_exit_is_put_into_words(code: int | None, words: str) -> None:
    assert describe_exit(code, "") == words
    assert describe_exit(code, "last") == f"{words}: last"
