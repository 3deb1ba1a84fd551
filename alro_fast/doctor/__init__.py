"""What is installed here and what will serve: versions, extras, backends, devices, compilers.

`--model_name_or_path NAME` adds what is fused and what is not for a base model, from its configuration alone: nothing
else of it is loaded. Exit status 2 where something has to be mended, which the last lines name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..cli import OneLineParser


def main(argv: Sequence[str]) -> None:
    """Look, and say it in 80 columns or as one object of JSON; SystemExit(2) where there are problems."""
    options = parser().parse_args(argv)
    from ..modeling.quiet import quiet_libraries  # torch takes seconds to import
    from ..texts import json_line
    from ..training.console import folded
    from .machine import machine, problems

    quiet_libraries()
    found = machine()
    if options.model_name_or_path is not None:
        from .fused import fused_parts

        found["model"] = fused_parts(options.model_name_or_path, options.trust_remote_code)
    wrong = problems(found)
    if options.json:
        print(json_line(found | {"problems": wrong}))
    else:
        for name, value in found.items():
            rows = value.items() if name == "model" else [(name, value)]
            for row, said in rows:
                print(folded(f"{row:<10} {_words(said)}"))
        print(*(folded(f"{'problem':<10} {each}") for each in wrong or ["none"]), sep="\n")
    if wrong:
        raise SystemExit(2)


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(each)}".rstrip() for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def parser() -> OneLineParser:
    """The command's options."""
    parser = OneLineParser(prog="python -m alro_fast.doctor", description=__doc__)
    parser.add_argument("--model_name_or_path", metavar="NAME", help="a base model: a folder, a hub id or demo")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", action="store_true", help="one object of JSON in place of lines")
    return parser
