"""What kernels of the sorted_group format can multiply, wherever they run."""

from typing import TYPE_CHECKING

from lowbit.formats.sorted_group.reference import top_code

if TYPE_CHECKING:
    from lowbit.formats.sorted_group import SortedGroupLinear

EXACT = 2**31  # integer sums of a group stay below it


def multipliable(layer: "SortedGroupLinear") -> bool:
    """Returns whether integer sums fit in 32 bits, and what the owner prepares is at hand."""
    spec, owner = layer.spec, layer.owner
    if spec.activation is not None:
        size = min(spec.group_size or spec.kept, spec.kept)
        if 2**spec.bits * top_code(spec.activation.bits) * size >= EXACT:
            return False
    # Only the reference asks an offloaded owner for what it prepared.
    return owner is layer or not owner.is_offloaded() or layer.packed.is_meta
