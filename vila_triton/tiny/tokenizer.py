"""A word-level tokenizer that knows exactly the words of the questions and answers."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vila_triton.tiny.questions import ORDINALS
from vila_triton.tiny.scenes import COLORS, POSITIONS, SHAPES

SPECIAL_TOKENS = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
SPECIAL_TEXTS = tuple(SPECIAL_TOKENS.values())
TURN_TOKENS = ("\n", "USER:", "ASSISTANT:")
VOCAB_SIZE = 128

# Replaced before look-up, so that the model need not learn other spellings.
SYNONYMS = {"color": "colour", "center": "centre", "middle": "centre", "picture": "image", "object": "shape"}

_WORDS = (
    ". ? , a the how many are is there what colour shape shapes where which in at of image has more total describe "
    "yes no nothing"
)


def vocabulary() -> list[str]:
    """Return every token in id order: special tokens, turn tokens, words, digits, then fillers up to 128."""
    nouns = [*COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *" ".join(POSITIONS).split(), *ORDINALS]
    tokens = list(dict.fromkeys([*SPECIAL_TEXTS, *TURN_TOKENS, *_WORDS.split(), *nouns, *"0123456789"]))
    return tokens + [f"<unused{i}>" for i in range(VOCAB_SIZE - len(tokens))]


def build_tokenizer() -> Tokenizer:
    """Build the tokenizer; its post-processor prepends `<s>`."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    synonyms = [normalizers.Replace(Regex(rf"\b{word}"), replacement) for word, replacement in SYNONYMS.items()]
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
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TEXTS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TURN_TOKENS])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write the files of the tokenizer into a folder."""
    PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        **{f"{name}_token": token for name, token in SPECIAL_TOKENS.items()},
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    ).save_pretrained(folder)
