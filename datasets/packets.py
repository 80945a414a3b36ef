"""Parse the first bits of compressed packets: whether decoding can start there, and how many frames a packet has.

The flags of containers are not reliable: AVI flags wrong keyframes, VP8 stores frames that are never shown, DivX stores
two frames in one packet, and broadcast H.264 stores half a frame in each packet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

# Kinds of packets at which decoding can start. Frames stored after an open start but shown before it are lost.
OPEN_START, CLOSED_START = 1, 2

# An MPEG-4 packet up to this size may be a placeholder for a frame stored elsewhere (FFmpeg's limit).
MAX_PLACEHOLDER_BYTES = 19
MAX_EMPTY_BYTES = 7  # an MPEG-4 packet up to this size contains no picture
INTRA, PREDICTED, BIDIRECTIONAL = 0, 1, 2  # types of MPEG-4 pictures
MPEG_INTRA, MPEG_BIDIRECTIONAL = 1, 3  # types of MPEG-1 and MPEG-2 pictures
H264_SLICE, H264_IDR, H264_MESSAGE, H264_PARAMETERS = 1, 5, 6, 7  # types of H.264 units
H264_RECOVERY_POINT = 6  # a type of message
H264_CHROMA_PROFILES = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}
AV1_FRAMES = {3, 6}  # types of AV1 units that begin with a frame's header
HEVC_BROKEN_LINK, HEVC_IDR, HEVC_RANDOM_ACCESS, HEVC_PICTURE = range(16, 19), range(19, 21), range(16, 22), range(32)
# Codecs without B-frames in which each packet is a frame. Other codecs without a parser are not assumed one to one.
SIMPLE_CODECS = {"ffv1", "png"}


class PacketParser:
    """Parses the packets of one stream in storage order.

    Attributes:
        needs_all: Whether `add` needs all packets, or only keyframes.
        starts: Number of each packet at which decoding can start → OPEN_START or CLOSED_START.
        hidden: Numbers of packets whose frames are never shown.
        one_to_one: Whether each packet that is not hidden is one frame.
        reorders: Whether some frame is stored before a frame that is shown earlier; None: unknown.
        packed: Whether FFmpeg's filter `mpeg4_unpack_bframes` is needed to make packets one to one.
    """

    needs_all = True
    reorders: bool | None = False
    packed = False

    def __init__(self, one_to_one: bool = True) -> None:
        self.starts: dict[int, int] = {}
        self.hidden: set[int] = set()
        self.one_to_one = one_to_one

    def add(self, number: int, packet: Any) -> None:
        """Parse packet `number`. Raises IndexError, StopIteration or ValueError if it is malformed."""
        raise NotImplementedError


class KeyframeParser(PacketParser):
    """Codecs whose storage order is the display order and whose keyframes are flagged correctly."""

    needs_all = False

    def add(self, number: int, packet: Any) -> None:
        """See `PacketParser.add`."""
        self.starts[number] = CLOSED_START


class MicrosoftParser(PacketParser):
    """MS-MPEG-4 and WMV1."""

    def add(self, number: int, packet: Any) -> None:
        """See `PacketParser.add`."""
        if memoryview(packet)[0] >> 6 == INTRA:  # the first two bits are the type of the picture
            self.starts[number] = CLOSED_START


class Mpeg2Parser(PacketParser):
    """MPEG-1 and MPEG-2."""

    def add(self, number: int, packet: Any) -> None:
        """See `PacketParser.add`."""
        data = bytes(packet)
        # A picture header is the start code 00 00 01 00, a 10-bit number in display order, and a 3-bit type.
        kind = data[data.index(b"\0\0\1\0") + 5] >> 3 & 7
        self.reorders = self.reorders or kind == MPEG_BIDIRECTIONAL
        if kind == MPEG_INTRA:
            self.starts[number] = OPEN_START


class Mpeg4Parser(PacketParser):
    """MPEG-4 part 2, as DivX and XviD write it.

    In a packed bitstream, a packet may also hold the B-frame that belongs to the next packet. That packet then holds
    either another B-frame, which belongs to the packet after it, or a placeholder.
    """

    moved: int | None = None  # type of the frame of the previous packet that belongs to this one

    def add(self, number: int, packet: Any) -> None:
        """See `PacketParser.add`."""
        data = bytes(packet)
        # The start code of a picture is 00 00 01 B6; the two bits after it are the type.
        types = [data[match.end()] >> 6 for match in re.finditer(rb"\x00\x00\x01\xb6(?=.)", data, re.DOTALL)]
        moved, small = self.moved, len(data) <= MAX_PLACEHOLDER_BYTES
        if moved is None:
            # a small packet may mean that there is no frame
            regular = (len(types) == 1 and not small) or (len(types) == 2 and types[1] == BIDIRECTIONAL)
            self.moved = types[1] if len(types) == 2 else None
        elif len(data) <= MAX_EMPTY_BYTES or (small and types == [PREDICTED]):
            regular, self.moved = True, None
        else:  # FFmpeg's filter and decoder agree only on B-frames that are larger than a placeholder
            regular, self.moved = types == [BIDIRECTIONAL] and not small, BIDIRECTIONAL
        frame = types[0] if moved is None and types else moved
        self.one_to_one &= regular
        self.packed |= len(types) == 2
        self.reorders = self.reorders or BIDIRECTIONAL in types
        if frame == BIDIRECTIONAL and number - 1 in self.starts:
            self.starts[number - 1] = OPEN_START
        if frame == INTRA and moved is None and self.moved is None:
            self.starts[number] = CLOSED_START


class H264Parser(PacketParser):
    """H.264. In streams that may be interlaced, two packets may be the two fields of one frame."""

    reorders = None

    def __init__(self, extradata: bytes | None) -> None:
        super().__init__()
        extradata = extradata or b""
        # In MP4 and Matroska the extradata starts with a byte 1. Byte 4 then holds the size of the length before each
        # unit, byte 5 the number of parameter sets, which follow. Elsewhere, units follow start codes.
        self.prefix = (extradata[4] & 3) + 1 if extradata[:1] == b"\1" else 0
        units = islice(_units(extradata[6:], 2), extradata[5] & 31) if self.prefix else _units(extradata, 0)
        self._read_parameters(next((unit for unit in units if unit[0] & 31 == H264_PARAMETERS), None))

    def add(self, number: int, packet: Any) -> None:
        """See `PacketParser.add`."""
        for unit in _units(memoryview(packet), self.prefix):
            kind = unit[0] & 31  # the lower 5 bits of a unit's first byte are its type
            if kind == H264_PARAMETERS:
                self._read_parameters(bytes(unit))
            elif kind == H264_MESSAGE and _recovers_at_once(bytes(unit)):
                self.starts[number] = OPEN_START
            elif kind in (H264_SLICE, H264_IDR):
                if kind == H264_IDR:
                    self.starts[number] = CLOSED_START
                if self.needs_all:
                    self.one_to_one &= self.slices is not None and not self.slices.is_field(bytes(unit[:20]))
                return  # only the first slice of the picture is needed

    def _read_parameters(self, unit: bytes | None) -> None:
        self.slices = None if unit is None else slice_format(unit)
        self.needs_all = self.slices is None or self.slices.may_be_field


class SliceFormat:
    """The format of slices, from a sequence parameter set `unit` of H.264 (ITU-T H.264, 7.3.2.1.1)."""

    def __init__(self, unit: bytes) -> None:
        bits = Bits(unit[1:])
        profile, _, _, _ = bits.read(8), bits.read(8), bits.read(8), bits.exp_golomb()
        chroma, self.separate_planes = 1, False
        if profile in H264_CHROMA_PROFILES:
            chroma = bits.exp_golomb()
            self.separate_planes = chroma == 3 and bool(bits.read(1))
            bits.exp_golomb(), bits.exp_golomb(), bits.read(1)  # bit depths, transform bypass
            if bits.read(1):
                for number in range(12 if chroma == 3 else 8):
                    if bits.read(1):
                        _skip_scaling_list(bits, 16 if number < 6 else 64)
        self.frame_number_bits = bits.exp_golomb() + 4
        order = bits.exp_golomb()  # how the display order is coded; the fields that follow depend on it
        if order == 0:
            bits.exp_golomb()
        elif order == 1:
            bits.read(1), bits.exp_golomb(), bits.exp_golomb()
            for _ in range(bits.exp_golomb()):
                bits.exp_golomb()
        bits.exp_golomb(), bits.read(1), bits.exp_golomb(), bits.exp_golomb()  # references, gaps, width, height
        self.may_be_field = not bits.read(1)  # the flag says that all pictures are whole frames

    def is_field(self, unit: bytes) -> bool:
        """Return whether a slice, whose first bytes are `unit`, belongs to a field, i.e. half a frame (7.3.3)."""
        bits = Bits(unit[1:])
        bits.exp_golomb(), bits.exp_golomb(), bits.exp_golomb()  # first macroblock, type, picture parameter set
        bits.read(2 * self.separate_planes + self.frame_number_bits)
        return self.may_be_field and bool(bits.read(1))


@lru_cache(256)
def slice_format(unit: bytes) -> SliceFormat:
    """Parse a parameter set; cached, because the files of a dataset share a few."""
    return SliceFormat(unit)


def _skip_scaling_list(bits: Bits, size: int) -> None:
    """Skip a scaling list of `size` entries (7.3.2.1.1.1)."""
    last = scale = 8
    for _ in range(size):
        if scale:
            code = bits.exp_golomb()
            scale = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) % 256
            last = scale or last


def _recovers_at_once(unit: bytes) -> bool:
    """Return whether a unit of messages says that decoding can start here: a recovery point of 0 frames (D.2.8).

    Without it, frames after an I-frame may depend on frames before it.
    """
    unit, position = unit.replace(b"\0\0\3", b"\0\0"), 1
    # A message is a type, a size and its content. Type and size are sums of bytes; all bytes but the last are 255.
    while position + 2 < len(unit):
        kind, size = 0, 0
        while unit[position] == 255:
            kind, position = kind + 255, position + 1
        kind, position = kind + unit[position], position + 1
        while unit[position] == 255:
            size, position = size + 255, position + 1
        size, position = size + unit[position], position + 1
        if kind == H264_RECOVERY_POINT:
            return Bits(unit[position : position + size]).exp_golomb() == 0
        position += size
    return False


class HevcParser(PacketParser):
    """H.265."""

    needs_all = False
    reorders = None

    def __init__(self, extradata: bytes | None) -> None:
        super().__init__()
        # As in H.264, but byte 21 holds the size of the length before each unit.
        self.prefix = (extradata[21] & 3) + 1 if extradata and extradata[0] == 1 else 0

    def add(self, number: int, packet: Any) -> None:
        """See `PacketParser.add`."""
        # Bits 1 to 6 of a unit's first byte are its type.
        kinds = (unit[0] >> 1 & 63 for unit in _units(memoryview(packet), self.prefix))
        kind = next(kind for kind in kinds if kind in HEVC_PICTURE)
        if kind in HEVC_RANDOM_ACCESS:
            self.starts[number] = CLOSED_START if kind in HEVC_IDR else OPEN_START
        # Leading frames of a broken link inside the stream are not shown.
        self.one_to_one &= number == 0 or kind not in HEVC_BROKEN_LINK


class Vp8Parser(PacketParser):
    """VP8 (RFC 6386, 9.1)."""

    def add(self, number: int, packet: Any) -> None:
        """See `PacketParser.add`."""
        first = memoryview(packet)[0]  # bit 4: the frame is shown; bit 0: the frame depends on others
        if not first >> 4 & 1:
            self.hidden.add(number)
        if not first & 1:
            self.starts[number] = CLOSED_START


class Vp9Parser(PacketParser):
    """VP9: a packet may hold several frames, of which one is shown (bitstream specification, annex B)."""

    def add(self, number: int, packet: Any) -> None:
        """See `PacketParser.add`."""
        frames = [Bits(frame) for frame in _vp9_frames(bytes(packet))]
        shown, keyframe = 0, False
        for position, bits in enumerate(frames):
            bits.read(2)  # marker of a frame
            profile = bits.read(1) + 2 * bits.read(1)  # the lower bit is stored first
            bits.read(profile == 3)  # a reserved bit, only in this profile
            if bits.read(1):  # shows a frame that was decoded before
                shown += 1
            else:
                keyframe |= not bits.read(1) and position == 0  # 0: keyframe
                shown += bits.read(1)  # 1: shown
        self.one_to_one &= shown < 2
        if not shown:
            self.hidden.add(number)
        if keyframe:
            self.starts[number] = CLOSED_START


def _vp9_frames(data: bytes) -> list[bytes]:
    """Return the first two bytes of each frame in a packet."""
    # A packet of several frames ends with an index: marker, sizes of the frames, marker. The bits of the marker are
    # 110, the number of bytes of a size minus 1 (2 bits), the number of frames minus 1 (3 bits).
    marker = data[-1]
    count, width = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = data[-2 - count * width :]
    if marker >> 5 != 6 or len(index) != 2 + count * width or index[0] != marker:
        return [data[:2]]
    sizes = [int.from_bytes(index[1 + i * width :][:width], "little") for i in range(count)]
    return [data[sum(sizes[:i]) :][:2] for i in range(count)]


class Av1Parser(PacketParser):
    """AV1 (bitstream specification, 5.3 to 5.9)."""

    def add(self, number: int, packet: Any) -> None:
        """See `PacketParser.add`."""
        shown = 0
        for position, bits in enumerate(_av1_frames(bytes(packet))):
            if bits.read(1):  # shows a frame that was decoded before
                shown += 1
            else:
                kind, visible = bits.read(2), bits.read(1)
                shown += visible
                if position == 0 and packet.is_keyframe and kind == 0 and visible:
                    self.starts[number] = CLOSED_START
        self.one_to_one &= shown < 2
        if not shown:
            self.hidden.add(number)


def _av1_frames(data: bytes) -> Iterator[Bits]:
    """Yield the first bits of each frame header in a packet."""
    position = 0
    while position < len(data):
        # First byte of a unit: bits 3 to 6 are its type, bit 2 says that another header byte follows, bit 1 that a size
        # follows. The size has 7 bits in each byte, the lowest first; the highest bit says that another byte follows.
        first = data[position]
        position += 2 if first & 4 else 1
        size, shift = len(data) - position, 0
        if first & 2:
            size = 0
            while True:
                size |= (data[position] & 127) << shift
                shift, position = shift + 7, position + 1
                if data[position - 1] < 128:
                    break
        if first >> 3 & 15 in AV1_FRAMES:
            yield Bits(data[position : position + 1])
        position += size


class Bits:
    """Reads bits from the front of `data`. Raises ValueError after the last bit."""

    def __init__(self, data: bytes) -> None:
        # Encoders insert a byte 3 after two zero bytes, so that no start code occurs inside a unit.
        data = data.replace(b"\0\0\3", b"\0\0")
        self.value, self.left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        """Return the next `count` bits as a number."""
        self.left -= count
        if self.left < 0:
            raise ValueError("a header ends early")
        return self.value >> self.left & (1 << count) - 1

    def exp_golomb(self) -> int:
        """Return the next number n in the Exp-Golomb code of H.264: k zero bits, then the k + 1 bits of n + 1."""
        zeros = self.left - (self.value & (1 << self.left) - 1).bit_length()
        return self.read(2 * zeros + 1) - 1


def _units(data: Any, prefix: int) -> Iterator[Any]:
    """Yield the units of an H.264 or H.265 packet as slices of `data`.

    Each unit follows a start code, or a length of `prefix` bytes if `prefix` is not 0.
    """
    if not prefix:
        start = None
        for match in re.finditer(rb"\x00\x00\x01(?=.)", data, re.DOTALL):
            if start is not None:
                yield data[start : match.start()]
            start = match.end()
        if start is not None:
            yield data[start:]
        return
    position = 0
    while position + prefix < len(data):
        size = int.from_bytes(data[position : position + prefix], "big")
        position += prefix
        if size:
            yield data[position : position + size]
        position += size


def packet_parser(stream: Any) -> PacketParser:
    """Create a parser for the packets of a PyAV video stream, to be read from the beginning."""
    codec, extradata = stream.codec_context.codec, stream.codec_context.extradata
    name = codec.canonical_name
    if name in EXTRADATA_PARSERS:
        return EXTRADATA_PARSERS[name](extradata)
    return PARSERS[name]() if name in PARSERS else KeyframeParser(codec.intra_only or name in SIMPLE_CODECS)


EXTRADATA_PARSERS: dict[str, Any] = {"h264": H264Parser, "hevc": HevcParser}
PARSERS: dict[str, type[PacketParser]] = {
    "av1": Av1Parser,
    "mpeg1video": Mpeg2Parser,
    "mpeg2video": Mpeg2Parser,
    "mpeg4": Mpeg4Parser,
    "msmpeg4v2": MicrosoftParser,
    "msmpeg4v3": MicrosoftParser,
    "wmv1": MicrosoftParser,
    "vp8": Vp8Parser,
    "vp9": Vp9Parser,
}
