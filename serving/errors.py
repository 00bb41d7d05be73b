"""What ends a job that has begun."""


class JobError(Exception):
    """The job could not go on; what is finished stays. The command line exits with code 1."""


def first_line(error: BaseException) -> str:
    """What ``error`` says, in one line."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
