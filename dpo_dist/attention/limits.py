"""What a model asks of its attention kernel, and what a kernel can do."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of its attention kernel."""

    head_dim: int  # of queries and keys
    value_head_dim: int | None = None  # None: the same
    has_window: bool = False
    has_softcap: bool = False
    has_sinks: bool = False


@dataclass(frozen=True)
class KernelLimits:
    """What a kernel can do forward and backward; what it can only do forward trains nothing and does not count."""

    max_head_dim: int  # every multiple of 8 up to it, keys and values alike
    further_dims: tuple[tuple[int, int], ...] = ()  # of keys and of values
    plain_dim: int | None = None  # a head dimension that it has without window, softcap and sinks only
    has_softcap: bool = True
    has_sinks: bool = False
    kernel: str = "kernel"  # which one the dimensions limit

    def value_width(self, head_dim: int, value_head_dim: int) -> int:
        """What values are to be filled up to for this kernel: as wide as keys, unless it has a narrower kernel."""
        further = (values for keys, values in self.further_dims if keys == head_dim and values >= value_head_dim)
        return min(further, default=head_dim)

    def obstacle(self, needs: Sequence[AttentionNeeds]) -> str | None:
        """The first need that it does not meet; None if it meets all of them."""
        return next((found for need in needs if (found := self._obstacle(need))), None)

    def _obstacle(self, need: AttentionNeeds) -> str | None:
        keys, values = need.head_dim, need.value_head_dim or need.head_dim
        heads = f"heads of dimension {keys}" + (f" with values of {values}" if values != keys else "")
        if values > keys:
            return f"has no kernel for {heads}: values may be narrower than keys, not wider"
        has_dim = keys <= self.max_head_dim or (keys, self.value_width(keys, values)) in self.further_dims
        if keys % 8 or not has_dim:
            return f"has no {self.kernel} for {heads} ({self._dims()})"
        if need.has_softcap and not self.has_softcap:
            return "has no softcap, which the model's architecture needs"
        if need.has_sinks and not self.has_sinks:
            return "has no attention sinks, which the model's architecture needs"
        if keys == self.plain_dim:
            extras = {"window": need.has_window, "softcap": need.has_softcap, "attention sinks": need.has_sinks}
            if wanted := [name for name, is_needed in extras.items() if is_needed]:
                return f"has no backward kernel with {' and '.join(wanted)} for {heads} on this device"
        return None

    def _dims(self) -> str:
        further = [f"{keys} with values up to {values}" for keys, values in self.further_dims]
        return ", or ".join([f"multiples of 8 up to {self.max_head_dim}", *further])
