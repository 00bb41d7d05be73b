"""What ends a job that has begun."""


class JobError(Exception):
    """The job could not go on; what is finished stays. The command line exits with code 1."""
