"""Everything that touches an `nn.Module`."""

from paley import kernels  # which put themselves behind core's ops

__all__ = ["kernels"]
