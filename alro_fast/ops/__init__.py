"""Losses' building blocks over the LM head: log-probs, divergences and listwise terms, without [N, V] logits.

Each op is a `torch.library` custom op with a fake implementation and its own autograd (`torch.compile(fullgraph=True)`
works) and is served by a backend: `triton` (CUDA), `cpp` (CPU), `eager` (anything). "auto" takes the first that
can serve the tensors at hand and logs its choice once, for debugging; calls that its declaration (`backends.serves`)
leaves out go to `eager`, with a line of their own. The logits of a row are, everywhere,

    z = softcap(scale * (hidden @ weight.T + bias)),      softcap(x) = cap * tanh(x / cap), or x where cap is None.

With a frozen head the backward pass holds no [V, H] buffer and does no product with the vocabulary: the forward keeps
U = d lse / d hidden, and d logprob(c) / d hidden = w_c - U. A trainable head recomputes its logits tile by tile.
Results are float32 (float64 for float64 input). One rule for every engine: products are in the dtype of `weight`, under
autocast as well (float32 weights are said once then), summed in float32; float32 products are no TF32, whatever torch
allows (`--tf32` is for the trunk).

Values of index tensors (targets, relabelled ids, ranks) are checked where that costs no device synchronisation: on the
CPU, outside torch.compile. On CUDA an id outside the vocabulary is a device-side assertion or undefined.
"""

from .backends.eager import DIVERGENCES
from .dispatch import BACKENDS, available_backends, check_backend, resolve_backend
from .head import HeadStats, head, linear_kl, linear_logprobs, relabel_correction
from .listwise import descending_ranks, listwise, soft_argmax_ranks, soft_lambda

__all__ = [
    "BACKENDS",
    "DIVERGENCES",
    "HeadStats",
    "available_backends",
    "check_backend",
    "descending_ranks",
    "head",
    "linear_kl",
    "linear_logprobs",
    "listwise",
    "relabel_correction",
    "resolve_backend",
    "soft_argmax_ranks",
    "soft_lambda",
]
