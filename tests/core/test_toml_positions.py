"""Where a setting stands in a TOML text."""

from appliance.core.toml_positions import dotted, line_of


def test_lines_are_found_below_nested_arrays_of_tables() -> None:
    text = "a = 1\n[[x]]\nb = 1\n[[x.y]]\nc = 1\n[[x]]\nb = 2\n[[x.y]]\nc = 2\n[[x.y]]\nc = 3\n"
    assert line_of(text, ("x", 1, "y", 1, "c")) == 11
    assert line_of(text, ("x", 1, "y", 0, "missing")) == 8
    assert line_of(text, ("x", 0, "b")) == 3
    assert line_of(text, ("nothing",)) is None


def test_a_path_is_written_as_people_write_it() -> None:
    assert dotted(("routes", 1, "match", "task", 0)) == "routes[1].match.task[0]"
    assert dotted(()) == ""
