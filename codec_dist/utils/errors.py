"""The base of every error that is the user's to repair."""

from codec_dist.utils.credentials import without_credentials


class CodecError(Exception):
    """An error in what was requested or found, worded for the person who reads it.

    The message says what was asked, what was found and what to do, on one line. Each package derives its
    own kind; the command line prints the message alone and exits with code 2. Credentials in URLs are taken out of
    the message, since it is also kept: in ledgers, logs and reports.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(without_credentials(each) if isinstance(each, str) else each for each in arguments))
