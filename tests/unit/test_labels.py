"""Labels as a request of a million remembers them."""

from __future__ import annotations

import sys

from medley.api.job_bodies import MAX_LABEL_CHARS, label_key


def test_labels_are_told_apart_whatever_their_length_and_script() -> None:
    labels = [
        "a",
        "b",
        "x" * 40,
        "x" * 41,
        "x" * 40 + "y",
        "\u00e9",
        "\U0001f600" * MAX_LABEL_CHARS,
        "x" * MAX_LABEL_CHARS,
    ]
    assert len({label_key(label) for label in labels}) == len(labels)
    assert all(label_key(label) == label_key(label) for label in labels)


def test_no_label_takes_more_than_a_hundred_bytes() -> None:
    widest = "x" * (MAX_LABEL_CHARS - 1) + "\U0001f600"  # one such character makes each of its text 4 bytes
    assert sys.getsizeof(widest) > 800
    for label in ("i", "x" * 40, "x" * 41, widest):
        assert sys.getsizeof(label_key(label)) < 100
