"""What several methods share: rounding, clipping, equivalent transformations. Numbers, no bits."""
