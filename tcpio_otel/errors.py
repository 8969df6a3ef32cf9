"""What can go wrong, split by whose fault it is; each class carries the exit code that `tcpio-otel` returns."""


class TcpioError(Exception):
    """Base of every error this package raises on purpose.

    The message is one line that says what failed, why, and what to do about it.
    """

    exit_code = 1


class UsageError(TcpioError):
    """The command line, the configuration or an environment variable is wrong."""

    exit_code = 2


class EnvironmentFault(TcpioError):  # noqa: N818 - EnvironmentError is a builtin
    """The host, the kernel, a privilege or a peer does not offer what the agent needs."""

    exit_code = 3


class InputError(TcpioError):
    """An input file is unreadable, truncated, or not what its name says."""

    exit_code = 4
