"""How many examples hypothesis tries: few in a run of the suite, as many as a test asks for in the drills."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fast", max_examples=25, deadline=None)
settings.register_profile("full", max_examples=100_000, deadline=None)


def examples(number: int) -> settings:
    """At most `number`, and no more than the profile has: `--hypothesis-profile=full` runs all."""
    return settings(max_examples=min(number, settings.default.max_examples), deadline=None)
