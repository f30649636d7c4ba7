"""Parses the block strings of VDVAE configs, such as "28x6,28d2,14x4". An OptionError says what is wrong with one."""

import itertools
import re
from typing import NamedTuple

from posterior_matching.errors import OptionError


class EncoderLayer(NamedTuple):
    """One block of an encoder."""

    resolution: int
    pool: int = 1  # average over windows of this many pixels, squared, after the block; incomplete ones are dropped

    @property
    def output_resolution(self) -> int:
        """The resolution after pooling."""
        return self.resolution // self.pool


class DecoderLayer(NamedTuple):
    """One block of a decoder."""

    resolution: int
    lower_resolution: int | None = None  # add the state of this resolution, upsampled, before the block


def default_blocks(size: int) -> tuple[str, str]:
    """Returns the blocks of encoder and decoder for images of `size` x `size` pixels: the size is halved down to 1.

    Every resolution has three blocks in the encoder and two in the decoder, 1 has one in each.
    """
    sizes = [size >> i for i in range(size.bit_length())]
    encoder = [f"{larger}x2,{larger}d{larger // smaller}" for larger, smaller in itertools.pairwise(sizes)]
    decoder = [f"{larger}m{smaller},{larger}x1" for larger, smaller in itertools.pairwise(sizes)]
    return ",".join([*encoder, "1x1"]), ",".join(["1x1", *decoder[::-1]])


def parse_blocks(blocks: str, letter: str, option: str) -> list[tuple[int, int | None]]:
    """Parses a block string: `RxN` is N blocks at resolution R, `RdK` or `RmK` one block that changes resolution.

    The letter is "d" or "m". Returns R and K of every block; K is None unless the block changes resolution.
    """
    parsed: list[tuple[int, int | None]] = []
    for part in blocks.split(","):
        match = re.fullmatch(rf"([1-9]\d*)(x|{letter})([1-9]\d*)", part.strip())
        if not match:
            raise OptionError(
                option,
                f"{{}}: '{part.strip()}' is neither RxN (N blocks at resolution R) nor R{letter}K, as in 28x6,"
                f"{'28d2,14x4' if letter == 'd' else '28m14'}",
            )
        resolution, number = int(match[1]), int(match[3])
        parsed += [(resolution, None)] * number if match[2] == "x" else [(resolution, number)]
    return parsed


def parse_encoder(blocks: str, size: int) -> list[EncoderLayer]:
    """Parses the encoder's blocks for images of `size` x `size` pixels.

    Each block is at the resolution after the one before.
    """
    layers: list[EncoderLayer] = []
    for resolution, pool in parse_blocks(blocks, "d", "encoder"):
        expected = layers[-1].output_resolution if layers else size
        if resolution != expected:
            raise OptionError("encoder", f"{{}}: a block of resolution {resolution} where the image has {expected}")
        if pool is not None and not 2 <= pool <= resolution:
            raise OptionError(
                "encoder",
                f"{{}}: {resolution}d{pool} pools over {pool} of {resolution} pixels; it must be 2..{resolution}",
            )
        layers.append(EncoderLayer(resolution, pool or 1))
    return layers


def encoder_resolutions(layers: list[EncoderLayer]) -> list[int]:
    """The resolutions of the encoder's outputs, from fine to coarse."""
    return list(dict.fromkeys([layers[0].resolution] + [layer.output_resolution for layer in layers]))


def parse_decoder(blocks: str, size: int, resolutions: list[int]) -> list[DecoderLayer]:
    """Parses the decoder's blocks for images of `size` x `size` pixels and an encoder with these `resolutions`.

    Blocks use resolutions that the encoder has and, for `RmK`, that the decoder has reached; the last has the image's.
    """
    layers = [DecoderLayer(*block) for block in parse_blocks(blocks, "m", "decoder")]
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
    """Returns the width at every resolution: `width` except where `widths`, such as "14:128,7:256", says otherwise."""
    width_at = dict.fromkeys(resolutions, width)
    for part in filter(None, widths.split(",")):
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", part.strip())
        if not match or int(match[1]) not in width_at:
            raise OptionError(
                "custom_widths",
                f"{{}}: '{part.strip()}' is not resolution:width, as in 14:128, "
                f"with one of the resolutions {resolutions}",
            )
        width_at[int(match[1])] = int(match[2])
    return width_at
