"""The errors a user can meet. Each message says where, what must hold, what was got, and what to do."""


class FedzoError(Exception):
    """Base of every error that fedzo raises on purpose."""


class ConfigError(FedzoError, ValueError):
    """The user's settings or files cannot be used; raised before any work is done."""


class ProtocolError(FedzoError, RuntimeError):
    """A peer sent something that cannot be used, or two peers do not hold the same state."""


class NumericsError(FedzoError, ArithmeticError):
    """A computation left the finite numbers and there is nothing sound to continue with."""


class RunFolderError(FedzoError, OSError):
    """The run folder cannot be read or written."""
