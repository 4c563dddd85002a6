from tinysam.runtime.timing import interleaved_seconds


def test_calls_take_turns_after_one_warm_up() -> None:
    log: list[str] = []
    seconds = interleaved_seconds({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, repetitions=2)
    assert log == ["a", "b"] * 3
    assert seconds.keys() == {"a", "b"}
    assert all(0 <= value < float("inf") for value in seconds.values())
