"""What the merged model keeps of each skill."""

import pytest

from stages import evaluate


def test_retention_is_the_kept_share_of_the_gain():
    matrix = {
        "base": {"a": {"loss": 4.0, "accuracy": 0.1}, "b": {"loss": 4.0}, "c": {"loss": 1.0, "accuracy": 0.5}},
        "one": {"a": {"loss": 1.0, "accuracy": 0.9}, "b": {"loss": 1.0}, "c": {"loss": 1.0, "accuracy": 0.5}},
        "merged": {"a": {"loss": 2.0, "accuracy": 0.7}, "b": {"loss": 2.5}, "c": {"loss": 1.0, "accuracy": 0.6}},
    }
    kept = evaluate.retention(
        matrix | {"two": matrix["one"], "three": matrix["one"]}, {"one": "a", "two": "b", "three": "c"}
    )
    assert kept["one"]["retention"] == pytest.approx(0.75)
    assert (kept["two"]["measure"], kept["two"]["retention"]) == ("loss", 0.5)
    assert kept["three"]["retention"] is None
