import pickle
import signal

from hive_vision.training.errors import InterruptedRunError, RollBackError, TrainingError


def test_errors_carry_what_their_handlers_need():
    error = InterruptedRunError("saved", signal.SIGTERM)
    for seen in (error, pickle.loads(pickle.dumps(error))):  # another process's too
        assert (str(seen), seen.signal_number) == ("saved", signal.SIGTERM)
    assert RollBackError(7).step == 7
    assert isinstance(TrainingError("x"), ValueError), "the command line prints its line"


def test_interruption_is_not_taken_for_a_damaged_image():
    """And any command that it reaches ends as after Ctrl-C, without a traceback."""
    assert issubclass(InterruptedRunError, KeyboardInterrupt)
    assert not issubclass(InterruptedRunError, Exception)
