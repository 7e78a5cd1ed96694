"""Ways in which a run ends early; each message is one line that says what to do."""


class TrainingError(ValueError):
    """A run that cannot go on; the message says what to do."""


class InterruptedRunError(KeyboardInterrupt):
    """The run was asked to stop and saved a checkpoint; the same command goes on.

    A KeyboardInterrupt, and so no Exception: code that expects any error, as around the decoding
    of an image, must not take it for one.

    Args:
        message: Where it stopped.
        signal_number: What asked it to: SIGINT (Ctrl-C) or SIGTERM.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)  # both, or it could not be unpickled
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[0])


class RollBackError(RuntimeError):
    """The stage goes back to its last good checkpoint; never leaves the package.

    Args:
        step: The step, counted from 1, whose loss or gradient was not as it should be.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"roll back from step {step}")
        self.step = step
