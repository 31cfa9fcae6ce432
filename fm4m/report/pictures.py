"""Sample pictures inside the page: a bounded number of frames, of bounded size, with a slider over the steps."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from etils import epath

from fm4m.report.read import Run

# Frames of one series, bytes of one frame that is taken as it is, width that larger ones are reduced to, and bytes of
# all frames of a page, in base64 a third more.
FRAMES, FRAME_BYTES, WIDTH, BUDGET = 12, 400_000, 1400, 12_000_000
_MAGIC = b"\x89PNG\r\n\x1a\n"


def chosen(count: int, most: int = FRAMES) -> list[int]:
    """Indices of at most ``most`` of ``count`` frames, spread evenly, the first and the newest included."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def sections(run: Run) -> str:
    """A card for each series of pictures of a run; what cannot be shown is added to the run's problems."""
    out, left = [], BUDGET
    for name, found in run.pictures.items():
        frames = []
        # The newest first, so that the budget is spent on it.
        for index in reversed(chosen(len(found))):
            step, path = found[index]
            data = _png(run, path)
            if data and len(data) <= left:
                left -= len(data)
                frames.append((step, data))
        if frames:
            out.append(_card(name, frames[::-1], len(found)))
    return "".join(out)


def _card(name: str, frames: Sequence[tuple[int, bytes]], there: int) -> str:
    images = "".join(
        f'<img class="{"on" if i == len(frames) - 1 else ""}" alt="step {step:,}" loading="lazy" '
        f'src="data:image/{"png" if data.startswith(_MAGIC) else "jpeg"};base64,{base64.b64encode(data).decode()}">'
        for i, (step, data) in enumerate(frames)
    )
    slider = ""
    if len(frames) > 1:
        last = len(frames) - 1
        left_out = f" ({last + 1} of {there} pictures)" if there > len(frames) else ""
        slider = (
            f'<label class="slider">{html.escape(name)}{left_out} <input type="range" min="0" max="{last}" '
            f'value="{last}"><output>step {frames[-1][0]:,}</output></label>'
        )
    else:
        slider = f'<p class="slider">{html.escape(name)}, step {frames[-1][0]:,}</p>'
    return f'<div class="card frames">{slider}{images}</div>'


def _png(run: Run, path: epath.Path) -> bytes:
    """The file if it is a PNG of modest size, else a JPEG of reduced width; b"" if it is no picture."""
    try:
        data = path.read_bytes()
        if not data.startswith(_MAGIC):
            raise ValueError("it is no PNG file")
        from PIL import Image

        if len(data) <= FRAME_BYTES:
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()
            return data
        image = Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGB")
        if image.width > WIDTH:
            image = image.resize((WIDTH, max(1, image.height * WIDTH // image.width)), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=88)
        return encoded.getvalue()
    except Exception as error:  # Pillow raises a dozen kinds for damaged files; each is shown on the page
        run.problems.append(f"pictures/{path.name} cannot be shown: {error}")
        return b""
