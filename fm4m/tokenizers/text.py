"""WordPiece text tokenizer with 4M's special-token layout.

| ids         | tokens                                                      |
|-------------|-------------------------------------------------------------|
| 0..3        | [PAD] [UNK] [SOS] [EOS]                                     |
| 4..203      | [S_0]..[S_199], sentinels of span masking                   |
| 204..4203   | v0=0..v0=999, then v1=, v2=, v3=: coordinates and values    |
| 4204..4283  | the 80 COCO class names, one token each ("dining table")    |
| 4284..      | word pieces                                                 |

Bert normaliser (lower case, accents stripped) and pre-tokeniser, no post-processor: nothing is added on encoding except
the [EOS] that `TextTokenizer.encode` appends. Files are the JSON of the Hugging Face `tokenizers` library, so the
published 30k vocabulary of 4M loads as it is.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import json
import os
import pathlib
import string
from collections.abc import Iterable, Mapping, Sequence

from fm4m.files import complete_file

PAD_ID, UNK_ID, SOS_ID, EOS_ID = 0, 1, 2, 3
CONTROL_TOKENS = ("[PAD]", "[UNK]", "[SOS]", "[EOS]")
NUM_SENTINELS = 200
SENTINEL_OFFSET = len(CONTROL_TOKENS)  # id of [S_0]
FIRST_SENTINEL_ID = SENTINEL_OFFSET + 1  # span masking starts counting at [S_1]
NUM_VALUES = 1000
VALUE_NAMES = ("v0", "v1", "v2", "v3")
VALUE_OFFSET = SENTINEL_OFFSET + NUM_SENTINELS  # id of v0=0; v<k>=<n> is VALUE_OFFSET + 1000 k + n
COCO_OFFSET = VALUE_OFFSET + NUM_VALUES * len(VALUE_NAMES)

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
PIECE_OFFSET = COCO_OFFSET + len(COCO_CLASSES)


def fixed_tokens() -> list[str]:
    """The tokens of ids 0..4283, in order."""
    sentinels = [f"[S_{i}]" for i in range(NUM_SENTINELS)]
    values = [f"{name}={n}" for name in VALUE_NAMES for n in range(NUM_VALUES)]
    return [*CONTROL_TOKENS, *sentinels, *values, *COCO_CLASSES]


def value_id(name: str, number: int) -> int:
    """Id of e.g. v2=17; ValueError for a name that is not v0..v3 or a number outside 0..999."""
    if name not in VALUE_NAMES or not 0 <= number < NUM_VALUES:
        raise ValueError(f"no token {name}={number}: names are {', '.join(VALUE_NAMES)}, numbers 0..{NUM_VALUES - 1}")
    return VALUE_OFFSET + VALUE_NAMES.index(name) * NUM_VALUES + number


class TextTokenizer:
    """Text to ids and back.

    Args:
      backend: a `tokenizers.Tokenizer` of the layout above.
      source: what messages call it, usually its path.

    Raises:
      ValueError: the layout is another one; the message names the first wrong id.
    """

    def __init__(self, backend, source: str = "text tokenizer"):
        self.source = source
        self._backend = backend
        self._check_layout()

    @classmethod
    def load(cls, path: str | os.PathLike) -> TextTokenizer:
        """Reads a tokenizer's JSON; FileNotFoundError, or ValueError for a damaged file or another layout."""
        import tokenizers

        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no text tokenizer {path}; python -m fm4m.tokenizers.train_text makes one")
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text)
            # The library raises bare `Exception` for JSON that does not describe a tokenizer.
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise ValueError(f"{path} is not the JSON of a text tokenizer: {error}") from None
        return cls(backend, str(path))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON file beside its target, then renames it."""
        with complete_file(path) as beside:
            beside.write_text(self._backend.to_str(pretty=False) + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of ids; they are 0..vocab_size-1 without gaps."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, eos: bool = True) -> list[int]:
        """Ids of a text, with [EOS] at the end unless `eos` is False. No other token is added."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [*ids, EOS_ID] if eos else ids

    def encode_batch(self, texts: Sequence[str], eos: bool = True) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        ends = [EOS_ID] if eos else []
        return [e.ids + ends for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], keep_control: bool = False) -> str:
        """Text of ids up to the first [EOS].

        Args:
          ids: integers in 0..vocab_size-1.
          keep_control: show [PAD], [SOS], [EOS] and sentinels, and read on after [EOS]. [UNK] always shows.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        kept = []
        for id_ in map(int, ids):
            if not 0 <= id_ < self.vocab_size:
                raise ValueError(f"{self.source}: id {id_} is outside 0..{self.vocab_size - 1}")
            if not keep_control and id_ == EOS_ID:
                break
            if keep_control or id_ == UNK_ID or id_ >= VALUE_OFFSET:
                kept.append(id_)
        return self._backend.decode(kept, skip_special_tokens=False)

    def _check_layout(self) -> None:
        for id_, token in enumerate(fixed_tokens()):
            found = self._backend.id_to_token(id_)
            if found != token:
                raise ValueError(
                    f"{self.source}: id {id_} is {found!r}, 4M's layout has {token!r} there; "
                    "train it with fm4m.tokenizers.text.train_wordpiece"
                )
        ids = sorted(self._backend.get_vocab(with_added_tokens=True).values())
        for expected, id_ in enumerate(ids):
            if id_ != expected:
                raise ValueError(f"{self.source}: id {expected} is missing or used twice; ids must have no gaps")
        # A post-processor could add tokens of its own, and a value that is cut into pieces is no longer one token.
        if self._backend.encode("").ids:
            raise ValueError(f"{self.source}: encoding an empty text gives tokens; remove its post-processor")
        for id_ in (VALUE_OFFSET + 12, COCO_OFFSET + COCO_CLASSES.index("dining table")):
            token = self._backend.id_to_token(id_)
            if self.encode(token, eos=False) != [id_]:
                raise ValueError(f"{self.source}: {token!r} is not read as the one token with id {id_}")


def learn_pieces(word_counts: Mapping[str, int], count: int) -> list[str]:
    """Word pieces by repeatedly merging the most frequent pair of neighbours (Sennrich et al. 2016, algorithm 1).

    Written here because the trainer of the `tokenizers` library breaks ties by hash order, so that two runs on the
    same captions differ. Ties go to the pair that is first in alphabetical order.

    Args:
      word_counts: how often each (normalised) word occurs.
      count: number of merges wanted.

    Returns:
      At most `count` pieces in the order of their merges, those inside a word with the prefix "##".
    """
    splits = {word: [word[0], *(f"##{c}" for c in word[1:])] for word in word_counts}
    pair_counts: collections.Counter[tuple[str, str]] = collections.Counter()
    pair_words: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for word, pieces in splits.items():
        for pair in itertools.pairwise(pieces):
            pair_counts[pair] += word_counts[word]
            pair_words[pair].add(word)
    # Entries of the heap go stale when counts change; those that no longer agree with `pair_counts` are skipped.
    heap = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)
    learned: dict[str, None] = {}
    while heap and len(learned) < count:
        negative, best = heapq.heappop(heap)
        if -negative != pair_counts[best] or negative == 0:
            continue
        merged = best[0] + best[1].removeprefix("##")
        learned[merged] = None
        changed = set()
        for word in pair_words.pop(best):
            old = splits[word]
            new: list[str] = []
            for piece in old:
                if new and (new[-1], piece) == best:
                    new[-1] = merged
                else:
                    new.append(piece)
            splits[word] = new
            for pairs, sign in ((itertools.pairwise(old), -1), (itertools.pairwise(new), 1)):
                for pair in pairs:
                    pair_counts[pair] += sign * word_counts[word]
                    changed.add(pair)
                    if sign > 0:
                        pair_words[pair].add(word)
        for pair in changed:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return list(learned)


def train_wordpiece(captions: Iterable[str], vocab_size: int, extra_words: Sequence[str] = ()) -> TextTokenizer:
    """Learns word pieces from captions and puts them behind the fixed tokens.

    Behind id 4283 come every printable ASCII character (so that no English text needs [UNK]), then `extra_words`,
    then the most useful pieces of the captions.

    Args:
      captions: training text.
      vocab_size: total number of ids; a multiple of 128 wastes no row of the embedding table.
      extra_words: words to keep whole, e.g. class names (split at spaces; those already present are skipped).

    Raises:
      ValueError: `vocab_size` does not even hold the fixed part, or the captions have fewer pieces than asked for.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    normaliser, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    fixed = fixed_tokens()
    characters = sorted(set(string.printable.lower()) - set(string.whitespace))
    inside = [f"##{c}" for c in characters if c.isalnum()]  # punctuation is always a word of its own
    words = [word for text in extra_words for word in text.lower().split()]
    tokens = list(dict.fromkeys([*fixed, *characters, *inside, *words]))
    if vocab_size < len(tokens):
        raise ValueError(f"vocab_size {vocab_size} is too small: the fixed tokens alone are {len(tokens)}")

    word_counts = collections.Counter(
        word for caption in captions for word, _ in splitter.pre_tokenize_str(normaliser.normalize_str(caption))
    )
    # As many merges as there are free ids and a few more, because some pieces are already present (COCO names).
    learned = learn_pieces(word_counts, vocab_size - len(tokens) + len(COCO_CLASSES) + len(words))
    tokens = list(dict.fromkeys([*tokens, *learned]))
    if len(tokens) < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} cannot be filled: the captions give only {len(tokens)} tokens in all; "
            f"ask for at most that (largest multiple of 128: {len(tokens) // 128 * 128}) or add captions"
        )

    vocabulary = {token: id_ for id_, token in enumerate(tokens[:vocab_size])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normaliser, splitter
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    added = tokenizers.AddedToken
    # Control tokens and values are matched as written; class names after normalisation, and only as whole words:
    # "car" must not be cut out of "carpet".
    backend.add_special_tokens([added(t, normalized=False) for t in fixed[:SENTINEL_OFFSET]])
    middle = fixed[SENTINEL_OFFSET:COCO_OFFSET]
    backend.add_special_tokens([added(t, normalized=False, single_word=True) for t in middle])
    backend.add_tokens([added(t, normalized=True, single_word=True) for t in COCO_CLASSES])
    return TextTokenizer(backend)
