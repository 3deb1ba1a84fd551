"""What a backend says of itself; `eager` serves the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_FUNCTIONS = (
    "vocab_pass", "paired_vocab_pass", "weight_grad", "paired_weight_grad", "gather_logits", "gather_backward"
)  # fmt: skip
FUNCTIONS = (*HEAD_FUNCTIONS, "listwise")
FORMS = ("ranking", "ratings")


@dataclass(frozen=True)
class Serves:
    """The declaration `SERVES` of a backend module. None: no limit.

    A call that it does not cover goes to `eager` under "auto", with one line in the log, and is refused where the
    backend was asked for by name. Both may serve halves of one loss: what they hand each other is the same.
    """

    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None  # of hidden states and weight; of the logits in `listwise`
    functions: tuple[str, ...] = FUNCTIONS  # those of `eager` that the module has
    softcap: bool = True  # a soft-cap of the logits, in all functions of the head
    forms: tuple[str, ...] = FORMS  # of `listwise`, as are those below
    divergences: tuple[str, ...] | None = None  # besides "none", which every backend serves
    mask_emitted: bool = True
    longest_list: int | None = None  # candidates, and grades

    def declines_tensors(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why not tensors of this device and dtype, in a few words; None: they are served."""
        if self.devices is not None and device.type not in self.devices:
            return f"its kernels run on {' and '.join(self.devices)}, not on {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"its kernels take {', '.join(map(_name, self.dtypes))}, not {_name(dtype)}"
        return None

    def declines_head(self, function: str, softcap: float | None) -> str | None:
        """What of a call of one of HEAD_FUNCTIONS is not served; None: it is."""
        if function not in self.functions:
            return function
        return "a soft-cap" if softcap is not None and not self.softcap else None

    def declines_lists(self, form: str, divergence: str, mask_emitted: bool, longest: int) -> str | None:
        """What of a call of `listwise` is not served; None: it is. longest: candidates or grades, the larger number."""
        if "listwise" not in self.functions:
            return "listwise"
        if form not in self.forms:
            return f"the {form} form"
        if divergence != "none" and self.divergences is not None and divergence not in self.divergences:
            return f"divergence {divergence!r}"
        if mask_emitted and not self.mask_emitted:
            return "mask_emitted"
        if self.longest_list is not None and longest > self.longest_list:
            return f"lists of more than {self.longest_list} candidates or grades"
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
