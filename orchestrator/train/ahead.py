"""Driver side: a start's two long waits side by side: for libraries, and for a Ray of its own.

Light: what is wrong with a config's fields, its data or its run is said before either begins.
"""

import threading

from orchestrator import cluster
from orchestrator.config import Config
from orchestrator.data.sources import read_data
from orchestrator.run import check_same_run, run_uri
from orchestrator.train import fields
from orchestrator.train.finished import is_finished
from orchestrator.train.saving import lease
from orchestrator.train.timing.startup import importing


def prepare(config: Config, *, verbose: bool) -> None:
    """Import what training needs; where Ray is started for it on this machine, beside that.

    Ray starts with 3.3 s of waiting for its processes, torch and Lightning are 2.6 s of imports. A
    cluster that `RAY_ADDRESS` names is joined later, after all checks.

    Raises:
        UserError: a field, the data or the run cannot work; nothing was started.
    """
    fields.check_config(config)
    read_data(config.data)
    check_same_run(config)
    if is_finished(config, run_uri(config)):
        return
    lease.refuse_while_held(run_uri(config))
    if cluster.is_remote():
        _import_libraries()
        return
    # Ray in this thread, since it takes signals. The two import none of the same packages, so
    # that neither meets a module that the other has half imported.
    importer = threading.Thread(target=_import_libraries, name="imports", daemon=True)
    with importing():
        importer.start()
        cluster.connect(verbose=verbose)
        importer.join()


def _import_libraries() -> None:
    with importing():
        import pytorch_lightning  # noqa: F401
