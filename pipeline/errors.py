"""The exceptions that users are meant to read."""


class CarvanaError(Exception):
    """Something a user can fix: the message names the file, image or key at fault and says what to do.

    Commands print it as one line and exit with 1; anything else that escapes is a bug.
    """


class CorruptFileError(CarvanaError):
    """A file was read, and what it holds is not sound: reading it again would say the same.

    Apart from a drive that fails, since only this may be skipped, or replaced by a fallback, for good.
    """
