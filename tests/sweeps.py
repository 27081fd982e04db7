"""What of a sweep belongs in the quick suite."""

import pytest


def rest_slow(choices, quick):
    """The choices for parametrize, those that are not among the quick ones marked slow; a tuple is several values."""
    return [choice if choice in quick else
            pytest.param(*(choice if isinstance(choice, tuple) else (choice,)), marks=pytest.mark.slow)
            for choice in choices]
