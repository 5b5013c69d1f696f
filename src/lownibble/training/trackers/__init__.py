"""Trackers: services and files outside of this package that a run reports to (`report_to`), one small file each.

All get the same figures under the same names (`tracker.figures_of`): train/loss, train/learning_rate, train/grad_norm,
train/tokens_per_s, eval/loss and the evaluation's scores, by optimiser step; the run's options when it begins; its record and
adapter when it ends. Credentials, servers and offline modes are each library's own environment variables; the project (MLflow:
experiment) is 'lownibble' where its variable does not name another. A tracker that is not installed is an error before the model
is loaded. One that fails later is dropped with a warning, and the run goes on: an hour of training is worth more than its curves.

Rejected: accelerate's trackers (not all of these libraries, and each call goes to all of them or raises for all of them).
"""

from lownibble.training.trackers.tracker import About, Tracker, Trackers, check

__all__ = ["About", "Tracker", "Trackers", "check"]
