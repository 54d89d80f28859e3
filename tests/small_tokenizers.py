"""Two small tokenizers whose ids can be written down by hand: one like SentencePiece's, one of bytes like Llama 3's."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "▁USER", "USER", ":", "▁ASSISTANT", "▁What", "What", "▁is", "▁it"]
PIECES += ["?", "▁A", "▁cat", ".", "▁Sure", "▁not", "▁Yes"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = ["system", "user", "assistant", "What", "Ġis", "Ġit", "Sure", "Hi", "ĊĊ"]


def pieces() -> PreTrainedTokenizerFast:
    """A text begins with a space, which is "▁"; the fewest pieces win, and a new line is its byte."""
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="first")
    return finished(tokenizer, PIECES[:3], unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def spelled(special: list[str]) -> list[str]:
    """The vocabulary of `of_bytes`: what is special, single bytes, and every word with its beginnings."""
    letters = sorted({letter for word in WORDS for letter in word} | set("Ġ.?:"))
    grown = [word[:n] for word in WORDS for n in range(2, len(word) + 1)]
    return list(dict.fromkeys([*special, *letters, *grown]))


def of_bytes(special: list[str]) -> PreTrainedTokenizerFast:
    """Words grow from the left, letter by letter."""
    vocabulary = {token: i for i, token in enumerate(spelled(special))}
    merges = list(dict.fromkeys((word[:n], word[n]) for word in WORDS for n in range(1, len(word))))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}]?\p{L}+|\s*[\r\n]+|[^\s\p{L}]"), "isolated")  # as Llama 3 does
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer, special, bos_token=special[0], eos_token=special[1])


def finished(tokenizer: Tokenizer, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bos = named["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
