"""From the tokens of a set back to pictures and texts: which tokenizer belongs to a modality, and what it shows."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from data_pipelines.show.opened import Origin
from fm4m.modalities import Modality
from fm4m.pictures import Shower
from fm4m.tokenizers import preprocess
from fm4m.transforms import boxes

# Sets made with a tokenizer that fm4m ships find it by its hash.
SHIPPED = pathlib.Path(__file__).parents[1] / "rooms" / "tokenizers"


@functools.cache
def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_tokenizer(
    modality: Modality, origin: Origin | None, folder: pathlib.Path | None = None
) -> tuple[pathlib.Path | None, str]:
    """The file of a modality's tokenizer.

    Looked for in this order: the path that the preparation stored in the manifest (``tokenizer_file``, as it is or
    relative to the set), a file in ``folder`` or among the shipped ones with the stored hash (``tokenizer``), and a
    file in ``folder`` named ``<modality>``, ``<domain>`` or, for sequences, ``text``. The domain of ``tok_depth@224``
    is ``depth``.

    Returns:
      The path or None, and what there is to say about it ("" if nothing).
    """
    made_from = dict(origin.made_from) if origin else {}
    stored, wanted = made_from.get("tokenizer_file"), made_from.get("tokenizer")
    suffix = ".json" if modality.kind == "sequence" else ".safetensors"

    def fits(path: pathlib.Path) -> bool:
        return not _is_hash(wanted) or _sha256(path) == wanted

    found = None
    if stored and origin:
        places = (pathlib.Path(), origin.folder, origin.folder.parent)
        found = next((place / stored for place in places if (place / stored).is_file()), None)
    if (found is None or not fits(found)) and _is_hash(wanted):
        files = [p for place in (folder, SHIPPED) if place for p in sorted(place.glob(f"*{suffix}"))]
        found = next((p for p in files if fits(p)), found)
    if found is None and folder:
        domain = modality.name.removeprefix("tok_").partition("@")[0]
        stems = [modality.name, domain, *(["text"] if suffix == ".json" else [])]
        found = next((folder / (s + suffix) for s in stems if (folder / (s + suffix)).is_file()), None)
    if found is None:
        gone = f"; its tokens were made by {stored}, which is not there" if stored else ""
        return None, f"{modality.name}: no tokenizer found{gone} (give --tokenizers=FOLDER), so its codes are shown"
    changed = "" if fits(found) else f"{modality.name}: {found} is not the file that made the tokens (another sha256)"
    return found, changed


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def load_showers(
    modalities: Iterable[Modality], origins: Mapping[str, Origin], folder: pathlib.Path | None = None
) -> tuple[dict[str, Shower], list[str]]:
    """Tokenizers of all discrete modalities that have one, and a sentence about every modality that does not.

    Raises FileNotFoundError if ``folder`` does not exist.
    """
    from fm4m.tokenizers import io, text

    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"--tokenizers={folder} is not a folder")
    load = functools.cache(lambda path: io.load(path) if path.suffix != ".json" else text.TextTokenizer.load(path))
    showers, notes = {}, []
    for modality in modalities:
        if not modality.discrete:
            continue
        path, note = find_tokenizer(modality, origins.get(modality.name), folder)
        notes += [note] if note else []
        if path is None:
            continue
        try:
            tokenizer = load(path)
        except (ValueError, OSError, ImportError) as error:
            notes.append(f"{modality.name}: {error}")
            continue
        if tokenizer.vocab_size != modality.vocab_size:
            notes.append(
                f"{modality.name}: {path} has {tokenizer.vocab_size} codes, the modality {modality.vocab_size}, so its "
                "codes are shown"
            )
            continue
        showers[modality.name] = Shower("text" if modality.kind == "sequence" else "image", tokenizer)
    return showers, notes


def pictures_of(modality: Modality, arrays: Sequence[np.ndarray], shower: Shower | None) -> list[np.ndarray | None]:
    """A uint8 picture [h, w, 3] for every sample of a grid modality, None where the sample lacks it.

    Pixels as they are, codes through their tokenizer; without one, one pixel a code in a colour of its own.

    Raises ValueError if the tokenizer cannot decode the codes.
    """
    present = [i for i, array in enumerate(arrays) if len(array)]
    out: list[np.ndarray | None] = [None] * len(arrays)
    if not present:
        return out
    stack = np.stack([np.asarray(arrays[i]) for i in present])
    if modality.kind == "pixels":
        shown = np.repeat(stack, 3, axis=-1) if stack.shape[-1] == 1 else stack[..., :3]
    elif shower is None:
        shown = preprocess.default_palette(modality.vocab_size)[stack].reshape(len(stack), *modality.grid, 3)
    else:
        tokenizer = shower.tokenizer
        # A tokenizer also decodes the codes of pictures of another size than it was made for.
        grid = None if modality.max_tokens == tokenizer.num_tokens else modality.grid
        shown = tokenizer.to_picture(tokenizer.decode(stack.astype(np.int32), grid))
    for i, picture in zip(present, shown, strict=True):
        out[i] = np.asarray(picture)
    return out


def text_of(ids: np.ndarray, shower: Shower | None, limit: int = 60) -> str:
    """A sequence as text up to its [EOS]; without a tokenizer the first ids as numbers."""
    if shower is not None:
        return shower.tokenizer.decode(ids)
    more = " ..." if len(ids) > limit else ""
    return " ".join(str(int(i)) for i in ids[:limit]) + more


def boxes_of(texts: Sequence[str]) -> list[list[boxes.Box]] | None:
    """The boxes that texts list; None if the texts are something else, that is unless all that they hold is boxes."""
    parsed = [boxes.from_text(text) for text in texts]
    if not any(p.boxes for p in parsed) or any(p.malformed for p in parsed):
        return None
    return [p.boxes for p in parsed]


def boxes_as_text(found: Sequence[boxes.Box]) -> str:
    """Class and corners in percent of the picture: shorter and easier to read than the tokens v0=... v3=..."""
    corners = ((b, *(round(100 * v) for v in (b.xmin, b.ymin, b.xmax, b.ymax))) for b in found)
    return ", ".join(f"{b.class_name} ({x0},{y0})-({x1},{y1})" for b, x0, y0, x1, y1 in corners) or "(no boxes)"
