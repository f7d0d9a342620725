"""Opening video containers with PyAV, and what their headers say about frames and time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.contract.errors import UserError
from mmllm.data.media.limits import DEFAULTS, Limits

if TYPE_CHECKING:
    import av

FORMATS = (
    # videos and their raw streams
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv"),
    *("live_flv", "ogg", "asf", "asf_o", "rm", "mxf", "nut", "nuv", "dv", "wtv", "gxf", "swf", "flic", "ivf", "obu"),
    *("h261", "h263", "h264", "hevc", "vvc", "av1", "vc1", "m4v", "mjpeg", "mjpeg_2000", "dirac", "yuv4mpegpipe"),
    # moving and still pictures
    *("gif", "apng", "jpeg_pipe", "png_pipe", "bmp_pipe", "webp_pipe", "tiff_pipe"),
    # formats without pictures, which get an error saying so
    *("mp3", "wav", "flac", "aac", "ac3", "aiff", "amr", "tty"),
)
"""The formats that are opened: each holds everything in one file. Playlists, manifests, file name patterns, network
descriptions and devices (concat, hls, dash, imf, image2, sdp, lavfi, ...) make FFmpeg open other things."""
FROM_ZERO = ("matroska,webm", "asf", "asf_o", "nut")
"""Formats whose duration is the end time of the last frame rather than being counted from the first."""
COUNT_BYTES = 64 << 20
"""Files up to this size without a frame count in the header are counted packet by packet."""
UNEVEN = 0.02
"""From this deviation on, frame count and duration give the rate, not the nominal rate: the frames are uneven."""


def open_container(path: str, limits: Limits = DEFAULTS) -> av.container.InputContainer:
    """Open a local file, never following it to other files or protocols, or explain why it cannot be opened."""
    import av

    # opening decodes a frame where the header alone does not say enough
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(FORMATS)}
    options["max_pixels"] = str(int(limits.pixels))
    try:
        # 'file:' keeps a colon in a name from being taken for a protocol
        container = av.open(f"file:{path}", options=options, metadata_errors="ignore")
    except PermissionError as error:
        raise UserError(path, "no permission to read this file", hint="change its permissions") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        with Path(path).open("rb") as file:
            is_mp4 = file.read(12)[4:8] == b"ftyp"
        if is_mp4:
            hint = "copy or download it again, it is probably cut off"
            raise UserError(
                path, "this mp4 cannot be opened, its index (moov) is missing or damaged", hint=hint
            ) from error
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, av.error.ArgumentError):
            reason = "its header is invalid, or its format is not one of those that are read"
        hint = "a video such as mp4, avi, mkv or webm, or check how the file was made"
        raise UserError(path, f"not a video, it cannot be opened as one ({reason})", hint=hint) from error
    if container.format.name == "tty":
        # FFmpeg draws text files as ANSI art
        container.close()
        raise UserError(path, "not a video but a text file", hint="a video such as mp4, avi, mkv or webm")
    return container


def picture_stream(container: av.container.InputContainer, path: str) -> av.VideoStream:
    """The first video stream that is not the cover picture of an audio file."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            hint = "convert it, for example to H.264 in mp4"
            raise UserError(path, "there is no decoder for this kind of video", hint=hint)
        return stream
    what = "only audio, no video stream" if container.streams.audio else "no video stream"
    raise UserError(path, f"the file has {what}", hint="name a file with pictures")


def header_count(stream: av.VideoStream) -> tuple[int, float]:
    """(frames, frames per second) from the header; (0, 0.0) if it does not give both."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    frames = stream.frames
    container = stream.container.format.name
    if not frames or not rate or container == "gif":
        return 0, 0.0
    # the duration of an avi is guessed if its index is cut off; its frames are even by design
    if stream.duration and container != "avi":
        seconds = stream.duration * float(stream.time_base)
        # a trimmed file also counts the frames before its edit list, which are never shown
        frames = min(frames, max(1, round(seconds * rate)))
        rate = _even_rate(frames, rate, seconds)
    return frames, rate


def count_packets(container: av.container.InputContainer, stream: av.VideoStream, path: str) -> tuple[int, float]:
    """(frames, frames per second) of a file whose header lacks them; leaves the container at its end.

    Small files are counted; if the packets end well before the header's duration, the file is cut off and the duration
    counts, so that reading notices. For big files the duration is trusted.
    """
    import av

    seconds = _length(container)
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    if Path(path).stat().st_size > COUNT_BYTES and seconds and rate:
        return max(1, round(seconds * rate)), rate
    frames, spans = 0, {}
    try:
        for packet in container.demux():
            if not packet.size:
                continue
            frames += packet.stream.index == stream.index
            if packet.pts is None:
                continue
            tick, index = float(packet.time_base), packet.stream.index
            low, high = spans.get(index, (float("inf"), 0.0))
            end = (packet.pts + (packet.duration or 0)) * tick
            spans[index] = (min(low, packet.pts * tick), max(high, end))
    except (av.error.FFmpegError, OSError):
        # cut off in the middle of a packet: the comparison with the duration below detects it
        pass
    low, high = spans.get(stream.index, (0.0, 0.0))
    rate = _even_rate(max(1, frames), rate, high - low) or 25.0
    read = max((span[1] for span in spans.values()), default=0.0) - min(
        (span[0] for span in spans.values()), default=0.0
    )
    if seconds - read > max(0.5, 0.05 * seconds):
        return max(1, round(seconds * rate)), rate
    return max(1, frames), rate


def count_stored(path: str, limits: Limits = DEFAULTS) -> tuple[int, bool]:
    """(stored frames, whether some are stored after a key frame but shown before it); decodes none.

    The latter is called open GOP; a damaged file counts as such, since jumping around in it is not safe.
    """
    import av

    count, leading, key = 0, False, None
    with open_container(path, limits) as container:
        try:
            for packet in container.demux(picture_stream(container, path)):
                count += packet.size > 0
                if packet.pts is None:
                    continue
                if packet.is_keyframe:
                    key = packet.pts
                elif key is not None and packet.pts < key:
                    leading = True
        except (av.error.FFmpegError, OSError):
            leading = True
    return count, leading


def _length(container: av.container.InputContainer) -> float:
    """Seconds from the first frame to the end, from the header; 0.0 if it does not say."""
    seconds, start = float(container.duration or 0) / 1e6, float(container.start_time or 0) / 1e6
    return seconds - start if container.format.name in FROM_ZERO and 0 < start < seconds else seconds


def _even_rate(frames: int, rate: float, seconds: float) -> float:
    """The nominal rate, or frames / seconds if that deviates or there is no nominal rate."""
    if seconds > 0 and (not rate or abs(frames / rate - seconds) > max(2 / rate, UNEVEN * seconds)):
        return frames / seconds
    return rate
