"""A word-level tokenizer that knows exactly the words of the questions and answers."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vila_triton.tiny.questions import ORDINALS
from vila_triton.tiny.scenes import COLOURS, POSITIONS, SHAPES

NAMED = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
SPECIAL = tuple(NAMED.values())
TURNS = ("\n", "USER:", "ASSISTANT:")
VOCABULARY = 128

# Folded before lookup, so that other spellings cost the model nothing.
SYNONYMS = {"color": "colour", "center": "centre", "middle": "centre", "picture": "image", "object": "shape"}

_WORDS = (
    ". ? , a the how many are is there what colour shape shapes where which in at of image has more total describe "
    "yes no nothing"
)


def vocabulary() -> list[str]:
    """Every token in id order: special tokens, turn tokens, words, digits, then fillers up to 128."""
    names = [*COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *" ".join(POSITIONS).split(), *ORDINALS]
    tokens = list(dict.fromkeys([*SPECIAL, *TURNS, *_WORDS.split(), *names, *"0123456789"]))
    return tokens + [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]


def build() -> Tokenizer:
    """The bare tokenizer; `<s>` is prepended by its post-processor."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    synonyms = [normalizers.Replace(Regex(rf"\b{word}"), to) for word, to in SYNONYMS.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *synonyms])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # words joined by spaces, none before punctuation
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TURNS])
    return tokenizer


def save(folder: Path) -> None:
    """Writes the tokenizer as a folder for `AutoTokenizer.from_pretrained`."""
    PreTrainedTokenizerFast(
        tokenizer_object=build(),
        **{f"{name}_token": token for name, token in NAMED.items()},
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    ).save_pretrained(folder)
