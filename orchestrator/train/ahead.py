"""Driver side: a start's two long waits side by side: for libraries, and for a Ray of its own.

Light: what is wrong with a config's fields, its data or its run is said before either begins.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import ray

from orchestrator import cluster, storage
from orchestrator.config import Config, DataConfig, UserError
from orchestrator.data.sources import read_data
from orchestrator.run import check_same_run, run_uri
from orchestrator.storage import StorageError
from orchestrator.train import fields
from orchestrator.train.finished import is_finished
from orchestrator.train.saving import lease
from orchestrator.train.timing.startup import importing


@contextlib.contextmanager
def prepared(config: Config, *, verbose: bool) -> Iterator[None]:
    """Import what training needs; where Ray is started for it on this machine, beside that.

    Ray starts with 3.3 s of waiting for its processes, torch and Lightning are 2.6 s of imports. A
    cluster that `RAY_ADDRESS` names is joined later, after all checks. Ray is ended again where the
    block raises a UserError.

    Raises:
        UserError: a field, the data or the run cannot work; nothing was started.
    """
    _check(config)
    started = False
    if not is_finished(config, run_uri(config)):
        lease.refuse_while_held(run_uri(config))
        started = _wait(config, verbose=verbose)
    try:
        yield
    except UserError:
        if started:
            ray.shutdown()
        raise


def _check(config: Config) -> None:
    fields.check_config(config)
    config = dataclasses.replace(config, data=absolute(config.data))
    read_data(config.data)
    check_same_run(config)


def _wait(config: Config, *, verbose: bool) -> bool:
    """Wait for libraries, and for Ray where it is to be started; return whether it was."""
    if cluster.is_remote():
        _import_libraries()
        return False
    _check_disk(config)
    # Ray in this thread, since it takes signals. The two import none of the same packages, so
    # that neither meets a module that the other has half imported.
    importer = threading.Thread(target=_import_libraries, name="imports", daemon=True)
    with importing():
        importer.start()
        cluster.connect(verbose=verbose)
        importer.join()
    return True


def _check_disk(config: Config) -> None:
    """Find a disk that is full, or is not ours, before Ray meets it, which does not say so."""
    run = run_uri(config)
    if storage.is_remote(run):
        return
    path = storage.local_path(run)
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        storage.check_writable(str(there))
    except StorageError as error:
        raise UserError(f"storage_path={config.storage_path!r}: {error}") from error


def _import_libraries() -> None:
    with importing():
        import pytorch_lightning  # noqa: F401


def absolute(data: DataConfig) -> DataConfig:
    """Name the data such that every process of the cluster finds it."""
    parts = tuple(
        dataclasses.replace(part, index=storage.absolute(part.index)) for part in data.mix
    )
    index = storage.absolute(data.index) if data.index else ""
    return dataclasses.replace(data, index=index, mix=parts)
