"""Trains the text tokenizer of a rooms pack on its captions.

    python -m fm4m.tokenizers.train_text --pack=data_pipelines/rooms/pack/rooms_train.zip --out=text.json
"""

from __future__ import annotations

from fm4m.tokenizers import text

# Words of 4M's structured text modalities, kept whole so that later packs can use them with the same vocabulary.
STRUCTURE_WORDS = ("point", "polygon", "none", "human", "pose", "shape", "camera", "global")


def main() -> None:
    """Command line: --pack=ZIP --out=JSON [--vocab_size=N]."""
    from absl import app, flags

    pack_flag = flags.DEFINE_string("pack", None, "Rooms pack whose captions and class names are used.")
    out_flag = flags.DEFINE_string("out", None, "Where the JSON goes.")
    size_flag = flags.DEFINE_integer("vocab_size", 4736, "Total number of ids, 4284 of which are fixed.")
    flags.mark_flags_as_required(["pack", "out"])

    def run(_) -> None:
        from data_pipelines.rooms.pack import RoomsPack

        pack = RoomsPack(pack_flag.value)
        captions = [pack.meta(i)["caption"] for i in range(len(pack))]
        tokenizer = text.train_wordpiece(captions, size_flag.value, (*pack.classes, *STRUCTURE_WORDS))
        tokenizer.save(out_flag.value)
        lengths = [len(ids) for ids in tokenizer.encode_batch(captions)]
        print(
            f"{len(captions)} captions, vocabulary {tokenizer.vocab_size}, tokens per caption with [EOS]: "
            f"mean {sum(lengths) / len(lengths):.1f}, largest {max(lengths)}; wrote {out_flag.value}"
        )

    app.run(run)


if __name__ == "__main__":
    main()
