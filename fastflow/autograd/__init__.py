"""One torch.autograd.Function per operation stem, over the kernels of the chosen backend."""
