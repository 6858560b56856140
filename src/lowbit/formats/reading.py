"""How a layer reads its input: rotated, rounded to few bits, both or neither.

With a rotation R, a layer computes W x as (W R.T)(R x). Outliers of x are spread over all channels
of R x, so that rounding R x loses less than rounding x. Source: QuaRot (arXiv 2404.00456), section
4. Layers and the methods that make them use the same code, so that a layer reads in a forward what
it read when it was made.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from lowbit.config import Config
from lowbit.formats.activation import Activation
from lowbit.formats.incoherence import Rotation, rotate_hessian, rotation


class InputRotation(Config):
    """Multiplies each token by random signs and an orthogonal transform: a part of a layer's entry.

    R x = B.T S x, with S and B as `formats/incoherence.py` describes them.

    kind: of the transform B; the width of the input decides the rest of it.
    seed: of the signs S.
    """

    model_config = ConfigDict(strict=True)

    kind: Literal["hadamard", "hartley"]
    seed: Annotated[int, Field(ge=0, lt=2**53)]

    def of_width(self, width: int) -> Rotation:
        """Returns the rotation. Raises ValueError if there is no Hadamard matrix of this width."""
        return rotation(width, self.seed, self.kind)


@dataclass(frozen=True)
class Reading:
    """How a layer reads its input.

    activation: how it rounds the (rotated) input; None: it does not.
    rotation: how it rotates the input first; None: it does not.
    """

    activation: Activation | None = None
    rotation: Rotation | None = None

    @property
    def entry(self) -> InputRotation | None:
        """The rotation as a part of a layer's entry."""
        side = self.rotation
        if side is None:
            return None
        return InputRotation.model_validate({"kind": side.kind, "seed": side.seed})

    def rotated(self, x: Tensor) -> Tensor:
        """Returns R x for each token: (..., in), in float32, or in float64 if x is."""
        assert self.rotation is not None
        return self.rotation.apply(x if x.dtype == torch.float64 else x.float())

    def prepared(self, x: Tensor) -> Tensor:
        """Returns what the rotated weight is multiplied by, R x rounded: (..., in)."""
        x = x if self.rotation is None else self.rotated(x)
        return x if self.activation is None else self.activation.round(x)

    def seen(self, x: Tensor) -> Tensor:
        """Returns x as the layer sees it: `prepared`, rotated back. (..., in)

        The layer's product is that of its weight with this.
        """
        if self.activation is None:
            return x
        return self.prepared(x) if self.rotation is None else self.rotation.undo(self.prepared(x))

    def rotate_weight(self, weight: Tensor) -> Tensor:
        """Returns W R.T of a weight W: (out, in)."""
        return weight if self.rotation is None else self.rotation.apply(weight)

    def restore_weight(self, weight: Tensor) -> Tensor:
        """Returns W of W R.T: (out, in)."""
        return weight if self.rotation is None else self.rotation.undo(weight)

    def rotate_hessian(self, hessian: Tensor) -> Tensor:
        """Returns R H R.T of a Hessian H: (in, in)."""
        return hessian if self.rotation is None else rotate_hessian(hessian, self.rotation)
