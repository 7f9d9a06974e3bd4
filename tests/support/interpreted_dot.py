"""Products of Triton's interpreter whose bits do not depend on the machine.

It leaves them to numpy, whose BLAS sums up a row in another order by where in the matrix the row lies, on some
processors (OpenBLAS 0.3.31 on an AMD EPYC of the fifth generation). A tensor core does not, so tests that compare bits
would blame the kernels.
"""

from typing import Any

import numpy as np


def use_double_products() -> None:
    """Has the interpreter of this process compute products in float64 and round once, which orders of 64 terms and more
    change in one of some hundred million results. To be called before a kernel runs."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
