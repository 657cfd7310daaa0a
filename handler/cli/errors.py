"""The base class of the errors that end a command with a message instead of a traceback."""


class CommandError(Exception):
    """A command cannot continue. The message states why and what to do."""
