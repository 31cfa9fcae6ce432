"""Rooms packs to token files, for the mixture `data_pipelines.mixtures.rooms`.

    python -m data_pipelines.rooms.prepare [--pack=FILE ...] [--out=DIR] [--tokenizers=DIR]

Without ``--pack``, the two shipped packs. A pack knows its split; several packs of one split are put one after another.
What is finished and was made from the same packs and tokenizers is left alone, so the command may be repeated.

Image features (``tok_imnet@64``) come from a file of codes beside the pack if it was made from this pack and this
tokenizer (``--write-feature-codes`` makes it), and else from the extractor, whose weights not everybody has.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_pipelines import manifest, records
from data_pipelines.rooms import modalities as rooms
from data_pipelines.rooms.pack import SHIPPED, RoomsPack
from fm4m import modalities as modalities_lib
from fm4m.files import complete_file
from fm4m.modalities import Modality

TOKENIZERS = pathlib.Path(__file__).parent / "tokenizers"
SPLITS = {"train": "train", "val": "validation"}
# The field of a pack's sample, and the tokenizer's file, of every modality of codes on a grid.
IMAGES = {"tok_rgb@64": "rgb", "tok_depth@64": "depth", "tok_normal@64": "normal", "tok_semseg@64": "semseg"}
FEATURES = "tok_imnet@64"
TEXTS = ("caption", "det")
BATCH = 64


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The file that decides the tokens of a modality; None for pixels."""
    if name in TEXTS:
        return folder / "text.json"
    domain = "features" if name == FEATURES else IMAGES.get(name)
    return folder / f"{domain}.safetensors" if domain else None


def load_image_tokenizer(path: pathlib.Path, modality: Modality):
    """A tokenizer of images. Raises ValueError if its codes are not those of the modality."""
    from fm4m.tokenizers import io

    tokenizer = io.load(path)
    if (tokenizer.vocab_size, tuple(tokenizer.grid)) != (modality.vocab_size, modality.grid):
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} codes on a grid of {tuple(tokenizer.grid)}, but modality "
            f"{modality.name!r} in {rooms.__file__} has {modality.vocab_size} on {modality.grid}: change one of them"
        )
    return tokenizer


# ---- what a pack's samples become


def pixels(pack: RoomsPack) -> Iterator[np.ndarray]:
    """The images as they are, uint8 [64, 64, 3]."""
    return (pack[i]["rgb"] for i in range(len(pack)))


def image_codes(packs: Sequence[RoomsPack], tokenizers: dict, progress: Callable) -> dict[str, np.ndarray]:
    """Codes of the image modalities, uint16 [samples, tokens] each; one pass over the packs.

    Args:
      tokenizers: by modality.
      progress: called with the number of samples done.
    """
    codes = {name: [] for name in tokenizers}
    for pack in packs:
        for start in range(0, len(pack), BATCH):
            samples = [pack[i] for i in range(start, min(start + BATCH, len(pack)))]
            for name, tokenizer in tokenizers.items():
                codes[name].append(tokenizer.encode(np.stack([s[IMAGES[name]] for s in samples])).astype(np.uint16))
            progress(len(samples))
    return {name: np.concatenate(parts) for name, parts in codes.items()}


def feature_codes(pack: RoomsPack, tokenizer_path: pathlib.Path, modality: Modality, progress: Callable) -> np.ndarray:
    """Codes of the image features, uint16 [samples, tokens], from the file beside the pack or from the extractor.

    Raises:
      FileNotFoundError: neither is there; says what to install.
    """
    path, reason = feature_codes_file(pack), "no such file"
    if path.is_file():
        from safetensors import safe_open

        origin = _feature_codes_origin(pack, tokenizer_path)
        with safe_open(path, "np") as file:
            stale = [key for key, value in origin.items() if (file.metadata() or {}).get(key) != value]
            if not stale:
                progress(len(pack))
                return file.get_tensor("codes")
        reason = f"made from another {' and '.join(stale)}"
    from data_pipelines.features import load_features

    try:
        features = load_features(pack.path)
    except (ImportError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{pack.path}: {modality.name!r} needs the codes in {path} ({reason}) or else the feature extractor, which "
            f"cannot be used: {error}"
        ) from error
    tokenizer = load_image_tokenizer(tokenizer_path, modality)
    parts = []
    for start in range(0, len(features), BATCH):
        batch = np.asarray(features[start : start + BATCH], np.float32)
        parts.append(tokenizer.encode(batch).astype(np.uint16))
        progress(len(batch))
    return np.concatenate(parts)


def feature_codes_file(pack: RoomsPack) -> pathlib.Path:
    """``feature_codes_train.safetensors`` beside ``rooms_train.zip``."""
    return pack.path.with_name(f"feature_codes_{pack.path.stem.removeprefix('rooms_')}.safetensors")


def _feature_codes_origin(pack: RoomsPack, tokenizer_path: pathlib.Path) -> dict[str, str]:
    return {"pack": sha256(pack.path), "tokenizer": sha256(tokenizer_path)}


def write_feature_codes(pack: RoomsPack, tokenizer_path: pathlib.Path) -> pathlib.Path:
    """Writes the file that lets others prepare the pack without the extractor's weights."""
    from safetensors.numpy import save_file

    path = feature_codes_file(pack)
    path.unlink(missing_ok=True)
    codes = feature_codes(pack, tokenizer_path, modalities_lib.get(FEATURES), lambda n: None)
    with complete_file(path) as beside:
        save_file({"codes": codes}, beside, metadata=_feature_codes_origin(pack, tokenizer_path))
    return path


def texts(pack: RoomsPack, name: str, tokenizer, modality: Modality) -> list[list[int]]:
    """Ids of the captions or boxes of a pack, each with [EOS].

    Boxes that do not fit are left out, smallest first. A caption that does not fit is cut before its [EOS].
    """
    from fm4m.transforms import boxes

    limit, ids = modality.max_tokens, []
    for i in range(len(pack)):
        meta = pack.meta(i)
        if name == "caption":
            words = tokenizer.encode(meta["caption"])
            ids.append(words if len(words) <= limit else [*words[: limit - 1], words[-1]])
            continue
        found = [boxes.Box(*b["boxes"], b["class_name"], b["score"]) for b in meta["instances"]]
        found.sort(key=lambda box: -box.area)
        while len(words := boxes.to_ids(found, tokenizer)) > limit:
            found.pop()
        ids.append(words)
    return ids


# ---- writing


def prepare_split(packs: Sequence[RoomsPack], out: pathlib.Path, tokenizers: pathlib.Path) -> list[str]:
    """Writes the token files of one split, those that are not there yet.

    Returns:
      Names of the modalities that were written.

    Raises:
      ValueError: the folder was prepared from other packs, or a tokenizer does not fit its modality.
      FileNotFoundError: a tokenizer, or what the image features need, is missing.
    """
    from tqdm import tqdm

    split = SPLITS[packs[0].info["split"]]
    origins = _origins(packs, tokenizers)
    todo = [name for name in rooms.MODALITIES if not _finished(out, split, name, origins)]
    if not todo:
        return []
    # Several packs may number their samples alike.
    keys = [f"{pack.path.stem}/{key}" for pack in packs for key in pack.keys]
    chosen = {name: modalities_lib.get(name) for name in todo}
    images = [name for name in todo if name in IMAGES]
    steps = bool(images) + (FEATURES in todo) + ("rgb@64" in todo)
    with tqdm(total=len(keys) * steps, desc=f"rooms {split}", unit="sample", disable=None) as bar:
        arrays: dict[str, Sequence | Iterator] = {}
        if images:
            loaded = {n: load_image_tokenizer(tokenizer_file(tokenizers, n), chosen[n]) for n in images}
            arrays |= image_codes(packs, loaded, bar.update)
        if FEATURES in todo:
            path = tokenizer_file(tokenizers, FEATURES)
            arrays[FEATURES] = np.concatenate([feature_codes(p, path, chosen[FEATURES], bar.update) for p in packs])
        for name in [n for n in todo if n in TEXTS]:
            tokenizer = load_text_tokenizer(tokenizer_file(tokenizers, name), chosen[name])
            arrays[name] = [np.array(ids) for pack in packs for ids in texts(pack, name, tokenizer, chosen[name])]
        if "rgb@64" in todo:
            arrays["rgb@64"] = _counted((image for pack in packs for image in pixels(pack)), bar.update)
        for name in todo:
            origin = origins[name]
            records.write_modality(out, split, chosen[name], arrays[name], keys, overwrite=True, made_from=origin)
    return todo


def load_text_tokenizer(path: pathlib.Path, modality: Modality):
    """The text tokenizer. Raises ValueError if its vocabulary is not that of the modality."""
    from fm4m.tokenizers.text import TextTokenizer

    tokenizer = TextTokenizer.load(path)
    if tokenizer.vocab_size != modality.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} ids, but modality {modality.name!r} in {rooms.__file__} has "
            f"{modality.vocab_size}: change one of them"
        )
    return tokenizer


def _counted(arrays: Iterator[np.ndarray], progress: Callable) -> Iterator[np.ndarray]:
    for array in arrays:
        yield array
        progress(1)


def _origins(packs: Sequence[RoomsPack], tokenizers: pathlib.Path) -> dict[str, dict]:
    """What every modality is made from, as hashes; kept in the manifest."""
    hashed = functools.cache(sha256)
    shared = {"packs": [sha256(pack.path) for pack in packs]}
    origins = {}
    for name in rooms.MODALITIES:
        path = tokenizer_file(tokenizers, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{path} is missing: modality {name!r} needs this tokenizer (--tokenizers=FOLDER)")
        origins[name] = shared | ({"tokenizer": hashed(path)} if path is not None else {})
    return origins


def _finished(out: pathlib.Path, split: str, name: str, origins: dict) -> bool:
    """Whether a modality is there, whole, and made from the same packs and tokenizer."""
    if not (out / split / manifest.MANIFEST).is_file():
        return False
    entry = manifest.read_manifest(out, split)["modalities"].get(name)
    if entry is None:
        return False
    if entry["made_from"].get("packs") != origins[name]["packs"]:
        raise ValueError(f"{out / split} was prepared from other packs: delete it, or choose another folder with --out")
    if entry["made_from"] != origins[name]:
        return False
    try:
        records.Records(out, split, modalities_lib.get(name))
    except (ValueError, FileNotFoundError) as error:
        print(f"writing {name} again: {error}")
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the top of this file. Returns the exit code: 0, or 2 with one sentence on standard error."""
    args = _arguments(argv)
    try:
        run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.rooms.prepare", description="Tokens of rooms packs."
    )
    shipped = [SHIPPED / "rooms_train.zip", SHIPPED / "rooms_val.zip"]
    parser.add_argument("--pack", action="append", type=pathlib.Path, help="a pack; may be repeated (default: shipped)")
    parser.add_argument("--out", type=pathlib.Path, default=rooms.ROOT, help="target folder (default: %(default)s)")
    parser.add_argument("--tokenizers", type=pathlib.Path, default=TOKENIZERS, help="folder of the tokenizers")
    parser.add_argument("--write-feature-codes", action="store_true", help="write the feature codes beside the packs")
    args = parser.parse_args(argv)
    args.pack = args.pack or shipped
    return args


def run(args: argparse.Namespace) -> None:
    """Prepares the packs of the command line, split by split."""
    packs = [RoomsPack(path) for path in args.pack]
    for pack in packs:
        if pack.info["split"] not in SPLITS:
            raise ValueError(f"{pack.path} is of split {pack.info['split']!r}, expected one of {', '.join(SPLITS)}")
    if args.write_feature_codes:
        for pack in packs:
            print(f"wrote {write_feature_codes(pack, tokenizer_file(args.tokenizers, FEATURES))}")
        return
    for split in SPLITS:
        of_split = [pack for pack in packs if pack.info["split"] == split]
        if not of_split:
            continue
        written = prepare_split(of_split, args.out, args.tokenizers)
        done = f"wrote {', '.join(written)}" if written else "finished already, nothing to do"
        print(f"{args.out / SPLITS[split]}: {sum(map(len, of_split))} samples, {done}")


if __name__ == "__main__":
    sys.exit(main())
