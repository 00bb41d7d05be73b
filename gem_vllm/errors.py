"""The one exception that stands for "the user can mend this", and what goes into its line."""


class GemError(Exception):
    """Bad input or a missing prerequisite; the message is one line that says what to do.

    The command line prints it as ``error: <message>`` and exits with code 2.
    """


class GemConfigError(GemError, ValueError):
    """A checkpoint, base model or ``gem_config`` that cannot be used as it is."""


def first_line(error: BaseException) -> str:
    """What ``error`` says, in one line."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
