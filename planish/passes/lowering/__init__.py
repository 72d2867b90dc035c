"""Exact passes that choose, for a target, the form of a graph that its kernels run fastest. They come last."""
