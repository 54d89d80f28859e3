"""The comparison of printed output with a document's."""

import pytest
from documents import is_shown


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("", ""),
        ("2\n[first token 0.056 s | 163.6 tokens/s]", "2\n[first token 1 s | 9 tokens/s]\n"),
        ("time 13 us", "time   2.17 ms"),
        ("llm 49 6.55 MB", "llm 50 12 kB"),
        ("a\n...\nz", "a\nz"),
        ("a\n...\nz", "a\nb\nc\nz"),
        ("kernels: ...]", "kernels: linear=aten; else reference]"),
        ("0  99.9%  -", "0  99.7%  0.01%"),
        ("KL 6.98e-07 of -4", "KL 1.0e+00 of 5"),
    ],
)
def test_numbers_units_blanks_and_left_out_lines_may_differ(shown: str, printed: str) -> None:
    assert is_shown(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("2", "2\n3"),
        ("right 5", "wrong 5"),
        ("sm_90 int4_matmul", "sm_80 int4_matmul"),
        ("a\n...\nz", "a\nb"),
        ("a\n...", "b\na"),
        ("", "a"),
    ],
)
def test_words_names_and_additional_lines_may_not(shown: str, printed: str) -> None:
    assert not is_shown(shown, printed)
