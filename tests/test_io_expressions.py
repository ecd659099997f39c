"""Regular expressions of checkpoints: those of real ones are compiled, those that may not end are refused."""

import time

import pytest

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.io.expressions import compiled

SOUND = [
    r".*self_attn.*",
    r".*\.(q|k|v)_proj$",
    r"model\.layers\.(?:[0-9]|1[0-5])\..*",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.(?:gate|up|down)_proj",
    r"^.*visual.*\.attn\..*$|^.*audio.*\.attn\..*$|^lm_head$",
    r"(?!.*gate).*mlp.*",
    r"(?P<a>a\(b+\)[)+*]*)?x{2}",
    r"(?i)LM_HEAD",
    r"[]()*+]+\)\*(?:a)+",
]


@pytest.mark.parametrize("pattern", SOUND)
def test_sound(pattern):
    assert compiled(pattern, "there").pattern == pattern


REFUSED = {
    "nested": (r"(a+)+$", "repeats what is repeated"),
    "nested star": (r"(?:a*)*", "repeats what"),
    "nested count": (r"(a{1,30}){1,30}$", "repeats what"),
    "deeper": (r"((?:a+)b)*", "repeats what"),
    "alternatives": (r"(a|a)+$", "has alternatives within"),
    "options": (r"(?:a?){60}a", "repeats what"),
    "lazy": (r"(?P<x>a+?)+?$", "repeats what"),
    "after a class": (r"([)]+[^]a]*)+", "repeats what"),
    "many": (".*a" * 7, "has 7 repeats"),
    "many in one alternative": ("(?:x|" + ".*a" * 4 + ")" + "(?:" + ".*a" * 3 + "|y)", "has 7 repeats"),
    "comment": (r"(a+)(?#)+", "comments or conditions"),
    "condition": (r"(a)?(?(1)b|c)", "comments or conditions"),
    "verbose": ("(?x)(a+) +", "comments or conditions"),
    "verbose inside": ("(?ix:(a+) +)", "comments or conditions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    pattern, message = REFUSED[case]
    with pytest.raises(UnsupportedError, match=f"there: .* {message}"):
        compiled(pattern, "there")


DAMAGED = [
    ("(a", "no regular expression: missing"),
    (3, "3 is no regular expression"),
    (None, "None is no regular expression"),
    ("a" * 1001, "1001 characters; 1000 at most"),
    (f"a{{{2**40}}}", "no regular expression"),
]


@pytest.mark.parametrize(("pattern", "message"), DAMAGED)
def test_damaged(pattern, message):
    with pytest.raises(CheckpointError, match=f"there: .*{message}"):
        compiled(pattern, "there")


def test_the_worst_that_is_matched_ends():
    """Six repeats against a name of which every letter fits."""
    start = time.perf_counter()
    assert not compiled(".*a" * 6 + "b", "there").match("a" * 50)
    assert time.perf_counter() - start < 60
