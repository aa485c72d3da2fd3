"""What goes wrong in ways that a user can mend: one class, one line of text, no traceback.

These few lines are a file because engines, shells and commands raise them and the core does not: in
`paceline/__init__.py` the core would import them too.
"""

from __future__ import annotations


class PacelineError(Exception):
    """Something that the user must know and can act on. Its text is one line and names the cause."""


class ConfigError(PacelineError):
    """A setting that cannot be. The text begins with the setting's name."""


class StartupError(PacelineError):
    """The deployment did not come up. The text names the process and the reason."""
