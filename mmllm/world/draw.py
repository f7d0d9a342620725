"""Scene -> frames: [T, S, S, 3] uint8."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mmllm.world.palette import BACKGROUNDS, COLORS
from mmllm.world.scene import Scene, state

ZOOM = 1.7


@lru_cache(maxsize=512)
def mask(shape: str, size: int, pose: str = "") -> np.ndarray:
    """The boolean mask [size, size] of a shape; `pose` turns an arrow."""
    centre = (size - 1) / 2
    y, x = np.mgrid[:size, :size]
    v, u = (y - centre) / (size / 2), (x - centre) / (size / 2)
    match shape:
        case "square":
            return np.ones((size, size), bool)
        case "circle":
            return u**2 + v**2 <= 1.0
        case "triangle":
            return np.abs(u) <= (v + 1) / 2 + 0.05
        case "cross":
            return (np.abs(u) < 0.34) | (np.abs(v) < 0.34)
        case "diamond":
            return np.abs(u) + np.abs(v) <= 1.0
        case "ring":
            return (u**2 + v**2 <= 1.0) & (u**2 + v**2 >= 0.3)
        case "arrow":
            right = ((u >= 0) & (np.abs(v) <= 1 - u)) | ((u < 0) & (np.abs(v) < 0.3))
            return np.rot90(right, ("right", "up", "left", "down").index(pose))
    raise ValueError(f"no shape {shape!r}")


def view(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the camera does to the world: (shift to the right in pixels [T], zoom about the centre [T])."""
    done = np.linspace(0, 1, scene.frames)
    shift, zoom = np.zeros(scene.frames), np.ones(scene.frames)
    if scene.camera in ("left", "right"):
        shift = done * scene.pan * (1 if scene.camera == "left" else -1)
    elif scene.camera == "forward":
        zoom = 1 + (ZOOM - 1) * done
    elif scene.camera == "back":
        zoom = ZOOM - (ZOOM - 1) * done
    return shift, zoom


def scatter(scene: Scene, canvas: np.ndarray, shift: np.ndarray, zoom: np.ndarray) -> None:
    """Draw the world's texture of dots, which makes a moving camera visible, onto canvas [T, S, S, 3]."""
    side, reach = scene.side, scene.side + abs(scene.pan)
    rng = np.random.default_rng(scene.dots)
    count = int(14 * (side + 2 * reach) * side / 48**2)
    y, x = rng.uniform(-0.2 * side, 1.2 * side, count), rng.uniform(-reach, side + reach, count)
    light = np.minimum(np.array(BACKGROUNDS[scene.background]) * 1.3 + 30, 255).astype(np.uint8)
    half = side / 2
    py = np.rint((y - half) * zoom[:, None] + half).astype(int)
    px = np.rint((x - half) * zoom[:, None] + half + shift[:, None]).astype(int)
    frame = np.broadcast_to(np.arange(scene.frames)[:, None], py.shape)
    for dy in range(3):
        for dx in range(3):
            inside = (py + dy >= 0) & (py + dy < side) & (px + dx >= 0) & (px + dx < side)
            canvas[frame[inside], (py + dy)[inside], (px + dx)[inside]] = light


def paste(frame: np.ndarray, shape: str, pose: str, position: tuple[float, float, float, str]) -> None:
    """Draw one thing onto a frame [S, S, 3]; what lies outside is cut off."""
    y, x, size, color = position
    whole = max(round(size), 2)
    top, left = round(y - whole / 2), round(x - whole / 2)
    side = frame.shape[0]
    y0, y1, x0, x1 = max(top, 0), min(top + whole, side), max(left, 0), min(left + whole, side)
    if y0 < y1 and x0 < x1:
        part = mask(shape, whole, pose)[y0 - top : y1 - top, x0 - left : x1 - left]
        frame[y0:y1, x0:x1][part] = COLORS[color]


def render(scene: Scene) -> np.ndarray:
    """The frames of a scene, [T, S, S, 3] uint8."""
    canvas = np.empty((scene.frames, scene.side, scene.side, 3), np.uint8)
    canvas[:] = BACKGROUNDS[scene.background]
    if scene.cut:
        canvas[scene.cut[0] :] = BACKGROUNDS[scene.cut[1]]
    shift, zoom = view(scene)
    if scene.dots:
        scatter(scene, canvas, shift, zoom)
    half = scene.side / 2
    for t, frame in enumerate(canvas):
        z, s = float(zoom[t]), float(shift[t])
        for thing in scene.things:
            position = state(thing, t)
            if position is not None:
                y, x, size, color = position
                seen = ((y - half) * z + half, (x - half) * z + half + s, size * z, color)
                paste(frame, thing.shape, thing.pose, seen)
    if scene.flash:
        color, start, end = scene.flash
        canvas[start:end] = COLORS[color]
    return canvas
