"""Algorithms that several methods share: rounding, clipping, equivalent transformations.

They choose the numbers; `lowbit.formats` packs them into bits.
"""
