"""What ends a job that has begun."""

from collections.abc import Sequence


class JobError(Exception):
    """The job could not go on; what is finished stays. The command line exits with code 1."""


def told_by_validation(lines: Sequence[str]) -> str | None:
    """Of what pydantic says of vLLM's options, the message in it; None in other accounts."""
    prefix = "Value error, "
    told = next((line for line in lines if line.startswith(prefix)), None)
    return None if told is None else told.removeprefix(prefix).split(" [type=value_error")[0]
