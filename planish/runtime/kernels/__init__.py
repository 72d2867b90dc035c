"""Generated kernels: templates in TIR for CPUs, compiled ahead of time; see :mod:`planish.runtime.kernels.template`."""
