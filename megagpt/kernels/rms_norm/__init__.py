"""Root-mean-square norm, with the residual's addition where there is one."""
