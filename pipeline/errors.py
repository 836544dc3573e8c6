"""The one exception that users are meant to read."""


class PipelineError(Exception):
    """Something a user can mend: the message names the file, image or key at fault and says what to do.

    Commands print it as one line and exit with 1; anything else that escapes is a bug.
    """
