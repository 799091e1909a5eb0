"""How training stops by its own doing. Light: the controller imports it, and errors travel by it.

Neither Lightning nor torch is imported here.
"""

from orchestrator.config import UserError

# What PyTorch, cuBLAS and cuDNN say where they raise no error of a class of its own.
_SAID = (
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "cuda error: out of memory",
    "cuda out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


class Diverged(UserError):
    """A loss or the weights became NaN or infinite: another start would only meet it again."""


class OutOfMemory(MemoryError):
    """A micro-batch did not fit a worker's memory; a smaller one may.

    Args:
        setting: the field that bounds it: data.max_micro_batch or data.eval_batch.
        size: its samples, at least 2.
        step: the optimizer step that it was part of.
        said: the allocator's own words.
    """

    def __init__(self, setting: str, size: int, step: int, said: str) -> None:
        super().__init__(setting, size, step, said)  # so that it is pickled whole
        self.setting, self.size, self.step, self.said = setting, size, step, said

    @property
    def smaller(self) -> int:
        """Samples to try next."""
        return self.size // 2

    def __str__(self) -> str:
        return (
            f"out of memory at step {self.step} with {self.size} samples at once "
            f"({self.setting}): {self.said}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the machine has no memory left to give.

    By the names and words of PyTorch 2.14: torch.OutOfMemoryError, MemoryError, and plain
    RuntimeErrors of the CPU's allocator, of cuBLAS and of cuDNN.
    """
    if isinstance(error, MemoryError):
        return True
    kind = type(error)
    if kind.__name__ == "OutOfMemoryError" and kind.__module__.split(".")[0] == "torch":
        return True
    if not isinstance(error, RuntimeError):
        return False
    words = str(error).lower()
    return any(said in words for said in _SAID)
