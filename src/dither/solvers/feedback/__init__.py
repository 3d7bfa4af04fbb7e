"""Error feedback: what `gptq` is made of, and what `scales` and `learned` borrow.

Rounding a weight leaves an error at the layer's output; weights that are not rounded yet can be moved so that
they make up for most of it.  Read in this order:

    hessian          what an error costs: H = E[x xᵀ], damped, its columns put in order, factored as F Fᵀ
    cholesky         that factor, by panels, with the same bits on any number of threads
    column_blocks    what each block of columns needs to know of H, before and after the others are rounded
    factor_cache     all of this kept, for layers that share an input
    blocks           one block rounded: compiled loops for scaled levels, `fit` and `snap` for any other codec
    column_feedback  block by block, the best of several fits of the scales, row by row
    refit            with everything rounded, scales and codes in turn while that lowers the loss
    row_feedback     where it is known which outputs matter together: feedback between rows too
    validation       whether the answer beats nearest rounding on inputs that it has not seen

Everything works on rows in float32 and on factors in float64.  A solver is a conductor of these, and knows a
codec by its methods and levels alone.
"""
