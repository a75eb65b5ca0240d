"""The same codecs on a GPU, as Triton kernels."""
