"""The mixed-adapter product, one semantics, several implementations.

Semantics, for every row ``b`` whose adapter ``k = segments.adapter_of_row[b]`` is not -1::

    y[b, out_m] += sum_j  scale[k, j] * (x[b] @ A[m, p(k, j)]) * B[m][p(k, j)]

for every member ``m`` of a fused group (q, k, v share ``x``), where ``p(k, j)`` is the pool row that
holds rank row ``j`` of adapter ``k``. Rows with -1 are untouched. Where the pool keeps A and B in 8
bits, each term has the factor ``row_scales[m, p(k, j)]``, too, which every implementation applies to
the rank's sum: the 8-bit numbers themselves are exact in every dtype that is multiplied.

An adapter with column scales ``c`` (DoRA, ``adapters.columns``) then does, to its own rows only::

    y[b, out_m] = c * y[b, out_m] + (1 - c) * bias_m

where ``y`` came as the base's product and ``bias``: c · (W0 x + B A x) + bias.

``reference`` is the oracle of the tests; ``torch_ops`` runs wherever torch runs, one product per
segment; ``triton_ops`` is for GPUs and ``lorary.server.native`` for CPUs: all rows in one call.
"""
