"""A call that travels to a worker as a Dask task, and is made there only by the same code.

The arguments travel as bytes, which nobody unpickles before the code has been compared: not a
worker of another version, and not the scheduler, which would pickle them again in its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dask.utils import funcname
from distributed import get_worker
from distributed.protocol import pickle

from mas_batch.code_version import code_version
from mas_batch.errors import VersionError


class TaskCall:
    """A function and its arguments; call it on a worker.

    Args:
        code: `code_version()` that the worker must have; empty: any.
    """

    def __init__(self, code: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.__name__: str = funcname(function)  # Dask's pages show it
        self._code = code
        self._call = pickle.dumps((function, args, kwargs))

    def __repr__(self) -> str:
        return self.__name__  # Dask logs failed tasks, and the arguments may hold secrets

    def __call__(self, *results: Any) -> Any:
        """Make the call.

        Args:
            results: of other tasks, which come after the arguments.

        Raises:
            VersionError: this worker has other code.
        """
        if self._code and self._code != (own := code_version()):
            worker = get_worker()
            raise VersionError(worker.address, str(worker.name), own, self._code)
        function, args, kwargs = pickle.loads(self._call)
        return function(*args, *results, **kwargs)
