"""The files in tests/data/field, and H.264 whose pictures are two fields in packets of their own."""

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


class _Unit:
    """A unit of an H.264 stream, written bit by bit."""

    def __init__(self, header: int) -> None:
        self.header, self.bits = header, ""

    def fixed(self, *pairs: tuple[int, int]) -> _Unit:
        """Numbers, each with the bits that it takes."""
        self.bits += "".join(format(value, f"0{size}b") for value, size in pairs)
        return self

    def golomb(self, *values: int) -> _Unit:
        for value in values:
            code = format(value + 1, "b")
            self.bits += "0" * (len(code) - 1) + code
        return self

    def align(self) -> _Unit:
        self.bits += "0" * (-len(self.bits) % 8)
        return self

    def __bytes__(self) -> bytes:
        bits = self.bits + "1"
        bits += "0" * (-len(bits) % 8)
        return b"\0\0\0\1" + bytes([self.header]) + int(bits, 2).to_bytes(len(bits) // 8, "big")


def field_packets(frames: int) -> list[bytes]:
    """Numbered frames of 128 × 32 pixels as H.264: two packets a frame, the upper and the lower field, uncompressed."""
    parameters = _Unit(0x67).fixed((77, 8), (0, 8), (30, 8)).golomb(0, 0, 2, 1).fixed((0, 1)).golomb(7, 0)
    parameters.fixed((0b001000, 6))  # frames and fields, nothing cropped
    pictures = _Unit(0x68).golomb(0, 0).fixed((0, 2)).golomb(0, 0, 0).fixed((0, 3)).golomb(0, 0, 0).fixed((0, 3))
    packets = [_field(number, bottom) for number in range(frames) for bottom in (0, 1)]
    packets[0] = bytes(parameters) + bytes(pictures) + packets[0]
    return packets


def _field(number: int, bottom: int) -> bytes:
    key = not number and not bottom
    unit = _Unit(0x65 if key else 0x61).golomb(0, 7, 0).fixed((number % 16, 4), (1, 1), (bottom, 1))
    if key:
        unit.golomb(0)
    unit.fixed((0, 2 if key else 1)).golomb(0)
    for column in range(8):
        unit.golomb(25).align()  # a block of pixels as they are
        unit.bits += format(200 if number >> column & 1 else 50, "08b") * 256 + format(128, "08b") * 128
    return bytes(unit)


def write_fields(path: Path, frames: int) -> Path:
    """Write `field_packets` with a time each, raw where the suffix is `.h264`."""
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
