"""The base of every error that is the user's to mend."""


class CodecError(Exception):
    """A fault in what was asked or found, worded for the person who reads it.

    The message says what was asked, what was found and what to do, on one line. Each room derives its
    own kind; the command line prints the message alone and exits with code 2.
    """
