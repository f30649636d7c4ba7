"""The block strings of VDVAE configs, such as "28x6,28d2,14x4": which blocks stand at which resolution."""

import re
from typing import NamedTuple

from posterior_matching.errors import OptionError


class Layer(NamedTuple):
    """One block of an encoder or decoder, as a block string describes it."""

    resolution: int
    change: int | None  # encoder: pool this many pixels after the block; decoder: add the state of this resolution


def parse_blocks(blocks: str, letter: str, option: str) -> list[Layer]:
    """Parses a block string: `RxN` is N blocks at resolution R, `RdK` or `RmK` one block that changes resolution.

    Args:
        blocks: Such as "28x6,28d2,14x4".
        letter: What marks a block that changes resolution, "d" or "m".
        option: Its name, for messages.

    Raises:
        OptionError: A part is neither.
    """
    layers: list[Layer] = []
    for part in blocks.split(","):
        match = re.fullmatch(rf"([1-9]\d*)(x|{letter})([1-9]\d*)", part.strip())
        if not match:
            raise OptionError(
                option,
                f"{{}}: '{part.strip()}' is neither RxN (N blocks at resolution R) nor R{letter}K, as in 28x6,"
                f"{'28d2,14x4' if letter == 'd' else '28m14'}",
            )
        resolution, number = int(match[1]), int(match[3])
        layers += [Layer(resolution, None)] * number if match[2] == "x" else [Layer(resolution, number)]
    return layers


def parse_encoder(blocks: str, size: int) -> list[Layer]:
    """Parses the encoder's blocks for images of `size` x `size` pixels.

    Raises:
        OptionError: It is malformed, or a block is not at the resolution that the blocks before it lead to.
    """
    layers = parse_blocks(blocks, "d", "encoder")
    resolution = size
    for layer in layers:
        if layer.resolution != resolution:
            raise OptionError(
                "encoder", f"{{}}: a block of resolution {layer.resolution} where the image has {resolution}"
            )
        if layer.change is not None:
            if not 2 <= layer.change <= resolution:
                raise OptionError(
                    "encoder",
                    f"{{}}: {resolution}d{layer.change} pools over {layer.change} of {resolution} pixels; "
                    f"it must be 2..{resolution}",
                )
            resolution //= layer.change  # what does not fill a window is dropped
    return layers


def encoder_resolutions(layers: list[Layer]) -> list[int]:
    """The resolutions of the encoder's outputs, from fine to coarse."""
    return list(dict.fromkeys([layers[0].resolution] + [r // (k or 1) for r, k in layers]))


def parse_decoder(blocks: str, size: int, resolutions: list[int]) -> list[Layer]:
    """Parses the decoder's blocks for images of `size` x `size` pixels and an encoder with these `resolutions`.

    Raises:
        OptionError: It is malformed, needs a resolution that the encoder does not have or the decoder has not yet, or
            does not end at that of the image.
    """
    layers = parse_blocks(blocks, "m", "decoder")
    reached: set[int] = set()
    for resolution, lower in layers:
        if resolution not in resolutions:
            raise OptionError("decoder", f"{{}}: resolution {resolution} is none of the encoder's: {resolutions}")
        if lower is not None and (lower not in reached or lower >= resolution):
            raise OptionError(
                "decoder", f"{{}}: {resolution}m{lower} needs an earlier block of a lower resolution {lower}"
            )
        reached.add(resolution)
    if layers[-1].resolution != size:
        raise OptionError("decoder", f"{{}}: the last block has resolution {layers[-1].resolution}, the image {size}")
    return layers


def parse_widths(widths: str, width: int, resolutions: list[int]) -> dict[int, int]:
    """Returns the width at every resolution: `width`, but for the exceptions in `widths`, such as "14:128,7:256".

    Raises:
        OptionError: A part is malformed, or its resolution is not among `resolutions`.
    """
    found = dict.fromkeys(resolutions, width)
    for part in filter(None, widths.split(",")):
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", part.strip())
        if not match or int(match[1]) not in found:
            raise OptionError(
                "custom_widths",
                f"{{}}: '{part.strip()}' is not resolution:width, as in 14:128, "
                f"with one of the resolutions {resolutions}",
            )
        found[int(match[1])] = int(match[2])
    return found
