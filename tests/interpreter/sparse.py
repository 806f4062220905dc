"""Very large tensors. Pages of memory that are not accessed cost nothing, so only a few programs run."""

from collections.abc import Callable

from torch.utils import deterministic
from triton.runtime import interpreter


def run_only(monkeypatch, programs: Callable[[str, int], range]):
    """Of each launch, run only the programs whose index in the grid's first dimension is in programs(name, count).

    Uninitialised memory is not NaN then, because filling it would access it.
    """
    builder = interpreter.interpreter_builder
    run_grid, set_index = interpreter.GridExecutor.__call__, builder.set_grid_idx
    chosen = [range(0)]

    def run_chosen(self, *args, **kwargs):
        chosen[0] = programs(self.fn.__name__, self.grid[0])
        self.grid = (len(chosen[0]), *self.grid[1:])
        run_grid(self, *args, **kwargs)

    def set_chosen_index(x, y, z):
        set_index(x, y, z)
        builder.grid_idx = (chosen[0][x], y, z)

    monkeypatch.setattr(deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_chosen)
    # On a CPU this would copy every storage onto itself and access all its pages.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(builder, "set_grid_idx", set_chosen_index)
