"""Which token may see which, and the kernels that compute it.

One function is registered with transformers under our own name, and no mask function: transformers then builds no mask,
and the layout of the micro-batch arrives as a keyword argument, also when a layer is recomputed in backward. Letting
transformers infer packing from position ids would be wrong here: the rejected completion would see the chosen one.

    choice.py     which kernel a run takes, and why not a better one
    limits.py     what a model asks of a kernel, and what a kernel can do
    packages.py   the flash-attn packages, and what each of them can do
    activation.py flash-attn 3 or 4 in the place of torch's own kernels
    interface.py  the function that transformers calls: layout, gathered keys and values, kernel
    gather.py     keys and values of a shared prompt, once per completion
    segments.py   one scaled_dot_product_attention per segment: CPU, and the oracle of the others
    varlen.py     one call over all segments: flash-attn 2, 3, 4 and torch. Not yet run on a GPU

Here is what can be asked without a model class; `interface.py`, which needs one, is imported by its own name.

    T packed tokens   U gathered keys   N query heads   K key/value heads   H head dimension   W of values
    q, k of one segment
"""

from dpo_dist.attention.choice import choose_backend, find_obstacles
from dpo_dist.attention.limits import AttentionNeeds

__all__ = ["AttentionNeeds", "choose_backend", "find_obstacles"]
