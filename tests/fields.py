"""The videos in tests/data/field, and a writer of H.264 with each of a frame's two fields in its own packet."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

FIELD = Path(__file__).parent / "data/field"
RUNS = json.loads((FIELD / "frames.json").read_text())
NUMBERS = {name: [n for first, last in runs for n in range(first, last + 1)] for name, runs in RUNS.items()}
BITS = 12


class _NalUnit:
    """A NAL unit of an H.264 stream, written bit by bit."""

    def __init__(self, header: int) -> None:
        self.header, self.bits = header, ""

    def fixed(self, *pairs: tuple[int, int]) -> _NalUnit:
        """Append numbers, as `(value, number of bits)`."""
        self.bits += "".join(format(value, f"0{size}b") for value, size in pairs)
        return self

    def golomb(self, *values: int) -> _NalUnit:
        """Append numbers as unsigned Exp-Golomb codes."""
        for value in values:
            code = format(value + 1, "b")
            self.bits += "0" * (len(code) - 1) + code
        return self

    def align(self) -> _NalUnit:
        """Append zeros up to the next full byte."""
        self.bits += "0" * (-len(self.bits) % 8)
        return self

    def __bytes__(self) -> bytes:
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        return b"\0\0\0\1" + bytes([self.header]) + int(bits, 2).to_bytes(len(bits) // 8, "big")


def field_packets(frames: int) -> list[bytes]:
    """Encode numbered frames of 128 × 32 pixels as uncompressed H.264.

    Every frame has two packets: the upper field, then the lower one.
    """
    sequence_parameters = _NalUnit(0x67).fixed((77, 8), (0, 8), (30, 8)).golomb(0, 0, 2, 1).fixed((0, 1)).golomb(7, 0)
    sequence_parameters.fixed((0b001000, 6))  # frames and fields, no cropping
    picture_parameters = (
        _NalUnit(0x68).golomb(0, 0).fixed((0, 2)).golomb(0, 0, 0).fixed((0, 3)).golomb(0, 0, 0).fixed((0, 3))
    )
    packets = [_field(number, bottom) for number in range(frames) for bottom in (0, 1)]
    packets[0] = bytes(sequence_parameters) + bytes(picture_parameters) + packets[0]
    return packets


def _field(number: int, bottom: int) -> bytes:
    """Encode one field: its eight columns are bright or dark as the bits of `number`."""
    is_key = not number and not bottom
    unit = _NalUnit(0x65 if is_key else 0x61).golomb(0, 7, 0).fixed((number % 16, 4), (1, 1), (bottom, 1))
    if is_key:
        unit.golomb(0)
    unit.fixed((0, 2 if is_key else 1)).golomb(0)
    for column in range(8):
        unit.golomb(25).align()  # a macroblock of raw pixels
        unit.bits += format(200 if number >> column & 1 else 50, "08b") * 256 + format(128, "08b") * 128
    return bytes(unit)


def write_fields(path: Path, frames: int) -> Path:
    """Write `field_packets` with timestamps; with the suffix `.h264`, write the raw stream without them."""
    packets = field_packets(frames)
    raw = path.with_suffix(".h264")
    raw.write_bytes(b"".join(packets))
    if path != raw:
        with av.open(str(raw)) as source, av.open(str(path), "w") as target:
            stream: Any = target.add_stream_from_template(source.streams.video[0])
            for number, content in enumerate(packets):
                packet = av.Packet(content)
                packet.stream, packet.time_base = stream, Fraction(1, 50)
                packet.pts = packet.dts = number
                packet.is_keyframe = not number
                target.mux(packet)
    return path
