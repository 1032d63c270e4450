import re

import compare_embeddings
import pytest
import train_ijepa

from ijepa.errors import UserError, counted


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


WRONG = {
    compare_embeddings: [
        *("--max-samples=-1", f"--seed={2**32}", "--probe-samples=some", "--dataset="),
        *("--hf-model=", "--output-dir=", "--output-dir=out\udcff", "--no-cache --cache-dir=x"),
    ],
    train_ijepa: [
        *("--epochs=0", "--batch-size=-3", "--batch-size=1", "--lr=-1", "--lr=nan", "--seed=-1"),
        *("--seed=99999999999999999999", "--embed-dim=100", "--num-views=1", "--dataset="),
        *("--num-views=2 --recipe=paper", "--dataset=in\udcff", "--output-dir="),
    ],
}


@pytest.mark.parametrize(
    ("script", "words"), [(script, words) for script in WRONG for words in WRONG[script]]
)
def test_wrong_usage_is_exit_code_2(script, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(words.split())
    assert stopped.value.code == 2
    flag = re.split("[ =]", words)[0]
    assert re.search(f"argument {flag}|{flag}.*not allowed|UTF-8", capsys.readouterr().err)
