"""What a sweep is told of a trial that an error ended."""

from orchestrator.config import UserError
from orchestrator.train.errors import Diverged
from orchestrator.train.launch import TrainingFailed
from orchestrator.tune.trial import failure


def test_a_loss_that_is_no_number_ends_its_trial_as_diverged() -> None:
    ended = failure(Diverged("loss is nan at step 3, of samples a; lower the learning rate."))
    assert ended.reason == "failed"
    assert ended.why.startswith("diverged: loss is nan at step 3")


def test_other_errors_are_told_in_their_own_words() -> None:
    assert failure(UserError("data.index: no.")).why == "data.index: no."
    assert failure(TrainingFailed("training failed: X")).why == "training failed: X"
    assert failure(KeyError("label")).why == "KeyError: 'label'"
