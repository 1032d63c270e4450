from pathlib import Path

import pytest

from ijepa.errors import UserError, counted, home_path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no checkpoint at ä/größe 1.pt", "no checkpoint at ä/größe 1.pt"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udcff", r"\udcff"),
        ("x" * 10**7, "x" * 1000),
    ],
)
def test_a_problem_and_its_hint_are_one_line_each_that_leaves_a_terminal_alone(text, shown):
    error = UserError(text, hint=text)
    assert (error.problem, error.hint, str(error)) == (shown, shown, shown)


def test_what_is_counted_has_its_plural():
    assert [counted(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [counted(n, "class") for n in (1, 2)] == ["1 class", "2 classes"]


def test_a_home_folder_is_found_and_that_of_nobody_stays():
    assert home_path("~/a") == Path.home() / "a"
    assert home_path("~no-such-user/a") == Path("~no-such-user/a")
