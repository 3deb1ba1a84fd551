"""The prompts of a run, in its folder: prompt_template.yaml as it was, and a JSON file with what else they depend on.

The JSON file also records the tokens that the prompts are made of, so that a folder whose tokenizer or template was
changed is refused rather than misread. Whoever has a run asks `objectives.base.describe` which prompts it has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedTokenizerBase

from ..errors import AlroFastError
from ..texts import read_json, read_text
from .encoding import Encoder
from .template import TEMPLATE_FILE


class SavedPrompts:
    """What every class of prompts has of this module.

    It is called as `cls(tokenizer, template, **options)`, keeps its `template` and says: `FILE`, the name
    of its JSON file; `read_template(source, name=, origin=)`, which parses the template's text; `record()`, what the
    JSON file holds, with the keys "template" (its name) and "tokenizer" (its fingerprint, or that under "fingerprint");
    `options_of(record)`, the keyword arguments that make the same prompts again; `find_template(name, ratings)`,
    a ready template or a file, its scale filled in; and `ready_templates()`, the names of the ready ones.
    """

    FILE: ClassVar[str]
    template: Any

    @staticmethod
    def read_template(source: str, *, name: str, origin: str) -> Any:
        raise NotImplementedError

    @staticmethod
    def find_template(template: str | Path, ratings: Iterable[float] = ()) -> Any:
        raise NotImplementedError

    @staticmethod
    def ready_templates() -> list[str]:
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        raise NotImplementedError

    @staticmethod
    def options_of(record: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Write both files."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TEMPLATE_FILE).write_text(self.template.source, encoding="utf-8")
        content = json.dumps(self.record(), indent=1, ensure_ascii=False)
        (directory / self.FILE).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The prompts saved there.

        Raises AlroFastError: none there, or damaged; a tokenizer that is not the one they were saved with.
        """
        directory = Path(directory)
        try:
            source = read_text(directory / TEMPLATE_FILE)
            record = read_json(directory / cls.FILE)
            options, name, known = cls.options_of(record), record["template"], record["tokenizer"]
        except OSError as error:
            raise AlroFastError(
                f"{directory} holds no prompt settings: {Path(error.filename).name} cannot be read; "
                "expected the output folder of a training run"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise AlroFastError(f"{directory / cls.FILE} is damaged: expected what training wrote") from None
        encoder = Encoder(tokenizer)
        if encoder.fingerprint() != (known.get("fingerprint") if isinstance(known, dict) else known):
            raise AlroFastError(
                f"tokenizer {encoder.name!r} is not the one {directory} was made with; load the one saved there"
            )
        template = cls.read_template(source, name=name, origin=str(directory / TEMPLATE_FILE))
        make: Any = cls
        prompts: Self = make(tokenizer, template, **options)
        again = json.loads(json.dumps(prompts.record()))
        record.setdefault("turns", again.get("turns"))  # which version 0.1.0 did not record
        if again | {"tokenizer": known, "turns": again.get("turns")} != record:  # the tokenizer's folder may have moved
            raise AlroFastError(f"{directory / cls.FILE} does not fit {TEMPLATE_FILE} beside it; restore both")
        return prompts
