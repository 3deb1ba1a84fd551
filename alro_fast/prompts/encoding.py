"""Text -> token ids: template text is trusted, titles are not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import datetime
from typing import Generic, TypeVar, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import AlroFastError

CACHED_PIECES = 1 << 17  # pieces of about 20 tokens, some 100 MB at most
TODAY = datetime(2024, 7, 26)  # for chat templates that write today's date: what Llama 3's own has where it knows none
FIXED_DATE = (  # a template's own strftime_now comes before the one it is given, which tells the time
    "{%- macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in "aAbBcdHIjmMpSUwWxXyYzZ")
    + " }}{% endmacro +%}"
)
PROBE = "Rank: A B C\n- Plan 9 (1959) | Sci-Fi | 4.5 stars\n  Été ＡＢ ﬁn, naïve №1\t<b>x</b> 12345"


Encode = Callable[[Sequence[str]], list[list[int]]]
Key = TypeVar("Key", bound=Hashable)


class Encoder:
    """Both ways of encoding with one tokenizer.

    `trusted` parses special tokens, as a template's and a chat template's own text needs. `plain` cannot produce one:
    it runs on a copy of the tokenizer without its added vocabulary (`split_special_tokens` alone would still parse
    added tokens that are not marked special, such as <think> or <item_3>), and an id of the added vocabulary that the
    model's own vocabulary can spell is dropped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise AlroFastError(
                f"tokenizer {self.name!r} is a {type(tokenizer).__name__}, not one of the `tokenizers` library; "
                "load it with transformers.AutoTokenizer, or convert it to a tokenizer.json"
            )
        content = json.loads(backend.to_str())
        # Runs of whitespace are added tokens in some vocabularies; they are text, not markers.
        blank = [token for token in content["added_tokens"] if not token["content"].replace("▁", " ").strip()]
        content.update(added_tokens=blank, post_processor=None, truncation=None, padding=None)
        self._plain = Tokenizer.from_str(json.dumps(content))
        self.unk = tokenizer.unk_token_id
        markers = {id for id, token in tokenizer.added_tokens_decoder.items()} - {token["id"] for token in blank}
        roles = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        self.forbidden = frozenset((markers | set(tokenizer.all_special_ids)) - ({self.unk} - set(roles)))

    @property
    def special_texts(self) -> list[str]:
        """The added tokens as written, the longest first."""
        return sorted((str(token) for token in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)

    def trusted(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of text that may hold special tokens; none is added."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=False, padding=False, truncation=False
        )
        return encoded["input_ids"]

    def ids_of(self, tokens: Sequence[str]) -> list[int]:
        """Ids of tokens of the vocabulary."""
        return cast(list[int], self.tokenizer.convert_tokens_to_ids(list(tokens)))

    def text_of(self, ids: Sequence[int]) -> str:
        """Token ids as text, for people to read."""
        return cast(str, self.tokenizer.decode(list(ids)))

    def rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as the chat template writes them, on the same day every day (TODAY): else prompts would change over
        night, and what was learned or measured on them. Raises what the template raises where it does not take them."""
        template = self.tokenizer.get_chat_template()
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=FIXED_DATE + template if "strftime_now" in template else template, tokenize=False,
            add_generation_prompt=add_generation_prompt, enable_thinking=False,
        )  # fmt: skip
        return cast(str, rendered)

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of text that must not hold a special token, whatever it says."""
        encoded = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        forbidden = self.forbidden
        return [[id for id in encoding.ids if id not in forbidden] for encoding in encoded]

    def ends_with_marker(self, text: str) -> bool:
        """True when the last token of a trusted text is a special one."""
        ids = self.trusted([text])[0]
        return bool(ids) and ids[-1] in self.forbidden

    def trusted_after(self, anchor: str, text: str) -> list[int]:
        """Ids of `text` as it reads after `anchor`."""
        return _continuations(self.trusted, anchor, [text])[0]

    def plain_after(self, anchor: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it reads after `anchor`: without the word-start mark some tokenizers put first."""
        return _continuations(self.plain, anchor, texts)

    def fingerprint(self) -> str:
        """Of the vocabulary, the chat template and how a probe text is split: equal after save_pretrained."""
        known = [sorted(self.tokenizer.get_vocab().items()), self.trusted([PROBE]), self.tokenizer.chat_template]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


class Pieces(Generic[Key]):
    """Token ids of untrusted pieces of text by key, encoded in batches and cached."""

    def __init__(self, encode: Encode, text_of: Callable[[Key], str]):
        self._encode, self._text_of = encode, text_of
        self.ids: dict[Key, list[int]] = {}

    def prepare(self, keys: Iterable[Key]) -> dict[Key, list[int]]:
        """`ids`, holding at least these keys."""
        wanted = dict.fromkeys(keys)
        missing = [key for key in wanted if key not in self.ids]
        if missing and len(self.ids) + len(missing) > CACHED_PIECES:
            self.ids.clear()
            missing = list(wanted)
        if missing:
            self.ids.update(zip(missing, self._encode([self._text_of(key) for key in missing])))
        return self.ids


def line_start(encode: Encode, text: str) -> tuple[str, int]:
    """A newline and its number of tokens, if `text` after it leaves them as they are; otherwise nothing and 0."""
    start, whole = encode(["\n", "\n" + text])
    return ("\n", len(start)) if whole[: len(start)] == start else ("", 0)


def _continuations(encode: Encode, anchor: str, texts: Sequence[str]) -> list[list[int]]:
    """A text that merges with the end of its anchor is encoded after a simpler anchor instead."""
    found: list[list[int]] = [[] for _ in texts]
    left = list(range(len(texts)))
    for before in (anchor, "\n", "x", ""):
        start = encode([before])[0] if before else []
        merged = []
        for number, ids in zip(left, encode([before + texts[number] for number in left])):
            if ids[: len(start)] == start:
                found[number] = ids[len(start) :]
            else:
                merged.append(number)
        left = merged
        if not left or not before:
            break
    return found
