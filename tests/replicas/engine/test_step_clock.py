from quire.replicas.engine.step_clock import Part, StepClock


def test_time_goes_to_the_part_that_ended():
    times = iter([10.0, 11.0, 13.0, 16.0, 100.0, 104.0])
    clock = StepClock(lambda: next(times))
    clock.start()
    clock.ended(Part.PLAN)
    clock.ended(Part.FORWARD)
    clock.ended(Part.PLAN)
    clock.start()  # nobody's: the engine rested
    clock.ended(Part.EMIT)
    assert clock.seconds == {"plan": 4.0, "forward": 2.0, "sample": 0.0, "emit": 4.0}
