"""Processes in which a user's code runs, so that it can neither hold up nor end the run."""

from groupwise.workers.pool import Lease as Lease
from groupwise.workers.pool import Pool as Pool
from groupwise.workers.pool import elsewhere as elsewhere
from groupwise.workers.pool import wait_elsewhere as wait_elsewhere
from groupwise.workers.target import Target as Target
from groupwise.workers.threads import Threads as Threads
from groupwise.workers.worker import Failure as Failure
from groupwise.workers.worker import Other as Other
from groupwise.workers.worker import Reply as Reply
from groupwise.workers.worker import WorkerError as WorkerError
