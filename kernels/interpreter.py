"""Triton's interpreter, mended: with TRITON_INTERPRET=1 the kernels run on a CPU."""


def mend() -> None:
    """Triton 3.6 keeps a scalar as an array of shape (1,), which numpy >= 2.4 lets nobody use as the bound of a range.

    Triton 3.9 squeezes it first; on a GPU a bound is no array at all."""
    from triton.runtime import interpreter

    real = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        real(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
