"""Every error a user can cause, and the exit code each one ends the program with.

    DpoDistError
      ConfigError               a setting is wrong                                exit 2
      DataError                 a file or a row is wrong                          exit 2
      ModelError                a model or tokenizer folder is wrong              exit 2
      CheckpointError           a named checkpoint is not usable                  exit 2
        NoUsableCheckpointError checkpoints exist, none can be trusted            exit 3
        StorageError            the disk is full, or cannot be written            exit 1
      NumericsError             a number the run proves about itself is off       exit 1
      FolderInUseError          another run trains in the run's folder            exit 1
      RankMismatchError         ranks do not agree on what they compute           exit 1
      PeerLostError             another rank is gone or hangs                     exit 1
      WorkerLostError           a process that tokenises is gone                  exit 1

A message says what is wrong as `<path>=<value> <what>; <what would be right>`; data errors name file:line. Each class
also inherits its standard-library type, and carries plain strings only, so that it can be pickled.
"""


class DpoDistError(Exception):
    """Base of all errors that are shown to the user without a traceback."""

    exit_code = 2


class ConfigError(DpoDistError, ValueError):
    """A key or value of the run's configuration is wrong."""


class DataError(DpoDistError, ValueError):
    """A data file or a row of it cannot be used."""


class ModelError(DpoDistError, ValueError):
    """A model or tokenizer cannot be loaded, or its architecture is not supported."""


class CheckpointError(DpoDistError, RuntimeError):
    """A folder named by the user is not a checkpoint of this run, or is damaged."""


class NoUsableCheckpointError(CheckpointError):
    """The run has checkpoints, and none of them passes verification."""

    exit_code = 3


class StorageError(CheckpointError):
    """The disk is full or fails: nobody's mistake, and another attempt may succeed."""

    exit_code = 1


class FolderInUseError(DpoDistError, RuntimeError):
    """Another run trains in the same folder: it may have ended at the next attempt."""

    exit_code = 1


class NumericsError(DpoDistError, ArithmeticError):
    """The run's proof of itself failed, or a value is not finite."""

    exit_code = 1


class PeerLostError(DpoDistError, RuntimeError):
    """Another rank is gone or hangs: nobody's mistake here, and another attempt may succeed."""

    exit_code = 1


class NothingHeldOutError(DataError):
    """Of a data set that `data.holdout` divides, one side has nothing that can be used."""


class RankMismatchError(DpoDistError, RuntimeError):
    """Ranks disagree on the step, the configuration or the data."""

    exit_code = 1


class WorkerLostError(DpoDistError, RuntimeError):
    """A process that prepares data was ended from outside, most likely for want of memory."""

    exit_code = 1
